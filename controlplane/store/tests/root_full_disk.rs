//! A disk that is really full: a small tmpfs. Needs root, to mount it.

use std::path::Path;
use std::process::Command;

use bytes::Bytes;
use xebec_store::{Embedded, Error, Op, Options, RangeRequest, Store, Txn};

/// A mounted tmpfs that goes away also when the test fails.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(size: &str) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "xebec-store"])
            .arg(dir.path())
            .status()
            .expect("mount(8) is installed");
        assert!(status.success(), "could not mount a tmpfs");
        Self(dir)
    }
    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

fn key(n: u64) -> Bytes {
    Bytes::from(format!("/k/{n:06}"))
}

fn put(n: u64) -> Txn {
    let value = Bytes::from(vec![b'x'; 4000]);
    Txn {
        compare: Vec::new(),
        ops: vec![Op::Put { key: key(n), value }],
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn root_a_full_disk_refuses_writes_loses_nothing_and_recovers() {
    // SAFETY: geteuid(2) has no preconditions.
    if unsafe { libc::geteuid() } != 0 {
        println!("skipped: needs root to mount a tmpfs");
        return;
    }
    let disk = SmallDisk::mount("1m");
    let ballast = disk.path().join("ballast");
    std::fs::write(&ballast, vec![0u8; 256 << 10]).unwrap();
    let folder = disk.path().join("store");
    let store = Embedded::open(&folder, Options::default()).unwrap();
    // Many at once, so that the batch that does not fit holds several.
    let mut acknowledged = Vec::new();
    let mut refused = 0;
    for round in 0..50u64 {
        let tasks: Vec<_> = (0..8)
            .map(|client| {
                let store = store.clone();
                let n = round * 8 + client;
                tokio::spawn(async move { (n, store.txn(put(n)).await) })
            })
            .collect();
        for task in tasks {
            match task.await.unwrap() {
                (n, Ok(_)) => acknowledged.push(key(n)),
                (_, Err(Error::Unwritable(_))) => refused += 1,
                (n, Err(error)) => panic!("write {n}: {error}"),
            }
        }
    }
    assert!(
        refused > 0 && acknowledged.len() > 50,
        "{refused} refused, {} written",
        acknowledged.len()
    );
    let everything = || RangeRequest {
        keys: Bytes::from_static(b"/k/")..Bytes::from_static(b"/k0"),
        at: None,
        limit: 0,
    };
    let keys = |found: xebec_store::RangeResponse| -> Vec<Bytes> {
        found.kvs.into_iter().map(|kv| kv.key).collect()
    };
    acknowledged.sort();
    assert_eq!(keys(store.range(everything()).await.unwrap()), acknowledged);
    // A crash now leaves what was acknowledged and nothing else.
    drop(store);
    let store = Embedded::open(&folder, Options::default()).unwrap();
    assert_eq!(keys(store.range(everything()).await.unwrap()), acknowledged);
    std::fs::remove_file(&ballast).unwrap();
    store.txn(put(999_999)).await.unwrap();
    acknowledged.push(key(999_999));
    drop(store);
    let store = Embedded::open(&folder, Options::default()).unwrap();
    assert_eq!(keys(store.range(everything()).await.unwrap()), acknowledged);
}
