//! Revisioned key-value storage: one trait, an embedded engine.
//!
//! The model is etcd v3's (MVCC over one global revision counter), so that an etcd cluster can
//! stand behind the same trait: every committed transaction raises the revision by one, and a
//! key remembers the revision that created it and the one that last changed it.

mod disk;
mod embedded;
mod log;
mod state;
#[cfg(test)]
mod tests;
mod watcher;

use std::ops::Range;

use bytes::Bytes;
use futures::stream::BoxStream;

pub use embedded::{Embedded, Options};

/// The global, strictly increasing number of the last committed transaction; 0 = nothing yet.
/// It is what the API shows as `resourceVersion`.
pub type Revision = u64;

/// One key with its value as of some revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyValue {
    /// The key, compared byte-wise.
    pub key: Bytes,
    /// The value as it was written.
    pub value: Bytes,
    /// Revision of the transaction that created the key (a deleted and re-created key starts anew).
    pub create_revision: Revision,
    /// Revision of the transaction that last wrote the key.
    pub mod_revision: Revision,
}

/// A half-open key range `[start, end)` to read.
#[derive(Clone, Debug)]
pub struct RangeRequest {
    /// The keys to read, in byte order.
    pub keys: Range<Bytes>,
    /// Read as of this revision; `None` reads the newest state.
    pub at: Option<Revision>,
    /// At most this many keys; 0 = no limit.
    pub limit: usize,
}

/// What a range read found.
#[derive(Clone, Debug)]
pub struct RangeResponse {
    /// The keys in byte order.
    pub kvs: Vec<KeyValue>,
    /// Number of keys in the range at that revision, beyond `limit` too.
    pub count: usize,
    /// The revision the read was made at.
    pub revision: Revision,
}

/// A condition of a transaction: the key's last-change revision is exactly this; 0 = the key does not exist.
#[derive(Clone, Debug)]
pub struct Compare {
    /// The key looked at.
    pub key: Bytes,
    /// Its expected `mod_revision`, 0 where it must not exist.
    pub mod_revision: Revision,
}

/// One write of a transaction.
#[derive(Clone, Debug)]
pub enum Op {
    /// Write the value.
    Put {
        /// The key to write.
        key: Bytes,
        /// Its new value.
        value: Bytes,
    },
    /// Remove the key; removing an absent key is no change.
    Delete {
        /// The key to remove.
        key: Bytes,
    },
}

/// All conditions hold, then all writes happen at one new revision; or nothing happens.
#[derive(Clone, Debug, Default)]
pub struct Txn {
    /// The conditions, all of which must hold.
    pub compare: Vec<Compare>,
    /// The writes, each key at most once.
    pub ops: Vec<Op>,
}

/// How a transaction ended.
#[derive(Clone, Debug)]
pub enum TxnOutcome {
    /// Durable on disk at this revision.
    Committed(Revision),
    /// A condition did not hold; `current` is the key of the first such condition as it stands now.
    Conflict {
        /// The key as it stands, `None` where it does not exist.
        current: Option<KeyValue>,
        /// The revision at which that was seen.
        revision: Revision,
    },
}

/// One change of one key.
#[derive(Clone, Debug)]
pub struct Event {
    /// The key after the change; for a deletion `value` is empty and `mod_revision` is the deletion's.
    pub kv: KeyValue,
    /// The key before the change, `None` where it was created.
    pub prev: Option<KeyValue>,
    /// Whether the change removed the key.
    pub deleted: bool,
}

/// The events of one revision, in write order; a batch is never split.
#[derive(Clone, Debug)]
pub struct WatchBatch {
    /// The revision that these events made.
    pub revision: Revision,
    /// The events within the watched range; never empty.
    pub events: Vec<Event>,
}

/// Why a store call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The revision asked for was compacted away; `oldest` is the oldest that can still be read.
    #[error("revision {requested} has been compacted (oldest available: {oldest})")]
    Compacted {
        /// The revision asked for.
        requested: Revision,
        /// The oldest readable revision.
        oldest: Revision,
    },
    /// The revision asked for does not exist yet.
    #[error("revision {requested} is in the future (current: {current})")]
    Future {
        /// The revision asked for.
        requested: Revision,
        /// The newest revision.
        current: Revision,
    },
    /// The disk refused the write; nothing of the transaction was acknowledged.
    #[error("store cannot write: {0}")]
    Unwritable(String),
    /// What is on disk can't be trusted.
    #[error("store is damaged: {0}")]
    Corrupt(String),
    /// Any other input/output error, with what was being done.
    #[error("store i/o error: {0}")]
    Io(String),
}

/// A revisioned store. Every method may be called from many tasks at once.
#[async_trait::async_trait]
pub trait Store: Send + Sync + 'static {
    /// The newest committed revision; every watcher has been told of it.
    fn revision(&self) -> Revision;
    /// One key at the newest revision.
    async fn get(&self, key: &[u8]) -> Result<Option<KeyValue>, Error>;
    /// A key range at one revision.
    async fn range(&self, request: RangeRequest) -> Result<RangeResponse, Error>;
    /// An atomic conditional write; returns only when it is durable.
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, Error>;
    /// Every change with revision >= `from` in the range, then live ones, without gap or repeat.
    /// A watcher that falls behind further than history reaches gets `Error::Compacted` as its last item.
    async fn watch(
        &self,
        keys: Range<Bytes>,
        from: Revision,
    ) -> Result<BoxStream<'static, Result<WatchBatch, Error>>, Error>;
    /// Forgets history below `revision`; the newest state is kept whole.
    async fn compact(&self, revision: Revision) -> Result<(), Error>;
    /// Bytes on disk.
    fn size_on_disk(&self) -> u64;
}
