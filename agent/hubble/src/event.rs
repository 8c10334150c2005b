//! Numbers and names of kinds of events, of a flow's `event_type` (Cilium's `pkg/monitor/api`).

use crate::flow::TraceObservationPoint;

/// A packet was dropped; the kind below it is the reason.
pub const DROP: i32 = 1;
/// A packet was captured.
pub const CAPTURE: i32 = 3;
/// A packet was seen; the kind below it is where.
pub const TRACE: i32 = 4;
/// A policy has decided about a flow.
pub const POLICY_VERDICT: i32 = 5;
/// An address of a socket was translated.
pub const TRACE_SOCK: i32 = 7;
/// A request or an answer of DNS or HTTP.
pub const L7: i32 = 129;

/// What `--type` takes.
pub const TYPES: [(&str, i32); 6] = [
    ("capture", CAPTURE),
    ("drop", DROP),
    ("l7", L7),
    ("policy-verdict", POLICY_VERDICT),
    ("trace", TRACE),
    ("trace-sock", TRACE_SOCK),
];

/// What `--type trace:` takes: names and numbers of places where packets are seen.
pub const POINTS: [(&str, i32); 14] = [
    ("to-endpoint", 0),
    ("to-proxy", 1),
    ("to-host", 2),
    ("to-stack", 3),
    ("to-overlay", 4),
    ("from-endpoint", 5),
    ("from-proxy", 6),
    ("from-host", 7),
    ("from-stack", 8),
    ("from-overlay", 9),
    ("from-network", 10),
    ("to-network", 11),
    ("from-crypto", 12),
    ("to-crypto", 13),
];

/// The number of a place among kinds of `trace` events, which has another 0 than `TraceObservationPoint`.
#[must_use]
pub const fn sub_type(point: TraceObservationPoint) -> i32 {
    match point {
        TraceObservationPoint::ToEndpoint => 0,
        other => other as i32,
    }
}

/// Names of the identities that are the same in every cluster (Cilium's `pkg/identity`).
pub const RESERVED_IDENTITIES: [(&str, u32); 11] = [
    ("unknown", 0),
    ("host", 1),
    ("world", 2),
    ("unmanaged", 3),
    ("health", 4),
    ("init", 5),
    ("remote-node", 6),
    ("kube-apiserver", 7),
    ("ingress", 8),
    ("world-ipv4", 9),
    ("world-ipv6", 10),
];

/// The name of an identity that is the same in every cluster.
#[must_use]
pub fn reserved_identity(number: u32) -> Option<&'static str> {
    RESERVED_IDENTITIES
        .iter()
        .find(|(_, of)| *of == number)
        .map(|(name, _)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_have_the_names_that_messages_have() {
        for (name, number) in POINTS {
            let constant = name.to_ascii_uppercase().replace('-', "_");
            let point = TraceObservationPoint::from_str_name(&constant).expect(name);
            assert_eq!(sub_type(point), number, "{name}");
        }
    }
}
