//! Whom pods' own addresses are shown to, as ip-masq-agent's file says, and the ports that translation holds.

use std::net::{IpAddr, Ipv4Addr};

use crate::alone;
use crate::stage::{OUTSIDE, Options, Stage, left_out};

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
    let node: IpAddr = [192, 0, 2, 10].into();
    let sees = |stage: &mut Stage, whom: IpAddr| {
        // A datagram may come before the kernel has been told.
        stage.wait("the source that is seen", |stage| {
            stage.seen_source(OUTSIDE) == Some(whom)
        });
    };
    // There is no file: only private addresses see the pod's.
    sees(&mut stage, node);
    assert_eq!(stage.metric("xebec_nat_ports"), Some(4_536.0));
    let used = stage.metric("xebec_nat_ports_used").unwrap();
    assert!(used >= 1.0 && stage.metric("xebec_nat_ports_used_most") == Some(used));
    let in_cluster = Ipv4Addr::new(10, 128, 0, 9);
    assert_eq!(stage.seen_source(in_cluster), Some(pod));
    // A ConfigMap's file appears, names the block, and does not any more.
    std::fs::write(&path, "nonMasqueradeCIDRs:\n- 198.51.100.0/24\n").unwrap();
    sees(&mut stage, pod);
    std::fs::write(&path, "nonMasqueradeCIDRs:\n- 203.0.113.0/24\n").unwrap();
    sees(&mut stage, node);
    assert_eq!(
        stage.seen_source(in_cluster),
        Some(pod),
        "the cluster stays native"
    );
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
