//! A watcher reads from the history at its own pace; the writer only tells it that there is something to read.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use futures::Stream;
use tokio::sync::Notify;

use crate::{Error, Revision, WatchBatch};

/// What the writer knows of a watcher.
pub(crate) struct Watcher {
    keys: Range<Bytes>,
    /// From this revision on there may be something to read; 0 = there is nothing.
    pending: AtomicU64,
    /// The store is gone.
    closed: AtomicBool,
    changed: Notify,
}

/// What one reading of the history found.
#[derive(Default)]
pub(crate) struct Pull {
    pub batches: VecDeque<WatchBatch>,
    /// The revision to go on from.
    pub next: Revision,
    /// There is more to read from there already.
    pub more: bool,
}

impl Watcher {
    /// One that is told of what is committed from now on, and, where `pending` is not 0, has to read from there.
    pub(crate) fn new(keys: Range<Bytes>, pending: Revision) -> Self {
        Self {
            keys,
            pending: AtomicU64::new(pending),
            closed: AtomicBool::new(false),
            changed: Notify::new(),
        }
    }

    /// Tells that commits from revision `first` on changed these keys, which are sorted; true if it is to be woken.
    pub(crate) fn touch(&self, keys: &[Bytes], first: Revision) -> bool {
        let at = keys.partition_point(|key| *key < self.keys.start);
        keys.get(at).is_some_and(|key| *key < self.keys.end)
            && self
                .pending
                .compare_exchange(0, first, Ordering::AcqRel, Ordering::Acquire)
                .is_ok()
    }

    pub(crate) fn wake(&self) {
        self.changed.notify_one();
    }

    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.wake();
    }

    /// All batches, as `read` gives them from a revision on.
    pub(crate) fn changes<R>(
        self: Arc<Self>,
        read: R,
    ) -> impl Stream<Item = Result<WatchBatch, Error>>
    where
        R: Fn(&Range<Bytes>, Revision) -> Result<Pull, Error>,
    {
        let reader = Reader {
            watcher: self,
            read,
            last: Pull::default(),
            ended: false,
        };
        futures::stream::unfold(reader, |mut reader| async move {
            let batch = reader.next().await?;
            Some((batch, reader))
        })
    }
}

struct Reader<R> {
    watcher: Arc<Watcher>,
    read: R,
    /// What was read; its batches leave it one by one.
    last: Pull,
    ended: bool,
}

impl<R> Reader<R>
where
    R: Fn(&Range<Bytes>, Revision) -> Result<Pull, Error>,
{
    async fn next(&mut self) -> Option<Result<WatchBatch, Error>> {
        loop {
            if let Some(batch) = self.last.batches.pop_front() {
                return Some(Ok(batch));
            }
            if self.ended {
                return None;
            }
            // Taken before reading: what is committed after the reading sets it again.
            let pending = self.watcher.pending.swap(0, Ordering::AcqRel);
            let from = match (self.last.more, pending) {
                (true, _) => self.last.next,
                (false, 0) if self.watcher.closed.load(Ordering::Acquire) => return None,
                (false, 0) => {
                    self.watcher.changed.notified().await;
                    continue;
                }
                // A reading may have found already what it was told of meanwhile.
                (false, pending) => pending.max(self.last.next),
            };
            match (self.read)(&self.watcher.keys, from) {
                Ok(pull) => self.last = pull,
                Err(error) => {
                    self.ended = true;
                    return Some(Err(error));
                }
            }
        }
    }
}
