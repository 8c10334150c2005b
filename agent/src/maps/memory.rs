//! The memory of an array map, which the kernel shares with us (`BPF_F_MMAPABLE`).

use std::io::{Error, Result};
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;

/// Memory that is mapped until the value is dropped. Programs read and write it meanwhile.
pub(crate) struct Memory {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the memory stays where it is until the value is dropped; who reads or writes it by `start` sees to the rest.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this length, and what points into it lives no longer than this.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

impl Memory {
    /// The first so many bytes of a map's values; the rest of the last page with them.
    pub fn of(map: impl AsFd, length: usize) -> Result<Self> {
        let length = length.next_multiple_of(4096);
        // SAFETY: a new mapping at a place of the kernel's choice touches nothing of ours.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_fd().as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(Error::other("it is at no address"))?;
        Ok(Self { start, length })
    }

    /// Where it begins: at a page.
    pub fn start(&self) -> NonNull<u8> {
        self.start
    }
}
