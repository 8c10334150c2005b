//! SCTP's checksum after a change at the packet's start: a CRC32c of all of it (RFC 9260, 6.8 and appendix A).
//!
//! A CRC is linear: that of the changed packet differs from the old one by the CRC of the difference, which is a few
//! bytes and then nothing but zeros up to the packet's end. How many zeros, is all that has to be known of the rest.
//! A checksum that was wrong stays wrong.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::bpf_loop;

/// The polynomial, its lowest coefficient in the highest bit.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// Lengths that fit into IP's own fields have so many bits.
const BITS: usize = 16;

/// What becomes of each four bits of a difference when so many zeros follow as a bit of the length stands for.
static MOVED: [[[u32; 16]; 8]; BITS] = moved();

const fn moved() -> [[[u32; 16]; 8]; BITS] {
    let mut moved = [[[0; 16]; 8]; BITS];
    // One byte is x to the eighth.
    let mut by = 1 << 23;
    let mut bit = 0;
    while bit < BITS {
        let mut place = 0;
        while place < 8 {
            let mut value = 0;
            while value < 16 {
                moved[bit][place][value] = times(by, (value as u32) << (4 * place));
                value += 1;
            }
            place += 1;
        }
        by = times(by, by);
        bit += 1;
    }
    moved
}

/// The product of two polynomials, modulo that of the CRC.
const fn times(a: u32, b: u32) -> u32 {
    let (mut a, mut b, mut product) = (a, b, 0);
    while a != 0 {
        if a >> 31 != 0 {
            product ^= b;
        }
        b = if b & 1 != 0 {
            b >> 1 ^ POLYNOMIAL
        } else {
            b >> 1
        };
        a <<= 1;
    }
    product
}

/// A difference on its way to the packet's end.
struct Moving {
    difference: u32,
    /// Bytes that it moves by.
    length: u32,
}

/// By what the checksum changes when the first four bytes of a packet of this length do; both in the order of the
/// packet's bytes. The kernel checks a function that is visible outside by itself and once, not for each call.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn xebec_crc_difference(first: u32, length: u32) -> u32 {
    let mut moving = Moving {
        difference: u32::from_le(first),
        length,
    };
    // SAFETY: the callback takes what it is given here. The kernel checks it once, and each turn of a loop by itself.
    unsafe {
        bpf_loop(
            BITS as u32,
            move_by_bit as *mut c_void,
            (&raw mut moving).cast(),
            0,
        )
    };
    moving.difference.to_le()
}

/// Moves a difference by what one bit of the length stands for.
#[inline(never)]
extern "C" fn move_by_bit(bit: u64, moving: *mut Moving) -> i64 {
    // SAFETY: it is what was given to `bpf_loop`.
    let moving = unsafe { &mut *moving };
    let Some(moved) = MOVED.get(bit as usize) else {
        return 1;
    };
    if moving.length >> bit & 1 != 0 {
        let mut sum = 0;
        for (place, values) in moved.iter().enumerate() {
            sum ^= values[(moving.difference >> (4 * place) & 15) as usize];
        }
        moving.difference = sum;
    }
    0
}
