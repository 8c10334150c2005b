//! Tables that forget their oldest entries: what is in use of them is told, and what ends makes room.

use std::time::{Duration, Instant};

use aya::maps::{HashMap, Map, MapData};
use xebec_dataplane_common::LAYOUT;

use crate::alone;
use crate::stage::{Options, Stage, left_out, service};

fn pressure(stage: &Stage, map: &str) -> f64 {
    let name = format!("xebec_bpf_map_pressure{{map=\"{map}\"}}");
    stage.metric(&name).unwrap()
}

#[test]
fn full_of_what_is_in_use_is_a_metric_and_an_event() {
    if left_out() {
        return;
    }
    let _alone = alone();
    // Each flow through a Service takes two entries, and leaves its client's affinity.
    const FLOWS: u32 = 8_192;
    const AFFINITIES: u32 = 4_096;
    const SERVICES: u32 = 5_000;
    let mut stage = Stage::new();
    let of = |number: u32| {
        let [mut object, slice] = service(number, "UDP", number, 1);
        object["spec"]["sessionAffinity"] = "ClientIP".into();
        object["spec"]["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"] = 10_800.into();
        [object, slice]
    };
    let all: Vec<_> = (0..SERVICES).map(of).collect();
    stage
        .api
        .set("endpointslices", all.iter().map(|[_, slice]| slice.clone()));
    stage
        .api
        .set("services", all.iter().map(|[object, _]| object.clone()));
    stage.start(&Options {
        forgetful: Some([FLOWS, AFFINITIES]),
        ..Options::default()
    });
    stage.wait_until_ready();
    stage.connect();
    let tables = ["FLOWS", "AFFINITIES"];
    assert_eq!(tables.map(|map| pressure(&stage, map)), [0.0; 2]);
    // A quarter of the affinities, and half of the flows.
    assert_eq!(stage.silent(0..1_024), [0; 0]);
    let [flows, affinities] = tables.map(|map| pressure(&stage, map));
    assert!((0.25..0.3).contains(&affinities), "{affinities}");
    assert!((0.24..0.6).contains(&flows), "{flows}");
    assert_eq!(stage.silent(1_024..SERVICES), [0; 0], "each is answered");
    for map in tables {
        assert!(pressure(&stage, map) > 0.85, "{map}");
    }
    stage.wait("events", |stage| stage.api.events().len() >= 2);
    let mut events = stage.api.events();
    events.sort();
    assert_eq!(events.len(), 2, "{events:?}");
    for ((reason, about, words), (table, wanted, flag)) in events.iter().zip([
        ("AFFINITIES", "AffinityTableFull", "--affinity-entries"),
        ("FLOWS", "FlowTableFull", "--flow-entries"),
    ]) {
        assert_eq!((&**reason, &**about), (wanted, "a"));
        assert!(words.contains(table) && words.contains(flag), "{words}");
    }
}

/// Translated sockets that the kernel remembers.
fn sockets(stage: &Stage) -> usize {
    let path = stage.pins().join(format!("maps-{LAYOUT}/SOCKETS"));
    let map = Map::LruHashMap(MapData::from_pin(path).unwrap());
    let map: HashMap<MapData, [u8; 32], [u8; 32]> = map.try_into().unwrap();
    map.keys().count()
}

#[test]
fn a_connected_socket_takes_its_translation_along() {
    if left_out() {
        return;
    }
    let _alone = alone();
    let mut stage = Stage::new();
    let [object, slice] = service(1, "TCP", 1, 3);
    stage.api.set("endpointslices", [slice]);
    stage.api.set("services", [object]);
    stage.start(&Options::default());
    stage.wait_until_ready();
    stage.connect();
    let dialing = stage.keep_dialing(1);
    let begun = Instant::now();
    let mut most = 0;
    while begun.elapsed() < Duration::from_secs(2) {
        most = most.max(sockets(&stage));
    }
    let [_, node] = dialing.end();
    assert!(node.made > 50 && node.bad == 0);
    assert!(most > 0, "none was translated");
    assert!(most < 10, "{most} were kept of {}", node.made);
    assert_eq!(sockets(&stage), 0);
}
