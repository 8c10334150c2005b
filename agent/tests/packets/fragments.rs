//! Fragments through Services: what they are put together to is what the whole would have become.

use xebec_dataplane_common::flow::{DROPPED, REASON_FRAGMENT};

use super::kernel::Shared;
use super::{
    FAMILIES, Kernel, OK, POD_MAC, REDIRECT, SHOT, client, left_out, node, pod, service, udp, web,
};

fn kernel() -> Shared {
    let mut kernel = Kernel::shared();
    for f in FAMILIES {
        kernel.open(service(f), 53, 0, Some((web(f), 5353)));
        kernel.node_port(30_053, web(f), 5353);
    }
    kernel
}

#[test]
fn of_datagrams_to_services_follow_the_first() {
    if left_out() {
        return;
    }
    let mut kernel = kernel();
    for f in FAMILIES {
        let data: Vec<u8> = (0..1600_u32).map(|byte| (byte % 251) as u8).collect();
        let sent = udp(pod(f), service(f), 4000, 53).with(data.clone());
        let seen = sent.to(web(f), 5353).handed_over(POD_MAC);
        for (sent, seen) in sent.parts(7, 1400).into_iter().zip(seen.parts(7, 1400)) {
            assert_eq!(kernel.run("xebec_from_pod", &sent), (REDIRECT, seen));
        }
        let sent = udp(client(f), node(f), 4000, 30_053).with(data.clone());
        let seen = sent.to(web(f), 5353);
        for (sent, seen) in sent.parts(8, 1400).into_iter().zip(seen.parts(8, 1400)) {
            assert_eq!(kernel.run("xebec_from_network", &sent), (OK, seen));
        }
        // The answer, too.
        let sent = udp(web(f), client(f), 5353, 4000).with(data);
        let seen = sent.from(node(f), 30_053);
        for (sent, seen) in sent.parts(9, 1400).into_iter().zip(seen.parts(9, 1400)) {
            assert_eq!(kernel.run("xebec_to_network", &sent), (OK, seen));
        }
    }
}

/// Whom a fragment is for that comes before the first of its datagram, nothing tells: what a pod sends is dropped and
/// told of, for it may be forbidden. What comes from the network may be the node's own, and is the stack's. A pod gets
/// it if no rules are asked for the pod.
#[test]
fn before_the_first_are_dropped_where_rules_may_be_slipped_past() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = kernel();
        let [_, later] = udp(pod(f), service(f), 4000, 53).parts(17, 24);
        assert_eq!(kernel.run("xebec_from_pod", &later), (SHOT, later.clone()));
        let event = kernel.last_event().unwrap();
        assert_eq!((event.verdict, event.reason), (DROPPED, REASON_FRAGMENT));
        let [_, later] = udp(client(f), node(f), 4000, 30_053).parts(18, 24);
        assert_eq!(
            kernel.run("xebec_from_network", &later),
            (OK, later.clone())
        );
        let [_, later] = udp(client(f), pod(f), 4000, 53).parts(19, 24);
        assert_eq!(kernel.run("xebec_to_pod", &later), (OK, later.clone()));
        kernel.isolate_pod();
        let [_, later] = udp(client(f), pod(f), 4000, 53).parts(20, 24);
        assert_eq!(kernel.run("xebec_to_pod", &later), (SHOT, later.clone()));
        assert_eq!(kernel.last_event().unwrap().reason, REASON_FRAGMENT);
    }
}
