//! Runs one piece of `libcontainer` work in a forked child, so that neither its
//! waits, its process-wide settings nor its memory touch the shim.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::fcntl::OFlag;
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::unistd::{ForkResult, Pid, fork, pipe2};
use serde::{Deserialize, Serialize};

/// What a helper found out.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Outcome {
    /// Done; the PID of the process it started, or 0.
    Done(i32),
    /// Not done, and why.
    Failed(String),
}

/// A running helper.
pub(crate) struct Helper {
    /// Its PID.
    pub(crate) pid: Pid,
    result: OwnedFd,
}

impl Helper {
    /// Forks and runs `work` in the child.
    ///
    /// The shim becomes the parent of what the helper started once the helper
    /// has ended, because the shim is a subreaper.
    pub(crate) fn run(work: impl FnOnce() -> anyhow::Result<i32>) -> io::Result<Self> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
        // SAFETY: the shim has one thread, so the child may use any function.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok(Self {
                pid: child,
                result: read,
            }),
            ForkResult::Child => {
                drop(read);
                // Containers must not start with the shim's blocked SIGCHLD.
                let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
                crate::errors::clear();
                let outcome = match std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)) {
                    Ok(Ok(pid)) => Outcome::Done(pid),
                    Ok(Err(err)) => Outcome::Failed(match crate::errors::first() {
                        Some(cause) => format!("{err:#}: {cause}"),
                        None => format!("{err:#}"),
                    }),
                    Err(_) => Outcome::Failed("the container library panicked".to_owned()),
                };
                let mut text = serde_json::to_vec(&outcome).unwrap_or_default();
                // A pipe takes this much without a reader.
                if text.len() > 32 * 1024 {
                    text = br#"{"Failed":"the error is too long; see the shim's log"}"#.to_vec();
                }
                let _ = std::fs::File::from(write).write_all(&text);
                // SAFETY: ends this process without running the shim's exit code.
                unsafe { libc::_exit(0) }
            }
        }
    }

    /// Reads the outcome; call when the helper has ended.
    pub(crate) fn outcome(self) -> Outcome {
        // A process that the helper started may still hold the pipe for a moment
        // (until its exec), so take what is there and don't wait for the end.
        // SAFETY: plain fcntl on a descriptor that this value owns.
        unsafe { libc::fcntl(self.result.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
        let mut text = vec![0; 40 * 1024];
        let read = std::fs::File::from(self.result).read(&mut text);
        match read {
            Ok(n) if n > 0 => serde_json::from_slice(&text[..n]).unwrap_or_else(|err| {
                Outcome::Failed(format!("the helper's answer is not readable: {err}"))
            }),
            _ => Outcome::Failed(
                "the helper process ended without an answer; see the shim's log".to_owned(),
            ),
        }
    }
}
