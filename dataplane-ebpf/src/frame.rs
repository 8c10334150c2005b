//! A frame as the hooks see it: its bytes at hand, and its checksums through the kernel's helpers or by hand.

use core::ptr::{read_unaligned, read_volatile, write_volatile};

use aya_ebpf::helpers::generated::bpf_l4_csum_replace;
use aya_ebpf::programs::{TcContext, XdpContext};
use xebec_dataplane_common::ip::Ip;

/// `BPF_F_PSEUDO_HDR`: what changed is part of the pseudo header.
const PSEUDO: u64 = 0x10;
/// `BPF_F_MARK_MANGLED_0`: a UDP checksum of 0 means none, and stays.
const ZERO_STAYS: u64 = 0x20;
/// `BPF_F_IPV6`: no header checksum makes up for a changed address. Kernels before 6.16 don't know it.
const IPV6: u64 = 0x80;

/// Headers end before this: the verifier wants to know of a bound.
pub const FURTHEST: usize = 256;

/// What a change means to a transport's checksum.
#[derive(Clone, Copy)]
pub struct Change {
    /// Sum of the new minus that of the old, as [`difference`] gives it.
    pub by: u32,
    /// Whether it is part of the pseudo header alone.
    pub pseudo: bool,
    /// Whether a checksum of 0 means none.
    pub udp: bool,
    /// Whether the packet is IPv6.
    pub v6: bool,
}

/// Adds what a change of four bytes does to a checksum (RFC 1624).
#[inline(always)]
pub fn differ(sum: u64, old: u32, new: u32) -> u64 {
    sum + u64::from(!old) + u64::from(new)
}

/// The same of an address.
#[inline(always)]
pub fn differ_ip(sum: u64, old: &Ip, new: &Ip) -> u64 {
    let mut sum = differ(sum, old.0[3], new.0[3]);
    // Of IPv4 all other words are alike.
    if !old.is_v4() || !new.is_v4() {
        sum = differ(sum, old.0[0], new.0[0]);
        sum = differ(sum, old.0[1], new.0[1]);
        sum = differ(sum, old.0[2], new.0[2]);
    }
    sum
}

/// A sum of differences in 32 bits, as checksum helpers take it.
#[inline(always)]
pub fn difference(sum: u64) -> u32 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    ((sum & 0xffff_ffff) + (sum >> 32)) as u32
}

/// A checksum after bytes that it covers changed (RFC 1624, equation 3).
#[inline(always)]
pub fn mended(checksum: u16, by: u32) -> u16 {
    let mut sum = u64::from(!checksum) + u64::from(by);
    // Three times: two could leave a carry.
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

/// Reading and changing a frame. Offsets count from the Ethernet header; none means beyond its end.
pub trait Frame {
    /// Where the bytes that are at hand begin and end.
    fn bounds(&self) -> (usize, usize);

    /// Mends a transport's checksum at `at`.
    fn mend_transport(&self, at: usize, change: Change) -> Option<()>;

    /// Writes a value of whole words of two bytes over bytes that are at hand. The kernel makes the packet this program's own before it starts,
    /// where it is shared; what it sums up of a packet that came in does not change, because a header's own checksum
    /// makes up for it, or a transport's, which is mended by the kernel.
    #[inline(always)]
    fn write<T: Copy>(&self, at: usize, value: &T) -> Option<()> {
        self.header(at, size_of::<T>())?.set(0, value);
        Some(())
    }

    /// The place of some bytes, which may be read until the frame is changed.
    #[inline(always)]
    fn place(&self, at: usize, size: usize) -> Option<usize> {
        let (start, end) = self.bounds();
        // No header lies so far behind that this changes anything. LLVM would compare what a sum was made of instead of
        // the sum, and verifiers before Linux 6.8 or so learn of the compared register alone.
        let at = at & (2 * FURTHEST - 1);
        if at > FURTHEST || start + at + size > end {
            return None;
        }
        Some(start + at)
    }

    /// A header of this many bytes. Checked once and read from one place: of a check for each field LLVM makes
    /// comparisons that the verifier can't follow.
    #[inline(always)]
    fn header(&self, at: usize, size: usize) -> Option<Header> {
        Some(Header(self.place(at, size)?))
    }

    /// Reads a value of 2 or 4 bytes.
    #[inline(always)]
    fn read<T: Copy>(&self, at: usize) -> Option<T> {
        Some(self.header(at, size_of::<T>())?.at(0))
    }
}

/// A header's first byte. Callers read and write what they asked for when they got it, before a helper changes the
/// frame.
#[derive(Clone, Copy)]
pub struct Header(usize);

impl Header {
    /// A value of 1, 2 or 4 bytes.
    #[inline(always)]
    pub fn at<T: Copy>(self, offset: usize) -> T {
        // SAFETY: the place was checked against the frame's end. The kernel loads programs without strict alignment
        // where the CPU has efficient unaligned access, and otherwise checks it; `read_unaligned` would make a load
        // of each byte.
        unsafe { read_volatile((self.0 + offset) as *const T) }
    }

    /// Writes a value of whole words of two bytes.
    #[inline(always)]
    pub fn set<T: Copy>(self, offset: usize, value: &T) {
        let (size, from) = (size_of::<T>(), value as *const T as usize);
        let to = self.0 + offset;
        let mut done = 0;
        // SAFETY: as in `at`.
        unsafe {
            while done + 4 <= size {
                let word = read_unaligned((from + done) as *const u32);
                write_volatile((to + done) as *mut u32, word);
                done += 4;
            }
            if done + 2 <= size {
                let word = read_unaligned((from + done) as *const u16);
                write_volatile((to + done) as *mut u16, word);
            }
        }
    }

    /// An IPv6 address.
    #[inline(always)]
    pub fn ip(self, offset: usize) -> Ip {
        Ip([
            self.at(offset),
            self.at(offset + 4),
            self.at(offset + 8),
            self.at(offset + 12),
        ])
    }
}

impl Frame for TcContext {
    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        (self.data(), self.data_end())
    }

    #[inline(always)]
    fn mend_transport(&self, at: usize, change: Change) -> Option<()> {
        // A size of 0 tells that the change is a difference.
        let mut flags = 0;
        if change.pseudo {
            flags |= PSEUDO;
        }
        if change.udp {
            flags |= ZERO_STAYS;
        }
        let by = u64::from(change.by);
        // SAFETY: the context is the one that the kernel gave.
        let mend = |flags| unsafe { bpf_l4_csum_replace(self.skb.skb, at as u32, 0, by, flags) };
        if change.v6 && change.pseudo && mend(flags | IPV6) == 0 {
            return Some(());
        }
        if mend(flags) == 0 { Some(()) } else { None }
    }
}

impl Frame for XdpContext {
    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        (self.data(), self.data_end())
    }

    #[inline(always)]
    fn mend_transport(&self, at: usize, change: Change) -> Option<()> {
        let checksum: u16 = self.read(at)?;
        if change.udp && checksum == 0 {
            return Some(());
        }
        let mut checksum = mended(checksum, change.by);
        if change.udp && checksum == 0 {
            checksum = 0xffff;
        }
        self.write(at, &checksum)
    }
}
