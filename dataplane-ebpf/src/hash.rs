//! Hashes of flows.

use xebec_dataplane_common::nat::Tuple;

/// The seed that all nodes agree on.
pub const ALL_NODES: u32 = 0x9e37_79b9;

/// A hash of a flow, or of its source alone. The destination's address is left out: a node port's is another at each node.
/// Who does not know the seed can't tell it.
#[inline(always)]
pub fn of(seed: u32, tuple: &Tuple, source_alone: bool) -> u32 {
    let mut hash = mix(seed, tuple.source.0[0]);
    hash = mix(hash, tuple.source.0[1]);
    hash = mix(hash, tuple.source.0[2]);
    hash = mix(hash, tuple.source.0[3]);
    if !source_alone {
        let ports = u32::from(tuple.source_port) << 16 | u32::from(tuple.destination_port);
        hash = mix(hash, ports);
    }
    hash = mix(hash, u32::from(tuple.protocol));
    // Murmur's last step: every bit counts for every other.
    hash = (hash ^ hash >> 16).wrapping_mul(0x85eb_ca6b);
    hash = (hash ^ hash >> 13).wrapping_mul(0xc2b2_ae35);
    hash ^ hash >> 16
}

#[inline(always)]
fn mix(hash: u32, word: u32) -> u32 {
    (hash ^ word).wrapping_mul(0x0100_0193).rotate_left(13)
}
