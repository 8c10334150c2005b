//! Which endpoints of a Service's port get new connections from this node, by the rules that kube-proxy has.

use super::pool::{FOR_NODE, FOR_ZONE, LOCAL, NODE_HINTS, ZONE_HINTS};

/// The endpoint takes connections.
pub const READY: u8 = 1 << 5;
/// It answers, be it that it ends.
pub const SERVING: u8 = 1 << 6;
/// It ends.
pub const TERMINATING: u8 = 1 << 7;

/// What of an endpoint decides: traits of its place and of its state.
pub type Traits = u8;

const fn is(traits: Traits, bits: u8) -> bool {
    traits & bits == bits
}

/// What a port's frontends can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local`.
    pub external_local: bool,
    /// The port has frontends besides ClusterIPs.
    pub external: bool,
}

impl Policy {
    const fn uses_cluster(self) -> bool {
        !self.internal_local || self.external
    }

    const fn uses_local(self) -> bool {
        self.internal_local || self.external_local && self.external
    }
}

/// How endpoints are preferred.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Topology {
    Any,
    SameZone,
    SameNode,
}

/// Hints count only where every ready endpoint has them, and one is meant for this node.
fn topology(all: impl Iterator<Item = Traits>) -> Topology {
    let (mut every, mut some) = (Traits::MAX, 0);
    for one in all.filter(|one| is(*one, READY)) {
        (every, some) = (every & one, some | one);
    }
    if is(every, NODE_HINTS) && is(some, FOR_NODE) {
        Topology::SameNode
    } else if is(every, ZONE_HINTS) && is(some, FOR_ZONE) {
        Topology::SameZone
    } else {
        Topology::Any
    }
}

/// Indexes of the chosen endpoints.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// For the policy Cluster.
    pub cluster: Vec<u32>,
    /// For the policy Local.
    pub local: Vec<u32>,
    /// Whether there is any usable endpoint in the cluster, be it not for this node.
    pub any: bool,
}

fn those(all: impl ExactSizeIterator<Item = Traits>, wanted: impl Fn(Traits) -> bool) -> Vec<u32> {
    let mut those = Vec::with_capacity(all.len());
    let numbered = (0..).zip(all).filter(|(_, one)| wanted(*one));
    those.extend(numbered.map(|(number, _)| number));
    those
}

/// The ready ones, or where there is none those that still serve while they end: in the cluster and on this node
/// each for itself.
pub fn choose(all: impl ExactSizeIterator<Item = Traits> + Clone, policy: Policy) -> Choice {
    const ENDING: u8 = SERVING | TERMINATING;
    let mut choice = Choice::default();
    if policy.uses_cluster() {
        let meant = match topology(all.clone()) {
            Topology::Any => READY,
            Topology::SameZone => READY | FOR_ZONE,
            Topology::SameNode => READY | FOR_NODE,
        };
        choice.cluster = those(all.clone(), |one| is(one, meant));
        if choice.cluster.is_empty() {
            choice.cluster = those(all.clone(), |one| is(one, ENDING));
        }
        choice.any = !choice.cluster.is_empty();
    }
    if policy.uses_local() {
        let mut any = all.clone();
        choice.any |= any.any(|one| is(one, READY) || is(one, ENDING));
        choice.local = those(all.clone(), |one| is(one, LOCAL | READY));
        if choice.local.is_empty() {
            choice.local = those(all, |one| !is(one, READY) && is(one, LOCAL | ENDING));
        }
    }
    choice
}

#[cfg(test)]
mod tests {
    use super::*;

    const R: u8 = READY | SERVING;
    const E: u8 = SERVING | TERMINATING;
    const GONE: u8 = TERMINATING;
    const L: u8 = LOCAL;
    const Z: u8 = ZONE_HINTS;
    const ZM: u8 = ZONE_HINTS | FOR_ZONE;
    const N: u8 = NODE_HINTS;
    const NM: u8 = NODE_HINTS | FOR_NODE;

    const CLUSTER: Policy = Policy {
        internal_local: false,
        external_local: false,
        external: true,
    };
    const LOCAL_OUTSIDE: Policy = Policy {
        external_local: true,
        ..CLUSTER
    };
    const LOCAL_INSIDE: Policy = Policy {
        internal_local: true,
        external_local: false,
        external: false,
    };
    const LOCAL_BOTH: Policy = Policy {
        internal_local: true,
        ..LOCAL_OUTSIDE
    };

    /// Endpoints, policy, those for Cluster, those for Local, any at all.
    type Case<'a> = (&'a [u8], Policy, &'a [u32], &'a [u32], bool);

    #[test]
    fn policies_and_states() {
        let cases: &[Case<'_>] = &[
            (&[], CLUSTER, &[], &[], false),
            (&[R, R], CLUSTER, &[0, 1], &[], true),
            (&[0, SERVING], CLUSTER, &[], &[], false),
            // Ending ones serve only where nothing is ready.
            (&[R, E], CLUSTER, &[0], &[], true),
            (&[E, GONE, 0], CLUSTER, &[0], &[], true),
            (&[GONE], CLUSTER, &[], &[], false),
            // On the node the same, independently of the cluster.
            (&[R, L | E, L | GONE], LOCAL_OUTSIDE, &[0], &[1], true),
            (&[R, L | R, L | E], LOCAL_OUTSIDE, &[0, 1], &[1], true),
            (&[R, L], LOCAL_OUTSIDE, &[0], &[], true),
            (&[E], LOCAL_OUTSIDE, &[0], &[], true),
            (&[R], LOCAL_INSIDE, &[], &[], true),
            (&[R, L | R], LOCAL_INSIDE, &[], &[1], true),
            (&[E, L | GONE], LOCAL_INSIDE, &[], &[], true),
            (&[GONE, 0], LOCAL_INSIDE, &[], &[], false),
            // External frontends need those of the cluster for clients of the cluster.
            (&[R, L | R], LOCAL_BOTH, &[0, 1], &[1], true),
            // `publishNotReadyAddresses`: the slice says ready of one that ends.
            (&[R | TERMINATING, E], CLUSTER, &[0], &[], true),
            (&[L | R | TERMINATING], LOCAL_BOTH, &[0], &[0], true),
        ];
        for (number, (all, policy, cluster, local, any)) in cases.iter().enumerate() {
            let choice = choose(all.iter().copied(), *policy);
            let wanted = Choice {
                cluster: cluster.to_vec(),
                local: local.to_vec(),
                any: *any,
            };
            assert_eq!(choice, wanted, "case {number}");
        }
        // Without external frontends, their policy is nobody's.
        let nobody = Policy {
            external: false,
            ..LOCAL_OUTSIDE
        };
        let all = [R, L | R].into_iter();
        assert_eq!(choose(all.clone(), nobody), choose(all, CLUSTER));
    }

    #[test]
    fn hints() {
        let cases: &[(&[u8], &[u32])] = &[
            // Every ready one is hinted, one for here.
            (&[R | ZM, R | Z], &[0]),
            (&[R | NM, R | N], &[0]),
            // The node goes before the zone.
            (&[R | NM | ZM, R | N | ZM], &[0]),
            // None is meant for the node: the zone decides, or nobody.
            (&[R | N | ZM, R | N | Z], &[0]),
            (&[R | N | Z, R | N | Z], &[0, 1]),
            (&[R | N, R | N], &[0, 1]),
            // One has no hint.
            (&[R | ZM, R], &[0, 1]),
            (&[R | NM | ZM, R | ZM, R | Z], &[0, 1]),
            // Those that are not ready neither spoil nor help.
            (&[R | ZM, R | Z, 0, E], &[0]),
            (&[R | Z, ZM], &[0]),
            // With nothing ready, hints mean nothing.
            (&[E | ZM, E | Z, E], &[0, 1, 2]),
        ];
        for (number, (all, cluster)) in cases.iter().enumerate() {
            assert_eq!(
                choose(all.iter().copied(), CLUSTER).cluster,
                *cluster,
                "case {number}"
            );
        }
        // Local asks for the node alone.
        let all = [R | L | Z, R | ZM];
        assert_eq!(choose(all.into_iter(), LOCAL_OUTSIDE).local, [0]);
        assert_eq!(choose(all.into_iter(), LOCAL_OUTSIDE).cluster, [1]);
    }
}
