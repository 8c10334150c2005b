//! An agent takes over from one whose maps have another layout: what it can't read it begins anew.

use xebec_dataplane_common::LAYOUT;

use crate::alone;
use crate::stage::{Options, Stage, TARGET, Talk, left_out, server, service};

/// New connections to Services, by packets and by sockets, and an open one that is not translated notice nothing.
#[test]
fn maps_of_another_layout_are_left_behind() {
    if left_out() {
        return;
    }
    let _alone = alone();
    let mut stage = Stage::new();
    let [object, slice] = service(1, "TCP", 1, 1);
    stage.api.set("endpointslices", [slice]);
    stage.api.set("services", [object]);
    let options = Options::default();
    stage.start(&options);
    stage.wait_until_ready();
    stage.connect();
    let talk = Talk::begin(stage.dial_at((server(1), TARGET).into()));
    let dialing = stage.keep_dialing(1);
    std::thread::sleep(std::time::Duration::from_millis(300));
    stage.kill();
    // As if an agent of the layout before had made them.
    let folder = |kind: &str, layout: u32| stage.pins().join(format!("{kind}-{layout}"));
    for kind in ["maps", "current", "next"] {
        std::fs::rename(folder(kind, LAYOUT), folder(kind, LAYOUT - 1)).unwrap();
    }
    stage.start(&options);
    stage.wait_until_ready();
    for kind in ["maps", "current", "next"] {
        let folder = |layout: u32| stage.pins().join(format!("{kind}-{layout}"));
        assert!(!folder(LAYOUT - 1).exists(), "{kind} is left");
        assert!(folder(LAYOUT).exists(), "{kind} is missing");
    }
    std::thread::sleep(std::time::Duration::from_millis(300));
    let dials = dialing.end();
    println!("new connections of pod and node meanwhile: {dials:?}");
    assert!(dials.iter().all(|one| one.made > 50));
    let [pod, node] = &dials;
    // The pod's are translated packet by packet: one that is being made while its two hooks are replaced is a translated
    // connection, whose answer the new maps don't know. It is made by the next SYN.
    assert!(pod.bad <= 2 && node.bad == 0, "{dials:?}");
    let (asked, _, again) = talk.end();
    assert!(asked > 100, "{asked}");
    assert_eq!(again, 0, "no packet of the open connection was lost");
}
