//! Maps of Services that grow under traffic, up to a bound.

use std::time::{Duration, Instant};

use aya::maps::MapData;
use serde_json::json;

use crate::alone;
use crate::stage::{Options, Stage, Talk, left_out, service};

/// How many entries the pinned maps of Services have.
fn capacities(stage: &Stage) -> [u32; 3] {
    let folders = std::fs::read_dir(stage.pins()).unwrap();
    let folders: Vec<_> = folders.flatten().map(|entry| entry.path()).collect();
    ["FRONTENDS", "SLOTS", "BACKENDS"].map(|name| {
        let found: Vec<_> = folders
            .iter()
            .map(|folder| folder.join(name))
            .filter(|path| path.exists())
            .collect();
        assert_eq!(found.len(), 1, "{name} is pinned once: {found:?}");
        let map = MapData::from_pin(&found[0]).unwrap();
        map.info().unwrap().max_entries()
    })
}

/// The kernel's memory for all maps of the agent, in kB, each of which there is once.
fn kernel_memory(stage: &Stage) -> u64 {
    let rows = stage.try_ask("GET", "/tables/maps", "").unwrap();
    let rows = rows.as_array().unwrap();
    for name in ["FRONTENDS", "SLOTS", "BACKENDS", "RANGES", "FLOWS"] {
        let count = rows.iter().filter(|row| row["map"] == name).count();
        assert_eq!(count, 1, "{name}: {rows:?}");
    }
    let bytes = rows.iter().map(|row| row["memory_bytes"].as_u64().unwrap());
    bytes.sum::<u64>() / 1_000
}

/// Larger than the first sizes: Services, endpoints of each, and what the maps begin with.
fn load() -> (u32, u32, Option<[[u32; 4]; 2]>) {
    match std::env::var("XEBEC_TEST_SERVICES") {
        // Everything that is shipped.
        Ok(count) => (count.parse().unwrap(), 10, None),
        Err(_) => {
            let least = [512, 256, 1_024, 64];
            (4_000, 3, Some([least, [1 << 20; 4]]))
        }
    }
}

#[test]
fn maps_grow_under_traffic_and_nobody_notices() {
    if left_out() {
        return;
    }
    let _alone = alone();
    let (count, endpoints, sizes) = load();
    let options = Options {
        sizes,
        ..Options::default()
    };
    let mut stage = Stage::new();
    // A connection's Service, and some that answer datagrams.
    let talked = count + 1_000;
    let [object, slice] = service(talked, "TCP", talked * endpoints, endpoints);
    stage.api.set("endpointslices", [slice]);
    stage.api.set("services", [object]);
    stage.add(0..100, endpoints);
    stage.start(&options);
    stage.wait_until_ready();
    stage.connect();
    assert_eq!(stage.silent(0..100), [0; 0]);
    let (first, memory) = (capacities(&stage), kernel_memory(&stage));
    let talk = Talk::begin(stage.dial(talked));
    let dialing = stage.keep_dialing(talked);
    let begun = Instant::now();
    stage.add(100..count, endpoints);
    let wanted = f64::from(count + 1);
    stage.wait("all Services fit", |stage| {
        let is = |name: &str, wanted: f64| stage.metric(name) == Some(wanted);
        is("xebec_services", wanted) && is("xebec_services_lacking_room", 0.0)
    });
    stage.wait("the status says so", |stage| {
        let told = json!({"known": count + 1, "lacking": 0, "growing": false});
        let status = stage.try_ask("GET", "/status", "");
        status.is_some_and(|status| status["services"] == told)
    });
    let synced = begun.elapsed();
    let dials = dialing.end();
    println!("new connections of pod and node meanwhile: {dials:?}");
    assert!(dials.iter().all(|one| one.made > 50 && one.bad == 0));
    assert_eq!(stage.silent(0..count), [0; 0], "each answers");
    let grown = capacities(&stage);
    let grew = first.iter().zip(&grown).all(|(first, grown)| grown > first);
    assert!(grew, "{first:?} {grown:?}");
    let backends = stage.metric("xebec_backends").unwrap();
    assert_eq!(backends, wanted * f64::from(endpoints));
    let (asked, longest, again) = talk.end();
    println!(
        "{count} Services x {endpoints} in {synced:?}; {first:?} to {grown:?}; the open connection asked {asked} times, at most for {longest:?}; the kernel's maps went from {memory} to {} kB",
        kernel_memory(&stage)
    );
    assert_eq!(again, 0, "no packet of the open connection was lost");
    assert_eq!(stage.api.events(), []);
    // The next agent begins with as much.
    let times = |stage: &Stage| stage.log().matches("the maps of Services grew").count();
    let before = times(&stage);
    assert!(before > 0);
    let talk = Talk::begin(stage.dial(talked));
    stage.kill();
    stage.start(&options);
    stage.wait_until_ready();
    assert_eq!(capacities(&stage), grown);
    assert_eq!(stage.silent(0..count), [0; 0], "each answers again");
    let (_, _, again) = talk.end();
    assert_eq!(again, 0, "no packet was lost");
    assert_eq!(times(&stage), before, "it need not grow again");
}

#[test]
fn at_the_bound_an_event_tells_and_the_rest_works() {
    bounded(Options::default());
}

/// As on kernels without tcx.
#[test]
fn filters_take_over_as_well() {
    bounded(Options {
        filters: true,
        ..Options::default()
    });
}

/// With XDP on the network's device.
#[test]
fn xdp_takes_over_as_well() {
    bounded(Options {
        xdp: true,
        ..Options::default()
    });
}

fn bounded(options: Options) {
    if left_out() {
        return;
    }
    let _alone = alone();
    let options = Options {
        sizes: Some([[128, 64, 256, 64], [512, 512, 4_096, 64]]),
        ..options
    };
    let mut stage = Stage::new();
    let [object, slice] = service(2_000, "TCP", 100_000, 2);
    stage.api.set("endpointslices", [slice]);
    stage.api.set("services", [object]);
    stage.add(0..49, 2);
    stage.start(&options);
    stage.wait_until_ready();
    stage.connect();
    assert_eq!(stage.silent(0..49), [0; 0]);
    let talk = Talk::begin(stage.dial(2_000));
    let dialing = stage.keep_dialing(2_000);
    stage.add(49..199, 2);
    stage.wait("the maps grow", |stage| {
        stage.metric("xebec_services") == Some(200.0)
            && stage.metric("xebec_services_lacking_room") == Some(0.0)
    });
    assert_eq!(stage.silent(0..199), [0; 0]);
    assert_eq!(
        stage.api.events(),
        [],
        "nobody is told of what fits in the end"
    );
    // One alone does not fit: it has more endpoints than there may be backends.
    stage.add(1_000..1_001, 5_000);
    stage.wait("an Event", |stage| !stage.api.events().is_empty());
    let events = stage.api.events();
    let (reason, about, words) = &events[0];
    assert_eq!(
        (events.len(), &**reason, &**about),
        (1, "DataplaneFull", "s1000")
    );
    assert!(words.contains("4096 backends"), "{words}");
    assert_eq!(stage.metric("xebec_services_lacking_room"), Some(1.0));
    // Those that are there go on, and others come.
    stage.add(199..299, 2);
    stage.wait("more Services", |stage| {
        stage.metric("xebec_services") == Some(301.0)
            && stage.metric("xebec_services_lacking_room") == Some(1.0)
    });
    assert_eq!(stage.silent(0..299), [0; 0]);
    // Room is made, and it fits.
    stage.add(1_000..1_001, 20);
    stage.wait("it fits", |stage| {
        stage.metric("xebec_services_lacking_room") == Some(0.0)
    });
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(stage.silent(1_000..1_001), [0; 0]);
    assert_eq!(stage.api.events().len(), 1);
    let dials = dialing.end();
    println!("new connections of pod and node meanwhile: {dials:?}");
    assert!(dials.iter().all(|one| one.made > 50 && one.bad == 0));
    // The next agent takes over from all of that.
    stage.kill();
    stage.start(&options);
    stage.wait_until_ready();
    assert_eq!(stage.silent(0..299), [0; 0]);
    let (asked, _, again) = talk.end();
    assert!(asked > 100, "{asked}");
    assert_eq!(again, 0, "no packet of the open connection was lost");
}
