//! The engine against a plain model, with disks that fail and processes that die.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicI64, Ordering};

use super::*;
use crate::disk::{Disk, LogFile, RealDisk};
use futures::StreamExt;

fn key(n: u64) -> Bytes {
    Bytes::from(format!("/k/{n:03}"))
}

fn all() -> Range<Bytes> {
    Bytes::from_static(b"/k/")..Bytes::from_static(b"/k0")
}

fn put(n: u64, value: &str, expected: Option<Revision>) -> Txn {
    Txn {
        compare: expected
            .map(|mod_revision| Compare {
                key: key(n),
                mod_revision,
            })
            .into_iter()
            .collect(),
        ops: vec![Op::Put {
            key: key(n),
            value: Bytes::from(value.to_owned()),
        }],
    }
}

fn range_at(at: Option<Revision>) -> RangeRequest {
    RangeRequest {
        keys: all(),
        at,
        limit: 0,
    }
}

/// A small generator, so that a failing seed can be run again.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// Fails after a number of appended bytes, leaving what fitted.
struct FullDisk(std::sync::Arc<AtomicI64>);
struct FullFile(Box<dyn LogFile>, std::sync::Arc<AtomicI64>);

impl Disk for FullDisk {
    fn open(&self, path: &Path) -> io::Result<Box<dyn LogFile>> {
        Ok(Box::new(FullFile(RealDisk.open(path)?, self.0.clone())))
    }
}

impl LogFile for FullFile {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let left = self.1.fetch_sub(bytes.len() as i64, Ordering::SeqCst);
        if left < bytes.len() as i64 {
            self.1.fetch_add(bytes.len() as i64, Ordering::SeqCst);
            self.0.append(&bytes[..left.max(0) as usize])?;
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        self.0.append(bytes)
    }
    fn sync(&mut self) -> io::Result<()> {
        self.0.sync()
    }
    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.0.truncate(length)
    }
}

/// Syncs and cut-backs that fail while the switch is on.
struct BrokenDisk(std::sync::Arc<std::sync::atomic::AtomicBool>);
struct BrokenFile(
    Box<dyn LogFile>,
    std::sync::Arc<std::sync::atomic::AtomicBool>,
);

impl Disk for BrokenDisk {
    fn open(&self, path: &Path) -> io::Result<Box<dyn LogFile>> {
        Ok(Box::new(BrokenFile(RealDisk.open(path)?, self.0.clone())))
    }
}

impl BrokenFile {
    fn check(&self) -> io::Result<()> {
        if self.1.load(Ordering::SeqCst) {
            Err(io::Error::from_raw_os_error(libc::EIO))
        } else {
            Ok(())
        }
    }
}

impl LogFile for BrokenFile {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.append(bytes)
    }
    fn sync(&mut self) -> io::Result<()> {
        self.check()?;
        self.0.sync()
    }
    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.check()?;
        self.0.truncate(length)
    }
}

fn small() -> Options {
    Options {
        snapshot_bytes: 4096,
        history_revisions: 50,
        ..Options::default()
    }
}

#[tokio::test]
async fn agrees_with_a_plain_model_over_restarts_and_snapshots() {
    for seed in 1..=8u64 {
        let dir = tempfile::tempdir().unwrap();
        let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        // The model: the whole map at every revision.
        let mut model: Vec<BTreeMap<Bytes, (Bytes, Revision, Revision)>> = vec![BTreeMap::new()];
        let mut store = Embedded::open(dir.path(), small()).unwrap();
        for step in 0..600 {
            if random.below(60) == 0 {
                drop(store);
                store = Embedded::open(dir.path(), small()).unwrap();
            }
            let now = model.last().unwrap().clone();
            let target = random.below(20);
            let actual = now
                .get(&key(target))
                .map_or(0, |(_, _, modified)| *modified);
            let expected = match random.below(3) {
                0 => None,
                1 => Some(actual),
                _ => Some(random.below(step + 1)),
            };
            let mut txn = put(target, &format!("{step}"), expected);
            let delete = random.below(4) == 0;
            if delete {
                txn.ops = vec![Op::Delete { key: key(target) }];
            }
            let holds = expected.is_none_or(|expected| expected == actual);
            let mut then = now.clone();
            let revision = model.len() as Revision;
            let changes = holds && !(delete && actual == 0);
            if changes && delete {
                then.remove(&key(target));
            } else if changes {
                let created = now
                    .get(&key(target))
                    .map_or(revision, |(_, created, _)| *created);
                then.insert(
                    key(target),
                    (Bytes::from(format!("{step}")), created, revision),
                );
            }
            match store.txn(txn).await.unwrap() {
                TxnOutcome::Committed(at) => {
                    assert!(holds, "seed {seed} step {step}");
                    assert_eq!(
                        at,
                        if changes { revision } else { revision - 1 },
                        "seed {seed} step {step}"
                    );
                }
                TxnOutcome::Conflict { current, .. } => {
                    assert!(!holds, "seed {seed} step {step}");
                    assert_eq!(
                        current.map_or(0, |kv| kv.mod_revision),
                        actual,
                        "seed {seed} step {step}"
                    );
                }
            }
            if changes {
                model.push(then);
            }
            let at = random.below(model.len() as u64 + 2);
            let newest = model.len() as Revision - 1;
            let mut request = range_at(Some(at));
            request.keys.start = key(random.below(10));
            request.limit = random.below(8) as usize;
            let (start, limit) = (request.keys.start.clone(), request.limit);
            match store.range(request).await {
                Ok(found) => {
                    let count = found.count;
                    let found: Vec<_> = found
                        .kvs
                        .into_iter()
                        .map(|kv| (kv.key, (kv.value, kv.create_revision, kv.mod_revision)))
                        .collect();
                    let mut wanted: Vec<_> = model[at as usize]
                        .range(start..)
                        .map(|(key, state)| (key.clone(), state.clone()))
                        .collect();
                    assert_eq!(count, wanted.len(), "seed {seed} step {step} at {at}");
                    if limit > 0 {
                        wanted.truncate(limit);
                    }
                    assert_eq!(found, wanted, "seed {seed} step {step} at {at} of {newest}");
                }
                Err(Error::Future { .. }) => assert!(at > newest, "seed {seed} step {step}"),
                Err(Error::Compacted { .. }) => assert!(
                    at < newest,
                    "seed {seed} step {step}: the newest is always there"
                ),
                Err(error) => panic!("seed {seed} step {step}: {error}"),
            }
        }
        assert!(
            store.size_on_disk() < 3 * 4096 + 8192,
            "snapshots keep the log short: {}",
            store.size_on_disk()
        );
    }
}

#[tokio::test]
async fn a_crash_at_any_byte_loses_nothing_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path(), Options::default()).unwrap();
    let log = dir.path().join("log-00000000000000000001");
    let mut durable = Vec::new();
    for n in 0..12 {
        store.txn(put(n, "some value", None)).await.unwrap();
        durable.push(std::fs::metadata(&log).unwrap().len());
    }
    drop(store);
    let whole = std::fs::read(&log).unwrap();
    for cut in 0..=whole.len() {
        let crashed = tempfile::tempdir().unwrap();
        // What was not synced may be missing, or be there as garbage.
        for garbage in [0usize, 40] {
            let mut bytes = whole[..cut].to_vec();
            bytes.extend(std::iter::repeat_n(0xAB, garbage));
            std::fs::write(crashed.path().join(log.file_name().unwrap()), &bytes).unwrap();
            if cut < 8 && garbage > 0 {
                continue; // a foreign header is no store file: refused, below
            }
            let store = Embedded::open(crashed.path(), Options::default()).unwrap();
            let acknowledged = durable
                .iter()
                .filter(|length| **length <= cut as u64)
                .count() as u64;
            assert_eq!(store.revision(), acknowledged, "cut at {cut}");
            // It goes on from there, also over the garbage.
            assert!(
                matches!(store.txn(put(99, "next", None)).await.unwrap(), TxnOutcome::Committed(r) if r == acknowledged + 1)
            );
            drop(store);
            let store = Embedded::open(crashed.path(), Options::default()).unwrap();
            assert_eq!(store.revision(), acknowledged + 1, "cut at {cut}");
        }
    }
}

#[tokio::test]
async fn damage_in_the_middle_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path(), Options::default()).unwrap();
    for n in 0..5 {
        store.txn(put(n, "some value", None)).await.unwrap();
    }
    drop(store);
    let log = dir.path().join("log-00000000000000000001");
    let whole = std::fs::read(&log).unwrap();
    for at in 8..whole.len() - 60 {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        std::fs::write(&log, &bytes).unwrap();
        assert!(
            matches!(
                Embedded::open(dir.path(), Options::default()),
                Err(Error::Corrupt(_))
            ),
            "flipped at {at}"
        );
    }
}

#[tokio::test]
async fn a_full_disk_refuses_writes_and_recovers_when_there_is_space() {
    let dir = tempfile::tempdir().unwrap();
    let space = std::sync::Arc::new(AtomicI64::new(400));
    let store = Embedded::open_on(
        dir.path(),
        Options::default(),
        std::sync::Arc::new(FullDisk(space.clone())),
    )
    .unwrap();
    let mut acknowledged = 0;
    let refused = loop {
        match store.txn(put(acknowledged, "some value", None)).await {
            Ok(_) => acknowledged += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, Error::Unwritable(_)), "{refused}");
    assert!(acknowledged > 2);
    assert_eq!(
        store.range(range_at(None)).await.unwrap().count as u64,
        acknowledged,
        "reads go on"
    );
    space.store(1 << 20, Ordering::SeqCst);
    store.txn(put(500, "after", None)).await.unwrap();
    drop(store);
    let store = Embedded::open(dir.path(), Options::default()).unwrap();
    assert_eq!(
        store.range(range_at(None)).await.unwrap().count as u64,
        acknowledged + 1
    );
}

#[tokio::test]
async fn after_a_failed_sync_nothing_unacknowledged_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let broken = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let store = Embedded::open_on(
        dir.path(),
        Options::default(),
        std::sync::Arc::new(BrokenDisk(broken.clone())),
    )
    .unwrap();
    store.txn(put(1, "good", None)).await.unwrap();
    broken.store(true, Ordering::SeqCst);
    for _ in 0..3 {
        assert!(matches!(
            store.txn(put(2, "lost", None)).await,
            Err(Error::Unwritable(_))
        ));
    }
    broken.store(false, Ordering::SeqCst);
    store.txn(put(3, "good", None)).await.unwrap();
    drop(store);
    let store = Embedded::open(dir.path(), Options::default()).unwrap();
    let keys: Vec<Bytes> = store
        .range(range_at(None))
        .await
        .unwrap()
        .kvs
        .into_iter()
        .map(|kv| kv.key)
        .collect();
    assert_eq!(keys, [key(1), key(3)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_see_every_change_once_and_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path(), Options::default()).unwrap();
    let writers: Vec<_> = (0..4u64)
        .map(|writer| {
            let store = store.clone();
            tokio::spawn(async move {
                for n in 0..250 {
                    store.txn(put(writer, &format!("{n}"), None)).await.unwrap();
                }
            })
        })
        .collect();
    let mut watches = Vec::new();
    for from in [1, 1, 1] {
        let mut watch = store.watch(all(), from).await.unwrap();
        watches.push(tokio::spawn(async move {
            let mut seen = Vec::new();
            while seen.last() != Some(&1000) {
                seen.push(watch.next().await.unwrap().unwrap().revision);
            }
            seen
        }));
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    for writer in writers {
        writer.await.unwrap();
    }
    for watch in watches {
        assert_eq!(watch.await.unwrap(), (1..=1000).collect::<Vec<_>>());
    }
    // As much at once as is read in several goes; and the store's end is the watch's.
    let from_first = store.watch(all(), 1).await.unwrap();
    drop(store);
    let seen: Vec<_> = from_first
        .map(|batch| batch.unwrap().revision)
        .collect()
        .await;
    assert_eq!(seen, (1..=1000).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_slow_watcher_is_told_and_a_compacted_start_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(
        dir.path(),
        Options {
            history_revisions: 5,
            ..Options::default()
        },
    )
    .unwrap();
    let mut slow = store.watch(all(), 1).await.unwrap();
    let slower = store.watch(all(), 1).await.unwrap();
    let elsewhere = Bytes::from_static(b"/l/")..Bytes::from_static(b"/l0");
    let mut idle = store.watch(elsewhere, 1).await.unwrap();
    for n in 0..5 {
        store.txn(put(n, "v", None)).await.unwrap();
    }
    for expected in 1..=5 {
        assert_eq!(slow.next().await.unwrap().unwrap().revision, expected);
    }
    for n in 5..10 {
        store.txn(put(n, "v", None)).await.unwrap();
    }
    for expected in 6..=10 {
        assert_eq!(slow.next().await.unwrap().unwrap().revision, expected);
    }
    // The first five are beyond what history keeps.
    let got: Vec<_> = slower.collect().await;
    assert!(matches!(got[..], [Err(Error::Compacted { .. })]), "{got:?}");
    // Whose range nothing touched has missed nothing, however old its start.
    assert!(futures::FutureExt::now_or_never(idle.next()).is_none());
    assert!(matches!(
        store.watch(all(), 12).await.err(),
        Some(Error::Future { .. })
    ));
    store.compact(6).await.unwrap();
    assert!(matches!(
        store.watch(all(), 6).await.err(),
        Some(Error::Compacted { .. })
    ));
    let rest: Vec<_> = store
        .watch(all(), 7)
        .await
        .unwrap()
        .take(4)
        .map(|batch| batch.unwrap().revision)
        .collect()
        .await;
    assert_eq!(rest, [7, 8, 9, 10]);
    assert!(matches!(
        store.range(range_at(Some(5))).await,
        Err(Error::Compacted { .. })
    ));
    assert_eq!(store.range(range_at(Some(6))).await.unwrap().count, 6);
}

#[tokio::test]
async fn a_second_process_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path(), Options::default()).unwrap();
    assert!(matches!(
        Embedded::open(dir.path(), Options::default()),
        Err(Error::Io(_))
    ));
    drop(store);
    Embedded::open(dir.path(), Options::default()).unwrap();
}

#[tokio::test]
async fn a_new_store_can_be_watched_from_the_beginning() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path(), Options::default()).unwrap();
    let watch = store.watch(all(), 0).await.unwrap();
    store.txn(put(1, "v", None)).await.unwrap();
    let seen: Vec<_> = watch
        .take(1)
        .map(|batch| batch.unwrap().revision)
        .collect()
        .await;
    assert_eq!(seen, [1]);
}

#[tokio::test]
async fn a_file_that_could_not_be_cut_back_is_not_left_behind_by_a_rotation() {
    let dir = tempfile::tempdir().unwrap();
    // Nearly every write finds the log long enough for a snapshot, and often one still being written.
    let options = Options {
        snapshot_bytes: 1,
        ..Options::default()
    };
    for round in 0..60u64 {
        let broken = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let disk = std::sync::Arc::new(BrokenDisk(broken.clone()));
        let store = Embedded::open_on(dir.path(), options.clone(), disk).unwrap();
        for n in 0..3 {
            let value = format!("good {round} {n}");
            store.txn(put(1, &value, None)).await.unwrap();
        }
        broken.store(true, Ordering::SeqCst);
        for _ in 0..1 + round % 3 {
            std::thread::sleep(std::time::Duration::from_micros(300 * (round % 5)));
            store.txn(put(1, "lost", None)).await.unwrap_err();
        }
        broken.store(false, Ordering::SeqCst);
        let last = format!("end {round}");
        store.txn(put(1, &last, None)).await.unwrap();
        drop(store);
        let store = Embedded::open(dir.path(), Options::default()).unwrap();
        let found = store.get(&key(1)).await.unwrap().unwrap();
        assert_eq!(found.value, last, "round {round}");
        assert_eq!(store.revision(), 4 * (round + 1));
    }
}

#[tokio::test]
async fn a_transaction_that_could_not_be_read_back_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(dir.path(), Options::default()).unwrap();
    let mut txn = put(1, "", None);
    txn.ops = vec![Op::Put {
        key: key(1),
        value: Bytes::from(vec![0; 65 << 20]),
    }];
    assert!(matches!(store.txn(txn).await, Err(Error::Unwritable(_))));
    assert_eq!(store.revision(), 0);
}
