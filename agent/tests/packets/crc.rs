//! SCTP's checksum, as all tests compute it.

/// CRC32c, as SCTP has it: bit by bit, of all bytes.
pub fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ (0x82f6_3b78 & 0_u32.wrapping_sub(crc & 1));
        }
    }
    !crc
}

#[test]
fn the_tests_know_sctps_checksum() {
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
}
