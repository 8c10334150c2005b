//! Answers of several nodes in the order of time.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use futures::stream::{BoxStream, SelectAll, StreamExt};
use tokio::time::Instant;

use crate::observer::GetFlowsResponse;
use crate::wkt::Timestamp;

/// How long a flow waits for older ones of other nodes, where their ends are not waited for: nodes read their events
/// every 50 ms.
const WAIT: Duration = Duration::from_millis(150);
/// How many may wait.
const MOST: usize = 4_096;

/// What one node tells, in its own order.
pub type Answers = BoxStream<'static, GetFlowsResponse>;

/// Answers of nodes whose ends can be waited for: the oldest of all comes first.
pub struct Ended {
    nodes: Vec<(Option<GetFlowsResponse>, Answers)>,
}

impl Ended {
    /// What these tell.
    #[must_use]
    pub fn new(nodes: Vec<Answers>) -> Self {
        Self {
            nodes: nodes.into_iter().map(|node| (None, node)).collect(),
        }
    }

    /// The next one: waits until each node has told one, or has no more to tell.
    pub async fn next(&mut self) -> Option<GetFlowsResponse> {
        for (head, answers) in &mut self.nodes {
            if head.is_none() {
                *head = answers.next().await;
            }
        }
        let heads = self.nodes.iter_mut().map(|(head, _)| head);
        let oldest = heads
            .filter(|head| head.is_some())
            .min_by_key(|head| head.as_ref().map(|answer| answer.time));
        oldest.and_then(Option::take)
    }
}

/// One that waits for older ones; those of one time stay in their order.
struct Waiting {
    time: Option<Timestamp>,
    number: u64,
    until: Instant,
    answer: GetFlowsResponse,
}

impl Waiting {
    const fn key(&self) -> (Option<Timestamp>, u64) {
        (self.time, self.number)
    }
}

impl PartialEq for Waiting {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Waiting {}

impl PartialOrd for Waiting {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Waiting {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

/// Answers of nodes that go on: each waits a moment for older ones, and for no node that is silent.
#[derive(Default)]
pub struct Following {
    nodes: SelectAll<Answers>,
    waiting: BinaryHeap<Reverse<Waiting>>,
    count: u64,
}

impl Following {
    /// One node more.
    pub fn push(&mut self, node: Answers) {
        self.nodes.push(node);
    }

    /// The next one; none when all nodes have ended.
    pub async fn next(&mut self) -> Option<GetFlowsResponse> {
        loop {
            let due = self.waiting.peek().map(|Reverse(first)| first.until);
            let full = self.waiting.len() >= MOST;
            match due {
                Some(due) if full || due <= Instant::now() => return self.pop(),
                Some(due) => {
                    tokio::select! {
                        answer = self.nodes.next(), if !self.nodes.is_empty() => match answer {
                            Some(answer) => self.keep(answer),
                            None => return self.pop(),
                        },
                        () = tokio::time::sleep_until(due) => return self.pop(),
                    }
                }
                None => {
                    let answer = self.nodes.next().await?;
                    self.keep(answer);
                }
            }
        }
    }

    fn keep(&mut self, answer: GetFlowsResponse) {
        self.count += 1;
        self.waiting.push(Reverse(Waiting {
            time: answer.time,
            number: self.count,
            until: Instant::now() + WAIT,
            answer,
        }));
    }

    fn pop(&mut self) -> Option<GetFlowsResponse> {
        self.waiting.pop().map(|Reverse(first)| first.answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc;
    use tokio_stream::wrappers::ReceiverStream;

    fn answer(node: &str, seconds: i64) -> GetFlowsResponse {
        GetFlowsResponse {
            node_name: node.into(),
            time: Some(Timestamp { seconds, nanos: 0 }),
            response_types: None,
        }
    }

    fn node(name: &'static str, times: &'static [i64]) -> Answers {
        futures::stream::iter(times.iter().map(move |time| answer(name, *time))).boxed()
    }

    fn told(answer: &GetFlowsResponse) -> (&str, i64) {
        (&answer.node_name, answer.time.unwrap().seconds)
    }

    #[tokio::test]
    async fn the_oldest_of_all_nodes_comes_first() {
        let mut merged = Ended::new(vec![
            node("a", &[1, 4, 5]),
            node("b", &[2, 3]),
            node("c", &[]),
        ]);
        for wanted in [("a", 1), ("b", 2), ("b", 3), ("a", 4), ("a", 5)] {
            assert_eq!(told(&merged.next().await.unwrap()), wanted);
        }
        assert!(merged.next().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn who_follows_waits_a_moment_for_older_ones_and_for_no_silent_node() {
        let mut following = Following::default();
        let (late, receiver) = mpsc::channel(9);
        let (_silent, never) = mpsc::channel(9);
        following.push(node("a", &[2, 4]).chain(futures::stream::pending()).boxed());
        following.push(ReceiverStream::new(receiver).boxed());
        following.push(ReceiverStream::new(never).boxed());
        let sending = async {
            tokio::time::sleep(WAIT / 2).await;
            for time in [1, 3] {
                late.send(answer("b", time)).await.unwrap();
            }
            drop(late);
        };
        let reading = async {
            for wanted in [("b", 1), ("a", 2), ("b", 3), ("a", 4)] {
                assert_eq!(told(&following.next().await.unwrap()), wanted);
            }
        };
        tokio::join!(sending, reading);
    }

    #[tokio::test]
    async fn it_ends_with_the_last_node() {
        let mut following = Following::default();
        following.push(node("a", &[1]));
        following.push(node("b", &[1]));
        assert_eq!(told(&following.next().await.unwrap()), ("a", 1));
        assert_eq!(told(&following.next().await.unwrap()), ("b", 1));
        assert!(following.next().await.is_none());
    }
}
