//! Answers of several nodes in the order of time.

use anyhow::Result;
use tokio::sync::mpsc;
use xebec_hubble::observer::GetFlowsResponse;

/// Takes answers from several nodes, each of which tells its own in order, oldest first.
pub struct Merged {
    nodes: Vec<(
        Option<GetFlowsResponse>,
        mpsc::Receiver<Result<GetFlowsResponse>>,
    )>,
}

impl Merged {
    pub fn new(nodes: Vec<mpsc::Receiver<Result<GetFlowsResponse>>>) -> Self {
        Self {
            nodes: nodes.into_iter().map(|node| (None, node)).collect(),
        }
    }

    /// The next one of all: waits until each node has told one, or has no more to tell.
    pub async fn next(&mut self) -> Result<Option<GetFlowsResponse>> {
        for (head, answers) in &mut self.nodes {
            if head.is_none() {
                *head = answers.recv().await.transpose()?;
            }
        }
        let heads = self.nodes.iter_mut().map(|(head, _)| head);
        let oldest = heads
            .filter(|head| head.is_some())
            .min_by_key(|head| head.as_ref().map(|answer| answer.time));
        Ok(oldest.and_then(Option::take))
    }
}

/// The next one that any node tells: of who follows, who must not wait for a node that is silent.
pub async fn any(
    nodes: &mut [mpsc::Receiver<Result<GetFlowsResponse>>],
) -> Result<Option<GetFlowsResponse>> {
    use std::task::Poll;
    std::future::poll_fn(|context| {
        let mut open = false;
        for node in nodes.iter_mut() {
            match node.poll_recv(context) {
                Poll::Ready(Some(answer)) => return Poll::Ready(answer.map(Some)),
                Poll::Ready(None) => {}
                Poll::Pending => open = true,
            }
        }
        if open {
            Poll::Pending
        } else {
            Poll::Ready(Ok(None))
        }
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(node: &str, seconds: i64) -> GetFlowsResponse {
        GetFlowsResponse {
            node_name: node.into(),
            time: Some(xebec_hubble::wkt::Timestamp { seconds, nanos: 0 }),
            response_types: None,
        }
    }

    async fn nodes() -> Vec<mpsc::Receiver<Result<GetFlowsResponse>>> {
        let mut receivers = Vec::new();
        for (node, times) in [("a", &[1, 4, 5][..]), ("b", &[2, 3]), ("c", &[])] {
            let (sender, receiver) = mpsc::channel(9);
            for time in times {
                sender.send(Ok(answer(node, *time))).await.unwrap();
            }
            receivers.push(receiver);
        }
        receivers
    }

    #[tokio::test]
    async fn the_oldest_of_all_nodes_comes_first() {
        let mut merged = Merged::new(nodes().await);
        let mut told = Vec::new();
        while let Some(answer) = merged.next().await.unwrap() {
            told.push((
                answer.node_name.clone(),
                answer.time.unwrap_or_default().seconds,
            ));
        }
        let wanted = [("a", 1), ("b", 2), ("b", 3), ("a", 4), ("a", 5)];
        assert_eq!(told, wanted.map(|(node, time)| (node.to_owned(), time)));
    }

    #[tokio::test]
    async fn who_follows_waits_for_no_silent_node_and_is_told_of_failures() {
        let mut nodes = nodes().await;
        let (failing, receiver) = mpsc::channel(1);
        let (_silent, silent) = mpsc::channel(1);
        nodes.push(silent);
        nodes.push(receiver);
        let mut count = 0;
        while count < 5 {
            assert!(any(&mut nodes).await.unwrap().is_some());
            count += 1;
        }
        failing.send(Err(anyhow::anyhow!("gone"))).await.unwrap();
        assert_eq!(any(&mut nodes).await.unwrap_err().to_string(), "gone");
    }
}
