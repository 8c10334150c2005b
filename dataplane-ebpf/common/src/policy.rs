//! Endpoints, identities, and the compiled sets of policies' rules.

use bytemuck::{Pod, Zeroable};

use crate::ip::Ip;

/// How many sets a chain has. Policies are divided into three tiers: those before NetworkPolicies, these, and those
/// after. Each has a set, but NetworkPolicies two: [`WIDE`] and the next.
pub const SEATS: usize = 4;
/// Where the set of NetworkPolicies is that many kinds of pods have in common. With the one behind it, it decides together.
pub const WIDE: usize = 1;

/// The sets that judge one direction, in their order; 0 for none.
pub type Chain = [u32; SEATS];

/// A pod of this node, by its address (the key). An entry never changes: the kernel puts a changed one in another place
/// of its hash map, and a packet that passes in between finds neither.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Endpoint {
    /// Index of the host's end of its veth pair.
    pub ifindex: u32,
    /// Where its [`Standing`] is.
    pub slot: u32,
    /// Hardware address of the pod's end.
    pub mac: [u8; 6],
    /// Always 0.
    pub pad: u16,
}

/// What a pod is, and under which rules, at its slot: one word, so that a packet sees all of it, or all of what it was.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Standing {
    /// What its labels make it.
    pub identity: u32,
    /// Number of its [`Chains`], 0 for none, with which of them have sets: [`UNDER_INGRESS`] and the others; and
    /// [`LEARNS`] and [`READS_HTTP`].
    pub rules: u32,
}

/// What comes in is judged.
pub const UNDER_INGRESS: u32 = 1 << 31;
/// What goes out is judged.
pub const UNDER_EGRESS: u32 = 1 << 30;
/// By how many bits to the right of a way's bit stands that there are policies in audit mode for it.
pub const AUDIT_BIT: u32 = 2;
/// Its rules name domains: what resolvers answer it is held until the agent has learned of it.
pub const LEARNS: u32 = 1 << 27;
/// The first lines of the HTTP that it speaks are told of.
pub const READS_HTTP: u32 = 1 << 26;
/// The part of [`Standing::rules`] that is a number.
pub const CHAINS_NUMBER: u32 = (1 << 26) - 1;

impl Standing {
    /// Whether there are rules for a way, [`UNDER_INGRESS`] or [`UNDER_EGRESS`], be they in audit mode.
    #[inline(always)]
    pub const fn has_rules(rules: u32, way: u32) -> bool {
        rules & (way | way >> AUDIT_BIT) != 0
    }
}

impl Chains {
    /// What a [`Standing`] says of them under this number, which is not 0 where there are any.
    pub fn standing(&self, number: u32) -> u32 {
        let under = |chain: &Chain, bit: u32| if *chain == Chain::default() { 0 } else { bit };
        number
            | under(&self.ingress, UNDER_INGRESS)
            | under(&self.egress, UNDER_EGRESS)
            | under(&self.ingress_audit, UNDER_INGRESS >> AUDIT_BIT)
            | under(&self.egress_audit, UNDER_EGRESS >> AUDIT_BIT)
    }
}

/// The sets that judge a pod, by number. An entry never changes; it goes when nobody can have its number any more.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Chains {
    /// Judges what comes in.
    pub ingress: Chain,
    /// Judges what goes out.
    pub egress: Chain,
    /// Would judge what comes in, were no policy in audit mode; all 0 where none is.
    pub ingress_audit: Chain,
    /// The same for what goes out.
    pub egress_audit: Chain,
}

/// The identity of an address (the key). It has the address, too: while a program reads an entry, the kernel may take
/// the place away and give it to another.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Known {
    /// The address.
    pub address: Ip,
    /// What it is.
    pub identity: u32,
}

/// The node's own processes.
pub const IDENTITY_HOST: u32 = 1;
/// Whoever is no pod and no node.
pub const IDENTITY_WORLD: u32 = 2;
/// Whoever is on this node but no pod of the cluster.
pub const IDENTITY_UNMANAGED: u32 = 3;
/// A pod whose rules did not fit: nobody under rules may speak with it.
pub const IDENTITY_HELD: u32 = 4;
/// Another node.
pub const IDENTITY_REMOTE_NODE: u32 = 6;
/// Pods' identities are not below this.
pub const FIRST_POD_IDENTITY: u32 = 256;

/// How many ways to ask a set there are: a port of 0 to 16 bits under a protocol or, without a port, under any, each for
/// anybody, an identity, a class, or a class of those outside.
pub const SHAPES: usize = 4 * (17 + 1);

/// A set: which kinds of entries it has, so that only these are asked for.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Set {
    /// Shapes of its entries, the most specific first; [`NO_SHAPE`] ends them.
    pub shapes: [u8; SHAPES],
    /// [`SET_DENIES`], [`SET_FIRST`] and [`SET_ALLOWS`].
    pub flags: u32,
}

/// What no entry of the set decides is denied; otherwise the next tier is asked.
pub const SET_DENIES: u32 = 1;
/// All entries decide alike: the first one that is found will do.
pub const SET_FIRST: u32 = 2;
/// And they allow: where another set of the tier has allowed, nothing more is to be known.
pub const SET_ALLOWS: u32 = 4;

/// Ends the list of shapes.
pub const NO_SHAPE: u8 = 0xff;
/// The part of a shape that tells how many bits of the port an entry fixes: 0 to 16.
pub const SHAPE_PORT: u8 = 0x1f;
/// The entry is for one peer identity.
pub const SHAPE_IDENTITY: u8 = 0x20;
/// The entry is for a class of addresses; see [`CidrKey`]. With [`SHAPE_IDENTITY`] it is for those of that class that
/// are neither pods nor nodes.
pub const SHAPE_CLASS: u8 = 0x40;
/// The entry is for one protocol.
pub const SHAPE_PROTOCOL: u8 = 0x80;

/// An entry of a set; what a shape leaves open is 0.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct RuleKey {
    /// The set.
    pub set: u32,
    /// Identity or class of the peer.
    pub peer: u32,
    /// Port, of which only the fixed bits are kept.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// The entry's shape.
    pub shape: u8,
}

/// What an entry decides. Of all entries of a set that match, the one with the lowest `verdict` does.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct Decision {
    /// Rank of the rule, 0 for the strongest, times 4, and what it does: [`ALLOW`], [`DENY`] or [`PASS`].
    pub verdict: u32,
    /// Number of the rule; never 0.
    pub rule: u32,
}

/// The rule lets it through.
pub const ALLOW: u32 = 0;
/// The rule drops it.
pub const DENY: u32 = 1;
/// The rule leaves it to the next tier.
pub const PASS: u32 = 2;
/// The part of a verdict that tells what is done.
pub const VERDICT_ACTION: u32 = 3;

/// What a set's address blocks make of an address; looked up by the longest prefix over `set` and `address`.
/// The value is a class: all addresses that match the same blocks (and miss the same exceptions).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct CidrKey {
    /// The set.
    pub set: u32,
    /// Address.
    pub address: Ip,
}

/// The bits of a port that a prefix of it, of 0 to 16 bits, fixes.
#[inline(always)]
pub fn port_bits(port_be: u16, prefix: u8) -> u16 {
    let mask = (0xffff_0000_u32 >> (prefix & SHAPE_PORT)) as u16;
    port_be & mask.to_be()
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::{offset_of, size_of};

    #[test]
    fn layouts_are_what_the_kernel_side_was_built_with() {
        assert_eq!(
            [
                size_of::<Endpoint>(),
                size_of::<Standing>(),
                size_of::<Chains>(),
                size_of::<Known>(),
                size_of::<Set>(),
                size_of::<RuleKey>(),
                size_of::<CidrKey>(),
                size_of::<Decision>()
            ],
            [16, 8, 64, 20, 76, 12, 20, 8]
        );
        assert_eq!(
            [
                offset_of!(Endpoint, mac),
                offset_of!(Standing, rules),
                offset_of!(Chains, egress_audit),
                offset_of!(Set, flags)
            ],
            [8, 4, 48, 72]
        );
        assert_eq!(
            [offset_of!(RuleKey, port), offset_of!(RuleKey, shape)],
            [8, 11]
        );
    }

    #[test]
    fn a_prefix_of_a_port_keeps_its_high_bits() {
        let port = 8080_u16.to_be();
        assert_eq!(port_bits(port, 16), port);
        assert_eq!(port_bits(port, 0), 0);
        assert_eq!(port_bits(port, 12), 8080_u16.to_be() & 0xfff0_u16.to_be());
    }
}
