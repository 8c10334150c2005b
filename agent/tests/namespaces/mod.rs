//! Network namespaces of tests: they go with the test, however it ends.
#![allow(dead_code, reason = "not every test needs all of it")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use nix::sched::{CloneFlags, setns, unshare};

/// Whether to leave a test out, for want of root.
pub fn left_out() -> bool {
    if nix::unistd::geteuid().is_root() {
        return false;
    }
    eprintln!("left out: this test needs root");
    true
}

/// A network namespace that nothing but this holds.
pub struct Namespace(File);

impl Namespace {
    pub fn new() -> Self {
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            File::open("/proc/thread-self/ns/net").unwrap()
        };
        Self(std::thread::spawn(make).join().unwrap())
    }

    /// As container runtimes name namespaces.
    pub fn path(&self) -> PathBuf {
        let path = format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd());
        path.into()
    }

    /// Runs on a thread in it.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&self.0, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            match thread.join() {
                Ok(done) => done,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Runs asynchronously on a thread in it.
    pub fn block_on<T: Send>(&self, work: impl AsyncFnOnce() -> T + Send) -> T {
        self.within(|| {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap()
                .block_on(work())
        })
    }
}
