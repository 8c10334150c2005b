//! Whom pods' own addresses are shown to, as ip-masq-agent's file says, and the ports that translation holds.

use std::net::IpAddr;

use crate::alone;
use crate::stage::{FAR_POD, NODE, OUTSIDE, Options, Stage, left_out};

#[test]
fn pods_keep_their_address_towards_whom_the_file_names() {
    if left_out() {
        return;
    }
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ip-masq-agent");
    let options = Options {
        ip_masq: Some(path.clone()),
        ..Options::default()
    };
    let mut stage = Stage::new();
    stage.start(&options);
    stage.wait_until_ready();
    let pod = stage.connect();
    let parsed = |pair: [&str; 2]| -> [IpAddr; 2] { pair.map(|ip| ip.parse().unwrap()) };
    let (node, outside, far_pod) = (parsed(NODE), parsed(OUTSIDE), parsed(FAR_POD));
    // Whom someone outside sees by TCP and UDP: of IPv4, and of IPv6.
    let sees = |stage: &mut Stage, whom: [IpAddr; 2]| {
        for (outside, whom) in outside.into_iter().zip(whom) {
            for tcp in [true, false] {
                // A packet may come before the kernel has been told.
                stage.wait("the source that is seen", |stage| {
                    stage.seen_source(outside, tcp) == Some(whom)
                });
            }
        }
    };
    let cluster_stays_native = |stage: &Stage| {
        for (to, pod) in far_pod.into_iter().zip(pod) {
            for tcp in [true, false] {
                assert_eq!(stage.seen_source(to, tcp), Some(pod));
            }
        }
    };
    // There is no file: only private addresses see the pod's.
    sees(&mut stage, node);
    assert_eq!(stage.metric("xebec_nat_ports"), Some(4_536.0));
    let used = stage.metric("xebec_nat_ports_used").unwrap();
    let most = stage.metric("xebec_nat_ports_used_most").unwrap();
    // By each protocol to each family, one at least.
    assert!(most >= 1.0 && most + 3.0 <= used, "{most} of {used}");
    cluster_stays_native(&stage);
    // A ConfigMap's file appears, names a block of each family, of one, and other blocks.
    let both = "nonMasqueradeCIDRs:\n- 198.51.100.0/24\n- 2001:db8:51::/48\n";
    std::fs::write(&path, both).unwrap();
    sees(&mut stage, pod);
    std::fs::write(&path, "nonMasqueradeCIDRs:\n- 2001:db8:51::/48\n").unwrap();
    sees(&mut stage, [node[0], pod[1]]);
    std::fs::write(&path, "nonMasqueradeCIDRs:\n- 198.51.100.0/24\n").unwrap();
    sees(&mut stage, [pod[0], node[1]]);
    let others = "nonMasqueradeCIDRs:\n- 203.0.113.0/24\n- 2001:db8:52::/48\n";
    std::fs::write(&path, others).unwrap();
    sees(&mut stage, node);
    cluster_stays_native(&stage);
    // What means nothing changes nothing.
    std::fs::write(&path, "nonMasqueradeCIDRs: [x]\n").unwrap();
    sees(&mut stage, node);
    let status = stage.try_ask("GET", "/status", "").unwrap();
    assert_eq!(status["packets"]["refused"], 0, "{status}");
    assert_eq!(status["packets"]["no_port"], 0, "{status}");
    assert_eq!(stage.metric("xebec_refused_packets_total"), Some(0.0));
    // A Service without endpoints refuses, which is counted.
    stage.add(0..1, 0);
    stage.wait("a refusal", |stage| {
        stage.silent(0..1) == [0] && stage.metric("xebec_refused_packets_total") > Some(0.0)
    });
    let status = stage.try_ask("GET", "/status", "").unwrap();
    assert!(status["packets"]["refused"].as_u64().unwrap() > 0);
}
