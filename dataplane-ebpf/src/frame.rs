//! A frame as the hooks see it: tc through the kernel's helpers, XDP by its bytes.

use core::ptr::{read_unaligned, write_unaligned};

use aya_ebpf::programs::{TcContext, XdpContext};

/// `BPF_F_PSEUDO_HDR`: the field is part of the pseudo header.
const PSEUDO: u64 = 0x10;
/// `BPF_F_MARK_MANGLED_0`: a UDP checksum of 0 means none, and stays.
const ZERO_STAYS: u64 = 0x20;

/// Headers end before this: the verifier wants to know of a bound.
const FURTHEST: usize = 256;

/// What a field means to a transport's checksum.
#[derive(Clone, Copy)]
pub struct Field {
    /// Bytes of the field: 2 or 4.
    pub size: u64,
    /// Whether it is part of the pseudo header alone.
    pub pseudo: bool,
    /// Whether a checksum of 0 means none.
    pub udp: bool,
}

/// Reading and changing a frame. Offsets count from the Ethernet header; none means beyond its end.
pub trait Frame {
    /// Where the bytes that are at hand begin and end.
    fn bounds(&self) -> (usize, usize);

    /// Reads a value.
    fn load<T: Copy>(&self, at: usize) -> Option<T>;

    /// Writes a value.
    fn store<T: Copy>(&self, at: usize, value: &T) -> Option<()>;

    /// Mends the IPv4 header's checksum at `at` for four bytes that change.
    fn mend_ip(&self, at: usize, old: u32, new: u32) -> Option<()>;

    /// Mends a transport's checksum at `at` for a field that changes.
    fn mend_transport(&self, at: usize, old: u32, new: u32, field: Field) -> Option<()>;
}

impl Frame for TcContext {
    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        (self.data(), self.data_end())
    }

    #[inline(always)]
    fn load<T: Copy>(&self, at: usize) -> Option<T> {
        self.skb.load(at).ok()
    }

    #[inline(always)]
    fn store<T: Copy>(&self, at: usize, value: &T) -> Option<()> {
        self.skb.store(at, value, 0).ok()
    }

    #[inline(always)]
    fn mend_ip(&self, at: usize, old: u32, new: u32) -> Option<()> {
        self.l3_csum_replace(at, u64::from(old), u64::from(new), 4)
            .ok()
    }

    #[inline(always)]
    fn mend_transport(&self, at: usize, old: u32, new: u32, field: Field) -> Option<()> {
        let mut flags = field.size;
        if field.pseudo {
            flags |= PSEUDO;
        }
        if field.udp {
            flags |= ZERO_STAYS;
        }
        self.l4_csum_replace(at, u64::from(old), u64::from(new), flags)
            .ok()
    }
}

/// The place of a value within the bytes that are at hand.
#[inline(always)]
fn place<T>(ctx: &XdpContext, at: usize) -> Option<*mut T> {
    let (start, end) = ctx.bounds();
    if at > FURTHEST || start + at + size_of::<T>() > end {
        return None;
    }
    Some((start + at) as *mut T)
}

/// A checksum after bytes that it covers changed (RFC 1624, equation 3).
#[inline(always)]
pub fn mended(checksum: u16, old: u32, new: u32) -> u16 {
    let mut sum = u64::from(!u32::from(checksum)) + u64::from(!old) + u64::from(new);
    sum = (sum & 0xffff_ffff) + (sum >> 32);
    // Three times: two could leave a carry.
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

impl Frame for XdpContext {
    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        (self.data(), self.data_end())
    }

    #[inline(always)]
    fn load<T: Copy>(&self, at: usize) -> Option<T> {
        let place = place::<T>(self, at)?;
        // SAFETY: the place was checked against the frame's end.
        Some(unsafe { read_unaligned(place) })
    }

    #[inline(always)]
    fn store<T: Copy>(&self, at: usize, value: &T) -> Option<()> {
        let place = place::<T>(self, at)?;
        // SAFETY: the place was checked against the frame's end.
        unsafe { write_unaligned(place, *value) };
        Some(())
    }

    #[inline(always)]
    fn mend_ip(&self, at: usize, old: u32, new: u32) -> Option<()> {
        let checksum: u16 = self.load(at)?;
        self.store(at, &mended(checksum, old, new))
    }

    #[inline(always)]
    fn mend_transport(&self, at: usize, old: u32, new: u32, field: Field) -> Option<()> {
        let checksum: u16 = self.load(at)?;
        if field.udp && checksum == 0 {
            return Some(());
        }
        // Of two bytes, the upper half of a word is 0 before and after.
        let mut checksum = mended(checksum, old, new);
        if field.udp && checksum == 0 {
            checksum = 0xffff;
        }
        self.store(at, &checksum)
    }
}
