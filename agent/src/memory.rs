//! How the C library keeps this process's memory.

/// Has all threads of this process share one heap, and hands back what is free at its end as soon as that is much: a
/// heap of each thread's own would stay as large as a listing of all objects once made it, which is several times what is
/// kept of them (the benchmark `service-sync` measures it). To be called before other threads are there. Tasks of an
/// agent seldom allocate at the same moment, so they hardly wait for each other.
pub fn share_one_heap() {
    /// What the C library begins with; set, it does not grow with what was freed.
    const MUCH: i32 = 128 << 10;
    // SAFETY: the parameters are the library's own, and their values in range (mallopt(3)); refused, they change nothing.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, MUCH);
    }
}
