//! An agent that is killed, and one that gets a thousand changes a second.

use std::time::{Duration, Instant};

use aya::maps::{Array, Map, MapData};
use xebec_dataplane_common::LAYOUT;
use xebec_dataplane_common::service::Backend;

use crate::alone;
use crate::stage::{Options, Stage, Talk, left_out, service};

const SERVICES: u32 = 10_000;

/// The map of backends, as it is pinned.
struct Backends(Array<MapData, [u8; 24]>);

impl Backends {
    fn open(pins: &std::path::Path) -> Self {
        let path = pins.join(format!("maps-{LAYOUT}/BACKENDS"));
        let map = Map::Array(MapData::from_pin(path).unwrap());
        Self(Array::try_from(map).unwrap())
    }

    fn has(&self, number: u32) -> bool {
        let backend: Backend = bytemuck::must_cast(self.0.get(&number, 0).unwrap());
        backend.is(backend.generation)
    }
}

#[test]
fn an_agent_that_is_killed_in_the_middle_of_a_sync_loses_nothing() {
    if left_out() {
        return;
    }
    let _alone = alone();
    let options = Options::default();
    let mut stage = Stage::new();
    let talked = SERVICES + 1;
    let [object, slice] = service(talked, "TCP", talked * 2, 2);
    stage.api.set("endpointslices", [slice]);
    stage.api.set("services", [object]);
    stage.add(0..10, 2);
    stage.start(&options);
    stage.wait_until_ready();
    stage.connect();
    let talk = Talk::begin(stage.dial(talked));
    // Ten thousand come; it is killed when some of them are in the kernel and some are not.
    let kernel = Backends::open(&stage.pins());
    stage.add(10..SERVICES, 2);
    let all = (SERVICES + 1) * 2;
    let begun = Instant::now();
    while !kernel.has(all / 4) {
        assert!(begun.elapsed() < Duration::from_secs(60), "{}", stage.log());
        std::thread::sleep(Duration::from_micros(50));
    }
    stage.kill();
    let there = (1..=all).filter(|number| kernel.has(*number)).count();
    println!("killed with {there} of {all} backends in the kernel");
    assert!(there < all as usize, "it was not in the middle");
    drop(kernel);
    // The next one is killed while it takes over, a little later each time.
    for pause in [100, 300, 500, 700, 900, 1_100] {
        stage.start(&options);
        std::thread::sleep(Duration::from_millis(pause));
        stage.kill();
    }
    stage.start(&options);
    stage.wait_until_ready();
    assert_eq!(stage.silent(0..SERVICES), [0; 0], "no Service is missing");
    assert_eq!(
        stage.metric("xebec_services"),
        Some(f64::from(SERVICES + 1))
    );
    let (asked, longest, again) = talk.end();
    println!("the open connection asked {asked} times, at most for {longest:?}");
    assert_eq!(again, 0, "no packet of the open connection was lost");
}

/// Bytes of memory of a process.
fn memory(process: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{process}/smaps_rollup")).unwrap();
    let line = text.lines().find(|line| line.starts_with("Pss_Anon:"));
    let line = line.unwrap_or_else(|| panic!("{text}"));
    let words: Vec<&str> = line.split_whitespace().collect();
    words[1].parse::<u64>().unwrap() << 10
}

/// What every Service has to have in the kernel: its endpoints, by what the agent reads back from there.
///
/// The tables are read one after the other while the agent may be writing them, so a Service that just changed may be
/// shown with a backend that went meanwhile. Such a one is marked: no model has it.
fn kernel(stage: &Stage) -> std::collections::BTreeMap<String, Vec<String>> {
    let rows = stage.dump("/bpf/lb");
    let all = rows.into_iter().map(|row| {
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        let backends = row["inside"].as_array().unwrap().iter();
        let backends = backends.map(|one| match one["present"] == true {
            true => text(&one["backend"]),
            false => format!("{} is gone", text(&one["backend"])),
        });
        let mut backends: Vec<String> = backends.collect();
        backends.sort();
        (text(&row["frontend"]), backends)
    });
    all.collect()
}

#[test]
fn a_thousand_changes_a_second_end_in_what_the_api_has() {
    if left_out() {
        return;
    }
    let _alone = alone();
    const SECONDS: u64 = 60;
    const RATE: u64 = 1_000;
    const COUNT: u32 = 500;
    let mut stage = Stage::new();
    stage.add(0..COUNT, 4);
    stage.start(&Options::default());
    stage.wait_until_ready();
    stage.connect();
    let mut wanted: std::collections::BTreeMap<u32, (u32, u32)> =
        (0..COUNT).map(|number| (number, (number * 4, 4))).collect();
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut roll = |below: u32| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random >> 33) as u32 % below
    };
    let (begun, mut done, mut samples) = (Instant::now(), 0_u64, Vec::new());
    while done < SECONDS * RATE {
        let due = (begun.elapsed().as_millis() as u64 * RATE / 1_000).min(SECONDS * RATE);
        for _ in done..due {
            let number = roll(COUNT);
            let name = format!("n/s{number}");
            match (wanted.remove(&number), roll(10)) {
                // It goes whole.
                (Some(_), 0) => {
                    stage.api.remove("services", &name);
                    stage.api.remove("endpointslices", &name);
                }
                (before, _) => {
                    let (first, endpoints) = (roll(4_000), 1 + roll(6));
                    let [object, slice] = service(number, "UDP", first, endpoints);
                    stage.api.set("endpointslices", [slice]);
                    if before.is_none() {
                        stage.api.set("services", [object]);
                    }
                    wanted.insert(number, (first, endpoints));
                }
            }
        }
        if done / RATE < due / RATE {
            samples.push(memory(stage.process()));
        }
        done = due;
        std::thread::sleep(Duration::from_millis(1));
    }
    let lasted = begun.elapsed();
    let model: std::collections::BTreeMap<String, Vec<String>> = wanted
        .iter()
        .map(|(number, (first, endpoints))| {
            let [object, slice] = service(*number, "UDP", *first, *endpoints);
            let ends = slice["endpoints"].as_array().unwrap().iter();
            let mut ends: Vec<String> = ends
                .map(|one| format!("{}:8080", one["addresses"][0].as_str().unwrap()))
                .collect();
            ends.sort();
            let ip = object["spec"]["clusterIP"].as_str().unwrap();
            (format!("{ip}:80/UDP"), ends)
        })
        .collect();
    stage.wait("the kernel is as the API says", |stage| {
        kernel(stage) == model
    });
    assert_eq!(stage.silent(wanted.keys().copied()), [0; 0]);
    let backends: std::collections::BTreeSet<&String> = model.values().flatten().collect();
    stage.wait("backends are let go", |stage| {
        stage.metric("xebec_backends") == Some(backends.len() as f64)
    });
    samples.push(memory(stage.process()));
    println!("{done} changes in {lasted:?}; memory {samples:?}");
    // Once all has been seen a few times it does not grow, but for what the allocator does.
    let early = samples[samples.len() / 3];
    let last = samples[samples.len() - 1];
    assert!(last < early + (4 << 20), "{samples:?}");
    assert_eq!(stage.api.events(), []);
}
