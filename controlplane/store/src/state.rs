//! The state in memory: every key as it stands, and the recent history that old reads and watches need.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use bytes::Bytes;

use crate::log::{Entry, LoggedOp};
use crate::watcher::Pull;
use crate::{Error, Event, KeyValue, RangeRequest, RangeResponse, Revision, WatchBatch};

/// Keys and history up to one revision.
#[derive(Default)]
pub(crate) struct State {
    pub revision: Revision,
    pub keys: BTreeMap<Bytes, KeyValue>,
    /// Bytes of all keys and values.
    pub live_bytes: u64,
    /// The newest batches, oldest first; the first one's revision is `oldest`.
    history: VecDeque<WatchBatch>,
    history_bytes: usize,
    /// The oldest revision that can be read, and from which on a watch can start after it.
    pub oldest: Revision,
}

/// How much history is kept in memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Retention {
    pub revisions: usize,
    pub bytes: usize,
}

impl State {
    /// Applies a committed transaction.
    pub(crate) fn apply(&mut self, entry: Entry) {
        let revision = entry.revision;
        let mut events = Vec::with_capacity(entry.ops.len());
        for op in entry.ops {
            match op {
                LoggedOp::Put { key, value } => {
                    let prev = self.keys.get(&key).cloned();
                    let kv = KeyValue {
                        key: key.clone(),
                        value,
                        create_revision: prev
                            .as_ref()
                            .map_or(revision, |prev| prev.create_revision),
                        mod_revision: revision,
                    };
                    self.live_bytes += size(&kv);
                    self.live_bytes -= prev.as_ref().map_or(0, size);
                    self.keys.insert(key, kv.clone());
                    events.push(Event {
                        kv,
                        prev,
                        deleted: false,
                    });
                }
                LoggedOp::Delete { key } => {
                    let Some(prev) = self.keys.remove(&key) else {
                        continue;
                    };
                    self.live_bytes -= size(&prev);
                    let kv = KeyValue {
                        key,
                        value: Bytes::new(),
                        create_revision: prev.create_revision,
                        mod_revision: revision,
                    };
                    events.push(Event {
                        kv,
                        prev: Some(prev),
                        deleted: true,
                    });
                }
                LoggedOp::State {
                    key,
                    value,
                    create_revision,
                    mod_revision,
                } => {
                    let kv = KeyValue {
                        key: key.clone(),
                        value,
                        create_revision,
                        mod_revision,
                    };
                    self.live_bytes += size(&kv);
                    self.keys.insert(key, kv);
                }
            }
        }
        self.revision = revision;
        let batch = WatchBatch { revision, events };
        self.history_bytes += weight(&batch);
        self.history.push_back(batch);
    }

    /// Takes a snapshot's keys as the whole truth at its revision.
    pub(crate) fn load(&mut self, entry: Entry) {
        self.apply(entry);
        self.history.clear();
        self.history_bytes = 0;
        self.oldest = self.revision;
    }

    /// Forgets history beyond the limits.
    pub(crate) fn trim(&mut self, limits: Retention) {
        while self.history.len() > limits.revisions || self.history_bytes > limits.bytes {
            let Some(batch) = self.history.front() else {
                return;
            };
            self.forget_through(batch.revision);
        }
    }

    /// Forgets history so that `revision` is the oldest that can be read.
    pub(crate) fn forget_through(&mut self, revision: Revision) {
        while let Some(batch) = self
            .history
            .front()
            .filter(|batch| batch.revision <= revision)
        {
            self.history_bytes -= weight(batch);
            self.oldest = batch.revision;
            self.history.pop_front();
        }
        self.oldest = self.oldest.max(revision.min(self.revision));
    }

    /// A key range as of a revision within the kept history.
    pub(crate) fn range(&self, request: &RangeRequest) -> Result<RangeResponse, Error> {
        let at = request.at.unwrap_or(self.revision);
        self.check(at)?;
        if request.keys.start >= request.keys.end {
            return Ok(RangeResponse {
                kvs: Vec::new(),
                count: 0,
                revision: at,
            });
        }
        let within = || self.keys.range(request.keys.clone());
        let limit = if request.limit == 0 {
            usize::MAX
        } else {
            request.limit
        };
        if at == self.revision {
            let kvs: Vec<KeyValue> = within().take(limit).map(|(_, kv)| kv.clone()).collect();
            let count = if kvs.len() < limit {
                kvs.len()
            } else {
                within().count()
            };
            return Ok(RangeResponse {
                kvs,
                count,
                revision: at,
            });
        }
        // Undo, newest first, what happened since.
        let mut changed: BTreeMap<&Bytes, Option<&KeyValue>> = BTreeMap::new();
        for batch in self
            .history
            .iter()
            .rev()
            .take_while(|batch| batch.revision > at)
        {
            for event in batch
                .events
                .iter()
                .filter(|event| request.keys.contains(&event.kv.key))
            {
                changed.insert(&event.kv.key, event.prev.as_ref());
            }
        }
        let now_there = changed.keys().filter(|key| self.keys.contains_key(**key));
        let unchanged = within().count() - now_there.count();
        let count = unchanged + changed.values().flatten().count();
        let (mut now, mut then) = (within().peekable(), changed.into_iter().peekable());
        let merged = std::iter::from_fn(|| {
            loop {
                match (now.peek(), then.peek()) {
                    (Some((key, _)), Some((changed, _))) if key < changed => {
                        return now.next().map(|(_, kv)| kv);
                    }
                    (Some(_), None) => return now.next().map(|(_, kv)| kv),
                    (None, None) => return None,
                    (current, Some((changed, _))) => {
                        if current.is_some_and(|(key, _)| key == changed) {
                            now.next();
                        }
                        if let Some((_, Some(kv))) = then.next() {
                            return Some(kv);
                        }
                    }
                }
            }
        });
        Ok(RangeResponse {
            kvs: merged.take(limit).cloned().collect(),
            count,
            revision: at,
        })
    }

    /// Whether a watch can begin with this revision.
    pub(crate) fn check_watch(&self, from: Revision) -> Result<(), Error> {
        // Revision 0 has no events: a watch from it is one from the first.
        if from.max(1) <= self.oldest {
            return Err(Error::Compacted {
                requested: from,
                oldest: self.oldest + 1,
            });
        }
        if from > self.revision + 1 {
            return Err(Error::Future {
                requested: from - 1,
                current: self.revision,
            });
        }
        Ok(())
    }

    /// The batches from this revision on that touch the range, up to `limit` of them.
    pub(crate) fn since(
        &self,
        keys: &Range<Bytes>,
        from: Revision,
        limit: usize,
    ) -> Result<Pull, Error> {
        self.check_watch(from)?;
        let start = self.history.partition_point(|batch| batch.revision < from);
        let mut batches = VecDeque::new();
        for batch in self.history.range(start..) {
            if batches.len() == limit {
                return Ok(Pull {
                    batches,
                    next: batch.revision,
                    more: true,
                });
            }
            batches.extend(within(batch, keys));
        }
        Ok(Pull {
            batches,
            next: self.revision + 1,
            more: false,
        })
    }

    fn check(&self, at: Revision) -> Result<(), Error> {
        if at > self.revision {
            return Err(Error::Future {
                requested: at,
                current: self.revision,
            });
        }
        if at < self.oldest {
            return Err(Error::Compacted {
                requested: at,
                oldest: self.oldest,
            });
        }
        Ok(())
    }
}

/// The part of a batch within a range, if there is one.
fn within(batch: &WatchBatch, keys: &Range<Bytes>) -> Option<WatchBatch> {
    let events: Vec<Event> = batch
        .events
        .iter()
        .filter(|event| keys.contains(&event.kv.key))
        .cloned()
        .collect();
    (!events.is_empty()).then_some(WatchBatch {
        revision: batch.revision,
        events,
    })
}

fn size(kv: &KeyValue) -> u64 {
    (kv.key.len() + kv.value.len()) as u64
}

/// What a batch keeps in memory beyond the current state: the values that were replaced, and the frame.
fn weight(batch: &WatchBatch) -> usize {
    let event =
        |event: &Event| size_of::<Event>() + event.prev.as_ref().map_or(0, |prev| prev.value.len());
    size_of::<WatchBatch>() + batch.events.iter().map(event).sum::<usize>()
}
