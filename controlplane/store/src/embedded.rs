//! The embedded engine: all state in memory, one writer thread, group commit to a log on disk.

use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc as std_mpsc;
use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak,
};

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::sync::oneshot;
use tracing::{error, info, warn};

use crate::disk::{Disk, LogFile, RealDisk, sync_dir};
use crate::log::{self, Entry, LoggedOp};
use crate::state::{Retention, State};
use crate::watcher::Watcher;
use crate::{
    Error, KeyValue, Op, RangeRequest, RangeResponse, Revision, Store, Txn, TxnOutcome, WatchBatch,
};

/// How the engine runs; the defaults suit a cluster.
#[derive(Clone, Debug)]
pub struct Options {
    /// Revisions of history that old reads and watches can reach back.
    pub history_revisions: usize,
    /// Bytes of memory that this history may take.
    pub history_bytes: usize,
    /// Bytes that the log may grow to, and twice the live data, before a snapshot replaces it.
    pub snapshot_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            history_revisions: 100_000,
            history_bytes: 16 << 20,
            snapshot_bytes: 64 << 20,
        }
    }
}

/// Bytes of one group commit: enough to share the sync, little enough to bound its latency.
const BATCH_BYTES: usize = 4 << 20;

/// Batches that a watcher reads at a time: readers hold the state for so long.
const PULL: usize = 256;

/// Bytes of one transaction; a record must stay well under what recovery reads.
const LARGEST_TXN: usize = 64 << 20;

/// The engine. Dropping the last handle ends the writer thread after what was queued is durable.
pub struct Embedded {
    shared: Arc<Shared>,
    queue: Option<std_mpsc::Sender<Request>>,
    writer: Option<std::thread::JoinHandle<()>>,
    /// The folder's lock, let go of when this is dropped.
    _lock: std::fs::File,
}

struct Shared {
    state: RwLock<State>,
    /// To be locked before the state.
    watchers: Mutex<Vec<Weak<Watcher>>>,
    revision: AtomicU64,
    disk_bytes: AtomicU64,
}

struct Request {
    txn: Txn,
    answer: oneshot::Sender<Result<TxnOutcome, Error>>,
}

impl Shared {
    // A panic while the lock was held leaves the state as of the last whole batch: it can be read on.
    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }
    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
    fn watchers(&self) -> MutexGuard<'_, Vec<Weak<Watcher>>> {
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Embedded {
    /// Opens the store in a folder, which is made if need be, and recovers what was acknowledged.
    pub fn open(dir: &Path, options: Options) -> Result<Arc<Self>, Error> {
        Self::open_on(dir, options, Arc::new(RealDisk))
    }

    pub(crate) fn open_on(
        dir: &Path,
        options: Options,
        disk: Arc<dyn Disk>,
    ) -> Result<Arc<Self>, Error> {
        let io = |what: &str, error: std::io::Error| {
            Error::Io(format!("could not {what} {}: {error}", dir.display()))
        };
        std::fs::create_dir_all(dir).map_err(|error| io("make", error))?;
        let lock = lock(dir)?;
        let retention = Retention {
            revisions: options.history_revisions,
            bytes: options.history_bytes,
        };
        let recovered = recover(dir, retention)?;
        let revision = recovered.state.revision;
        let path = recovered.active.clone();
        let file = disk
            .open(&path)
            .map_err(|error| io("open the log in", error))?;
        // The log's name must outlive a crash as surely as what is written to it.
        sync_dir(dir).map_err(|error| io("sync", error))?;
        let shared = Arc::new(Shared {
            revision: AtomicU64::new(revision),
            disk_bytes: AtomicU64::new(recovered.disk_bytes),
            state: RwLock::new(recovered.state),
            watchers: Mutex::new(Vec::new()),
        });
        let (queue, requests) = std_mpsc::channel();
        let mut writer = Writer {
            shared: shared.clone(),
            dir: dir.to_path_buf(),
            disk,
            file,
            length: recovered.active_length,
            // A torn tail, or a file without a header, is put right before the first write.
            dirty: true,
            retention,
            snapshot_bytes: options.snapshot_bytes,
            log_bytes: recovered.log_bytes,
            snapshot: None,
        };
        let thread = std::thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || writer.run(requests))
            .map_err(|error| io("start the writer of", error))?;
        Ok(Arc::new(Self {
            shared,
            queue: Some(queue),
            writer: Some(thread),
            _lock: lock,
        }))
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            error!("the store's writer had panicked");
        }
        for watcher in self.shared.watchers().drain(..) {
            watcher.upgrade().inspect(|watcher| watcher.close());
        }
    }
}

#[async_trait::async_trait]
impl Store for Embedded {
    fn revision(&self) -> Revision {
        self.shared.revision.load(Ordering::Acquire)
    }

    async fn get(&self, key: &[u8]) -> Result<Option<KeyValue>, Error> {
        Ok(self.shared.read().keys.get(key).cloned())
    }

    async fn range(&self, request: RangeRequest) -> Result<RangeResponse, Error> {
        self.shared.read().range(&request)
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, Error> {
        let size = txn.size();
        if size > LARGEST_TXN {
            return Err(Error::Unwritable(format!(
                "a transaction of {size} bytes is larger than {LARGEST_TXN}; split it"
            )));
        }
        let (answer, outcome) = oneshot::channel();
        let stopped =
            || Error::Unwritable("the store's writer has ended; restart the process".into());
        let queue = self.queue.as_ref().ok_or_else(stopped)?;
        queue.send(Request { txn, answer }).map_err(|_| stopped())?;
        outcome.await.map_err(|_| stopped())?
    }

    async fn watch(
        &self,
        keys: Range<Bytes>,
        from: Revision,
    ) -> Result<BoxStream<'static, Result<WatchBatch, Error>>, Error> {
        let mut watchers = self.shared.watchers();
        // Under this lock nothing is committed: the watcher is told of all that the history does not have yet.
        let pending = {
            let state = self.shared.read();
            state.check_watch(from)?;
            if from <= state.revision {
                from.max(1)
            } else {
                0
            }
        };
        let watcher = Arc::new(Watcher::new(keys, pending));
        watchers.push(Arc::downgrade(&watcher));
        drop(watchers);
        let shared = self.shared.clone();
        Ok(watcher
            .changes(move |keys, from| shared.read().since(keys, from, PULL))
            .boxed())
    }

    async fn compact(&self, revision: Revision) -> Result<(), Error> {
        let mut state = self.shared.write();
        if revision > state.revision {
            return Err(Error::Future {
                requested: revision,
                current: state.revision,
            });
        }
        state.forget_through(revision);
        Ok(())
    }

    fn size_on_disk(&self) -> u64 {
        self.shared.disk_bytes.load(Ordering::Relaxed)
    }
}

/// Takes the folder's lock; the kernel lets go of it however the process ends.
fn lock(dir: &Path) -> Result<std::fs::File, Error> {
    let path = dir.join("lock");
    let file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|error| Error::Io(format!("could not open {}: {error}", path.display())))?;
    // SAFETY: the descriptor is open for as long as `file` lives, and flock(2) touches no memory of ours.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
        let error = std::io::Error::last_os_error();
        return Err(Error::Io(format!(
            "{} is in use by another process ({error})",
            dir.display()
        )));
    }
    Ok(file)
}

struct Recovered {
    state: State,
    active: PathBuf,
    active_length: u64,
    log_bytes: u64,
    disk_bytes: u64,
}

/// Names of log files carry the first revision that may be in them; snapshots the one that they hold.
fn log_path(dir: &Path, first: Revision) -> PathBuf {
    dir.join(format!("log-{first:020}"))
}

fn snapshot_path(dir: &Path, revision: Revision) -> PathBuf {
    dir.join(format!("snapshot-{revision:020}"))
}

/// Files with this prefix, by their number.
fn numbered(dir: &Path, prefix: &str) -> Result<Vec<(u64, PathBuf)>, Error> {
    let io =
        |error: std::io::Error| Error::Io(format!("could not list {}: {error}", dir.display()));
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = entry.file_name();
        if let Some(number) = name
            .to_str()
            .and_then(|name| name.strip_prefix(prefix))
            .and_then(|n| n.parse().ok())
        {
            found.push((number, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

fn length_of(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// Reads the newest snapshot and the log after it.
fn recover(dir: &Path, retention: Retention) -> Result<Recovered, Error> {
    let mut state = State::default();
    let mut disk_bytes = 0;
    // A snapshot gets its name only when it is whole and durable.
    if let Some((revision, path)) = numbered(dir, "snapshot-")?.pop() {
        disk_bytes += length_of(&path);
        for entry in log::read(&path, false)?.entries {
            state.load(entry);
        }
        if state.revision != revision {
            return Err(Error::Corrupt(format!(
                "{} ends at revision {}",
                path.display(),
                state.revision
            )));
        }
    }
    let logs = numbered(dir, "log-")?;
    let (mut active, mut active_length, mut log_bytes) = (log_path(dir, state.revision + 1), 0, 0);
    for (index, (_, path)) in logs.iter().enumerate() {
        let contents = log::read(path, index + 1 == logs.len())?;
        if contents.torn {
            warn!(file = %path.display(), "dropping the end of a write that was cut off and never acknowledged");
        }
        for entry in contents.entries {
            if entry.revision <= state.revision {
                continue;
            }
            if entry.revision != state.revision + 1 {
                return Err(Error::Corrupt(format!(
                    "{}: revision {} follows {}; restore the folder from a backup",
                    path.display(),
                    entry.revision,
                    state.revision
                )));
            }
            state.apply(entry);
            state.trim(retention);
        }
        log_bytes += contents.valid;
        (active, active_length) = (path.clone(), contents.valid);
    }
    info!(
        revision = state.revision,
        keys = state.keys.len(),
        "store recovered"
    );
    Ok(Recovered {
        disk_bytes: disk_bytes + log_bytes,
        state,
        active,
        active_length,
        log_bytes,
    })
}

/// The one thread that writes.
struct Writer {
    shared: Arc<Shared>,
    dir: PathBuf,
    disk: Arc<dyn Disk>,
    file: Box<dyn LogFile>,
    /// Durable length of the active file.
    length: u64,
    /// The file may hold more than `length`: it is cut back before the next write.
    dirty: bool,
    retention: Retention,
    snapshot_bytes: u64,
    /// Bytes of all log files since the last snapshot.
    log_bytes: u64,
    snapshot: Option<std::thread::JoinHandle<Result<u64, Error>>>,
}

impl Writer {
    fn run(&mut self, requests: std_mpsc::Receiver<Request>) {
        while let Ok(first) = requests.recv() {
            let mut batch = vec![first];
            let mut bytes = batch[0].txn.size();
            while bytes < BATCH_BYTES {
                let Ok(next) = requests.try_recv() else { break };
                bytes += next.txn.size();
                batch.push(next);
            }
            self.commit(batch);
            self.maintain();
        }
        if let Some(snapshot) = self.snapshot.take() {
            let _ = snapshot.join();
        }
    }

    /// Decides each transaction in order, makes all that hold durable with one write, then shows and answers them.
    fn commit(&mut self, batch: Vec<Request>) {
        let mut entries = Vec::new();
        let mut answers = Vec::with_capacity(batch.len());
        {
            let state = self.shared.read();
            let mut pending: HashMap<Bytes, Option<KeyValue>> = HashMap::new();
            let mut revision = state.revision;
            for Request { txn, answer } in batch {
                let current = |key: &Bytes| match pending.get(key) {
                    Some(pending) => pending.clone(),
                    None => state.keys.get(key).cloned(),
                };
                let failed = txn.compare.iter().find_map(|compare| {
                    let current = current(&compare.key);
                    let actual = current.as_ref().map_or(0, |kv| kv.mod_revision);
                    (actual != compare.mod_revision).then_some(current)
                });
                if let Some(current) = failed {
                    answers.push((answer, TxnOutcome::Conflict { current, revision }));
                    continue;
                }
                // What changes nothing takes no revision.
                let ops: Vec<Op> = txn
                    .ops
                    .into_iter()
                    .filter(|op| {
                        matches!(op, Op::Put { .. })
                            || matches!(op, Op::Delete { key } if current(key).is_some())
                    })
                    .collect();
                if ops.is_empty() {
                    answers.push((answer, TxnOutcome::Committed(revision)));
                    continue;
                }
                revision += 1;
                for op in &ops {
                    match op {
                        Op::Put { key, value } => {
                            let before = match pending.get(key) {
                                Some(pending) => pending.as_ref(),
                                None => state.keys.get(key),
                            };
                            let kv = KeyValue {
                                key: key.clone(),
                                value: value.clone(),
                                create_revision: before.map_or(revision, |kv| kv.create_revision),
                                mod_revision: revision,
                            };
                            pending.insert(key.clone(), Some(kv));
                        }
                        Op::Delete { key } => {
                            pending.insert(key.clone(), None);
                        }
                    }
                }
                entries.push(Entry {
                    revision,
                    ops: ops.into_iter().map(LoggedOp::from).collect(),
                });
                answers.push((answer, TxnOutcome::Committed(revision)));
            }
        }
        let outcome = if entries.is_empty() {
            Ok(())
        } else {
            self.write(&entries)
        };
        match outcome {
            Ok(()) => {
                self.publish(entries);
                for (answer, outcome) in answers {
                    // The caller may have gone away; what it asked for is done all the same.
                    let _ = answer.send(Ok(outcome));
                }
            }
            Err(error) => {
                // Later answers of the batch were decided on writes that did not happen.
                error!(%error, "a write was refused by the disk");
                for (answer, _) in answers {
                    let _ = answer.send(Err(Error::Unwritable(error.to_string())));
                }
            }
        }
    }

    /// Appends one record and syncs; after a failure nothing of it remains.
    fn write(&mut self, entries: &[Entry]) -> std::io::Result<()> {
        if self.dirty {
            self.file.truncate(self.length)?;
            self.dirty = false;
        }
        let mut buffer = BytesMut::new();
        if self.length == 0 {
            buffer.extend_from_slice(log::header());
        }
        log::encode(entries, &mut buffer);
        self.dirty = true;
        if let Err(error) = self.file.append(&buffer).and_then(|()| self.file.sync()) {
            // Cut back at once, so that the space comes free and a crash finds nothing unacknowledged;
            // if that fails too, it is tried again before the next write.
            if self.file.truncate(self.length).is_ok() {
                self.dirty = false;
            }
            return Err(error);
        }
        self.dirty = false;
        self.length += buffer.len() as u64;
        self.log_bytes += buffer.len() as u64;
        self.shared
            .disk_bytes
            .fetch_add(buffer.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Shows durable transactions to readers, then to watchers.
    fn publish(&self, entries: Vec<Entry>) {
        let Some(first) = entries.first().map(|entry| entry.revision) else {
            return;
        };
        let mut keys: Vec<Bytes> = entries
            .iter()
            .flat_map(|entry| entry.ops.iter().map(|op| op.key().clone()))
            .collect();
        keys.sort_unstable();
        let mut woken = Vec::new();
        {
            let mut watchers = self.shared.watchers();
            let mut state = self.shared.write();
            for entry in entries {
                state.apply(entry);
            }
            state.trim(self.retention);
            watchers.retain(|watcher| {
                let Some(watcher) = watcher.upgrade() else {
                    return false;
                };
                if watcher.touch(&keys, first) {
                    woken.push(watcher);
                }
                true
            });
            // Whoever sees this revision may rely on every watcher having been told of it.
            self.shared
                .revision
                .store(state.revision, Ordering::Release);
        }
        woken.iter().for_each(|watcher| watcher.wake());
    }

    /// Starts a snapshot when the log has grown too long, and removes what a finished one made superfluous.
    fn maintain(&mut self) {
        if let Some(snapshot) = self.snapshot.take_if(|thread| thread.is_finished()) {
            match snapshot.join() {
                Ok(Ok(revision)) => self.remove_before(revision),
                Ok(Err(error)) => warn!(%error, "could not write a snapshot; the log is kept"),
                Err(_) => error!("writing a snapshot panicked; the log is kept"),
            }
        }
        let live = self.shared.read().live_bytes;
        // A file whose end could not be cut back must stay the last one: only there a bad end is forgiven.
        if self.dirty
            || self.snapshot.is_some()
            || self.log_bytes < self.snapshot_bytes.max(2 * live)
        {
            return;
        }
        let (keys, revision) = {
            let state = self.shared.read();
            (
                state.keys.values().cloned().collect::<Vec<_>>(),
                state.revision,
            )
        };
        let path = log_path(&self.dir, revision + 1);
        let opened = self
            .disk
            .open(&path)
            .and_then(|file| sync_dir(&self.dir).map(|()| file));
        match opened {
            Ok(file) => {
                (self.file, self.length, self.log_bytes, self.dirty) = (file, 0, 0, true);
                let dir = self.dir.clone();
                let thread = std::thread::Builder::new()
                    .name("store-snapshot".into())
                    .spawn(move || write_snapshot(&dir, keys, revision).map(|()| revision));
                match thread {
                    Ok(thread) => self.snapshot = Some(thread),
                    Err(error) => warn!(%error, "could not start a snapshot; the log is kept"),
                }
            }
            Err(error) => warn!(%error, "could not start a new log file; the old one goes on"),
        }
    }

    /// Removes snapshots and logs that the snapshot at `revision` replaces.
    fn remove_before(&mut self, revision: Revision) {
        let old = |prefix: &str, below: u64| {
            numbered(&self.dir, prefix)
                .unwrap_or_default()
                .into_iter()
                .filter(move |(number, _)| *number < below)
        };
        // The log that begins right after the snapshot is the first that is still needed.
        for (_, path) in old("snapshot-", revision).chain(old("log-", revision + 1)) {
            if let Err(error) = std::fs::remove_file(&path) {
                warn!(file = %path.display(), %error, "could not remove an old file");
            }
        }
        let bytes = ["snapshot-", "log-"]
            .iter()
            .flat_map(|prefix| numbered(&self.dir, prefix).unwrap_or_default())
            .map(|(_, path)| length_of(&path))
            .sum();
        self.shared.disk_bytes.store(bytes, Ordering::Relaxed);
    }
}

/// Writes every key as it stood at `revision`, under its final name only when it is durable.
fn write_snapshot(dir: &Path, keys: Vec<KeyValue>, revision: Revision) -> Result<(), Error> {
    use std::io::Write;
    let path = snapshot_path(dir, revision);
    let temporary = dir.join("snapshot.tmp");
    let write = || -> std::io::Result<()> {
        let mut file = std::io::BufWriter::new(std::fs::File::create(&temporary)?);
        file.write_all(log::header())?;
        let mut chunks = keys.chunks(1024).peekable();
        // An empty store has a snapshot with one empty entry, which says its revision.
        let mut first = true;
        while first || chunks.peek().is_some() {
            first = false;
            let state = |kv: &KeyValue| LoggedOp::State {
                key: kv.key.clone(),
                value: kv.value.clone(),
                create_revision: kv.create_revision,
                mod_revision: kv.mod_revision,
            };
            let ops = chunks
                .next()
                .unwrap_or_default()
                .iter()
                .map(state)
                .collect();
            let mut buffer = BytesMut::new();
            log::encode(&[Entry { revision, ops }], &mut buffer);
            file.write_all(&buffer)?;
        }
        file.into_inner()
            .map_err(std::io::IntoInnerError::into_error)?
            .sync_all()?;
        std::fs::rename(&temporary, &path)?;
        sync_dir(dir)
    };
    write().map_err(|error| Error::Io(format!("could not write {}: {error}", path.display())))
}

impl Txn {
    /// Bytes that it brings to the log, about.
    fn size(&self) -> usize {
        let op = |op: &Op| match op {
            Op::Put { key, value } => key.len() + value.len() + 16,
            Op::Delete { key } => key.len() + 16,
        };
        self.ops.iter().map(op).sum()
    }
}
