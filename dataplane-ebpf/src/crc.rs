//! SCTP's checksum after a change at the packet's start: a CRC32c of all of it (RFC 9260, 6.8 and appendix A).
//!
//! A CRC is linear: that of the changed packet differs from the old one by the CRC of the difference, which is a few
//! bytes and then nothing but zeros up to the packet's end. How many zeros, is all that has to be known of the rest.
//! A checksum that was wrong stays wrong.

/// The polynomial, its lowest coefficient in the highest bit.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// Lengths that fit into IP's own fields have so many bits.
const BITS: usize = 16;

/// What multiplies a difference to move it by one byte, by two, by four, and so on.
static MOVES: [u32; BITS] = moves();

const fn moves() -> [u32; BITS] {
    let mut moves = [0; BITS];
    // x to the eighth.
    let mut by = 1 << 23;
    let mut bit = 0;
    while bit < BITS {
        moves[bit] = by;
        by = times(by, by);
        bit += 1;
    }
    moves
}

/// The product of two polynomials, modulo that of the CRC.
#[inline(always)]
const fn times(a: u32, b: u32) -> u32 {
    let (mut a, mut b, mut product) = (a, b, 0);
    let mut bit = 0;
    // Without branches, of which the verifier would follow both ways.
    while bit < 32 {
        product ^= b & 0_u32.wrapping_sub(a >> 31);
        b = b >> 1 ^ (POLYNOMIAL & 0_u32.wrapping_sub(b & 1));
        a <<= 1;
        bit += 1;
    }
    product
}

/// By what the checksum changes when the first four bytes of a packet of this length do; both in the order of the
/// packet's bytes.
#[inline(never)]
pub fn difference(first: u32, length: u32) -> u32 {
    let mut difference = u32::from_le(first);
    for (bit, by) in MOVES.iter().enumerate() {
        if length >> bit & 1 != 0 {
            difference = times(*by, difference);
        }
    }
    difference.to_le()
}
