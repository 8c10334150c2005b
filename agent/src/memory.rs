//! Gives back memory that nobody holds any more.
//!
//! A listing of many objects takes several times what is kept of it, in pieces that lie between those that are. The C
//! library hands back only what is free at the end of a heap, so the rest would stay the process's for ever.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::runtime::Handle;

/// After a listing: others begin with it, and what it led to is done by then.
const SOON: Duration = Duration::from_secs(2);

/// It will be done.
static MEANT: AtomicBool = AtomicBool::new(false);

/// It is done, or its runtime ended before.
struct Done;

impl Drop for Done {
    fn drop(&mut self) {
        MEANT.store(false, Ordering::Release);
    }
}

/// Has the C library give back what is free, wherever it lies, in two seconds; once for all who ask until then. Outside
/// of a runtime, nothing is done.
pub(crate) fn give_back_soon() {
    let Ok(runtime) = Handle::try_current() else {
        return;
    };
    if MEANT.swap(true, Ordering::AcqRel) {
        return;
    }
    let done = Done;
    runtime.spawn(async move {
        tokio::time::sleep(SOON).await;
        drop(done);
        // It looks through all heaps, which takes some milliseconds.
        tokio::task::spawn_blocking(|| {
            // SAFETY: the function has no preconditions (malloc_trim(3)).
            let gave = unsafe { libc::malloc_trim(0) };
            tracing::debug!(gave = gave != 0, "free memory was given back");
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of memory that are this process's own.
    fn own() -> u64 {
        let text = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
        let line = text.lines().find(|line| line.starts_with("Anonymous:"));
        let line = line.unwrap_or_else(|| panic!("{text}"));
        line.split_whitespace()
            .nth(1)
            .unwrap()
            .parse::<u64>()
            .unwrap()
            << 10
    }

    #[test]
    fn what_lies_free_between_what_is_held_is_given_back() {
        const PIECE: usize = 1 << 10;
        const PIECES: usize = 64 << 10;
        let pieces: Vec<Vec<u8>> = (0..PIECES).map(|_| vec![1; PIECE]).collect();
        // One of sixteen stays, so that no heap has a free end.
        let kept: Vec<Vec<u8>> = pieces.into_iter().skip(15).step_by(16).collect();
        let before = own();
        let runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = { runtime }.enable_all().build().unwrap();
        runtime.block_on(async {
            give_back_soon();
            give_back_soon();
            let begun = std::time::Instant::now();
            while own() + (PIECE * PIECES / 2) as u64 > before {
                assert!(
                    begun.elapsed() < 20 * SOON,
                    "{before} before, {} now",
                    own()
                );
                tokio::time::sleep(SOON / 10).await;
            }
        });
        assert_eq!(kept.len(), PIECES / 16);
        // Where nothing runs, nothing is done, and asking is no fault.
        give_back_soon();
    }
}
