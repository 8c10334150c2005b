//! A work queue: each key is held once, never worked on twice at the same time, and retried ever more slowly.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt::Display;
use std::future::Future;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// The first and the longest wait after failures; client-go's.
const FIRST_RETRY: Duration = Duration::from_millis(5);
const LAST_RETRY: Duration = Duration::from_secs(1000);
/// Failures from which on they are worth a warning: races heal themselves before.
const WORTH_A_WARNING: u32 = 5;

/// When a reconcile wants to be run again although nothing changed; `None`: not.
pub(crate) type Again = Option<Duration>;

/// Keys that wait to be worked on.
pub(crate) struct Queue<T> {
    inner: Mutex<Inner<T>>,
    ready: Notify,
}

struct Inner<T> {
    order: VecDeque<T>,
    waiting: HashSet<T>,
    running: HashSet<T>,
    failures: HashMap<T, u32>,
}

impl<T> Queue<T>
where
    T: Clone + Eq + Hash + Display + Send + Sync + 'static,
{
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            inner: Mutex::new(Inner {
                order: VecDeque::new(),
                waiting: HashSet::new(),
                running: HashSet::new(),
                failures: HashMap::new(),
            }),
            ready: Notify::new(),
        })
    }

    /// Has the key worked on, once more if that is going on right now.
    pub(crate) fn add(&self, key: T) {
        let mut inner = self.lock();
        if inner.waiting.insert(key.clone()) && !inner.running.contains(&key) {
            inner.order.push_back(key);
            drop(inner);
            self.ready.notify_one();
        }
    }

    /// Adds the key later.
    pub(crate) fn add_after(self: &Arc<Self>, key: T, delay: Duration) {
        let queue = Arc::downgrade(self);
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            if let Some(queue) = queue.upgrade() {
                queue.add(key);
            }
        });
    }

    fn pop(&self) -> Option<T> {
        let mut inner = self.lock();
        let key = inner.order.pop_front()?;
        inner.waiting.remove(&key);
        inner.running.insert(key.clone());
        Some(key)
    }

    /// The key's work is over; gives how long to wait before it is tried again after a failure.
    fn done(&self, key: &T, failed: bool) -> Option<(Duration, u32)> {
        let mut inner = self.lock();
        inner.running.remove(key);
        if inner.waiting.contains(key) {
            inner.order.push_back(key.clone());
            self.ready.notify_one();
        }
        if !failed {
            inner.failures.remove(key);
            return None;
        }
        let failures = inner.failures.entry(key.clone()).or_insert(0);
        *failures += 1;
        let wait = FIRST_RETRY.saturating_mul(1 << (*failures - 1).min(20));
        Some((wait.min(LAST_RETRY), *failures))
    }

    /// Works on keys, up to `workers` at a time, until `shutdown`.
    pub(crate) async fn run<F>(
        self: &Arc<Self>,
        what: &'static str,
        workers: usize,
        shutdown: CancellationToken,
        reconcile: impl Fn(T) -> F,
    ) where
        F: Future<Output = anyhow::Result<Again>>,
    {
        let mut running = FuturesUnordered::new();
        loop {
            while running.len() < workers {
                let Some(key) = self.pop() else { break };
                let work = reconcile(key.clone());
                running.push(async move { (key, work.await) });
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = self.ready.notified() => {}
                Some((key, result)) = running.next() => self.finish(what, key, result),
            }
        }
    }

    fn finish(self: &Arc<Self>, what: &'static str, key: T, result: anyhow::Result<Again>) {
        match result {
            Ok(again) => {
                self.done(&key, false);
                if let Some(delay) = again {
                    self.add_after(key, delay);
                }
            }
            Err(error) => {
                if let Some((wait, failures)) = self.done(&key, true) {
                    if failures >= WORTH_A_WARNING {
                        warn!(what, %key, failures, "{error:#}; trying again");
                    } else {
                        debug!(what, %key, failures, "{error:#}; trying again");
                    }
                    self.add_after(key, wait);
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner<T>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn a_key_waits_once_and_is_never_worked_on_twice_at_a_time() {
        let queue = Queue::new();
        queue.add("a");
        queue.add("a");
        assert_eq!(queue.pop(), Some("a"));
        queue.add("a");
        queue.add("a");
        assert_eq!(queue.pop(), None, "it is being worked on");
        queue.done(&"a", false);
        assert_eq!(queue.pop(), Some("a"), "it changed meanwhile");
        queue.done(&"a", false);
        assert_eq!(queue.pop(), None);
    }

    #[test]
    fn failures_wait_ever_longer_until_one_success() {
        let queue = Queue::new();
        let mut waits = Vec::new();
        for _ in 0..25 {
            queue.add("a");
            queue.pop();
            waits.extend(queue.done(&"a", true).map(|(wait, _)| wait));
        }
        assert_eq!(waits[..3], [5, 10, 20].map(Duration::from_millis));
        assert_eq!(waits[24], LAST_RETRY);
        queue.add("a");
        queue.pop();
        assert!(queue.done(&"a", false).is_none());
        queue.add("a");
        queue.pop();
        assert_eq!(
            queue.done(&"a", true).map(|(wait, _)| wait),
            Some(FIRST_RETRY)
        );
    }

    #[tokio::test]
    async fn failed_work_is_retried_until_it_succeeds() {
        let queue = Queue::new();
        let (calls, stop) = (Arc::new(AtomicUsize::new(0)), CancellationToken::new());
        queue.add("a");
        queue
            .run("test", 2, stop.clone(), |_| {
                let (calls, stop) = (calls.clone(), stop.clone());
                async move {
                    if calls.fetch_add(1, Ordering::SeqCst) < 3 {
                        anyhow::bail!("not yet");
                    }
                    stop.cancel();
                    Ok(None)
                }
            })
            .await;
        assert_eq!(calls.load(Ordering::SeqCst), 4);
    }
}
