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

/// Has the C library give back what is free, wherever it lies, in two seconds; once for all who ask until then. Outside
/// of a runtime, nothing is done.
pub(crate) fn give_back_soon() {
    let Ok(runtime) = Handle::try_current() else {
        return;
    };
    if MEANT.swap(true, Ordering::AcqRel) {
        return;
    }
    runtime.spawn(async {
        tokio::time::sleep(SOON).await;
        MEANT.store(false, Ordering::Release);
        // It looks through all heaps, which takes some milliseconds.
        tokio::task::spawn_blocking(|| {
            // SAFETY: the function has no preconditions (malloc_trim(3)).
            let gave = unsafe { libc::malloc_trim(0) };
            tracing::debug!(gave = gave != 0, "free memory was given back");
        });
    });
}
