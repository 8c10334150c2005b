//! Random histories of objects against a direct reading of what the API has at their end.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use xebec_dataplane_common::service::{
    DROP_INSIDE, DROP_OUTSIDE, EXTERNAL, HASH_INSIDE, HASH_OUTSIDE, KEEP_SOURCE, SOURCE_RANGES,
};

use super::{Maps, World};

/// The API's objects by name.
#[derive(Default)]
struct Api {
    services: BTreeMap<String, Value>,
    slices: BTreeMap<String, Value>,
    zone: String,
}

/// What a frontend should be: flags, seconds, backends inside and outside.
type Wanted = (u32, u32, BTreeSet<String>, BTreeSet<String>);

struct End {
    text: String,
    local: bool,
    ready: bool,
    ends: bool,
    zones: Vec<String>,
    nodes: Vec<String>,
}

fn texts(value: &Value) -> Vec<String> {
    let all = value.as_array().into_iter().flatten();
    all.map(|one| one["name"].as_str().unwrap().to_owned())
        .collect()
}

/// All endpoints of a Service's port in one family, each once.
fn ends(api: &Api, service: &str, port: &Value, family: &str) -> Vec<End> {
    let mut all: BTreeMap<String, Vec<End>> = BTreeMap::new();
    for slice in api.slices.values() {
        let owner = &slice["metadata"]["labels"]["kubernetes.io/service-name"];
        if owner != service || slice["addressType"] != family {
            continue;
        }
        for one in slice["ports"].as_array().unwrap() {
            if (&one["name"], &one["protocol"]) != (&port["name"], &port["protocol"]) {
                continue;
            }
            for end in slice["endpoints"].as_array().unwrap() {
                let ip = end["addresses"][0].as_str().unwrap();
                let ip: std::net::IpAddr = ip.parse().unwrap();
                let number = one["port"].as_u64().unwrap() as u16;
                let text = std::net::SocketAddr::new(ip, number).to_string();
                let is =
                    |key: &str, missing: bool| end["conditions"][key].as_bool().unwrap_or(missing);
                all.entry(text.clone()).or_default().push(End {
                    text,
                    local: end["nodeName"] == "a",
                    ready: is("ready", true),
                    ends: is("serving", true) && is("terminating", false),
                    zones: texts(&end["hints"]["forZones"]),
                    nodes: texts(&end["hints"]["forNodes"]),
                });
            }
        }
    }
    // Histories name an endpoint twice only with the same state.
    all.into_values()
        .map(|mut same| same.pop().unwrap())
        .collect()
}

/// The endpoints for a policy, and whether there are any at all.
fn choose(ends: &[End], local: bool, zone: &str) -> BTreeSet<String> {
    let names = |wanted: &dyn Fn(&End) -> bool| -> BTreeSet<String> {
        let chosen = ends.iter().filter(|end| wanted(end));
        chosen.map(|end| end.text.clone()).collect()
    };
    let first_of = |all: Vec<BTreeSet<String>>| {
        all.into_iter()
            .find(|one| !one.is_empty())
            .unwrap_or_default()
    };
    if local {
        let ready = names(&|end| end.local && end.ready);
        return first_of(vec![
            ready,
            names(&|end| end.local && !end.ready && end.ends),
        ]);
    }
    let ready: Vec<&End> = ends.iter().filter(|end| end.ready).collect();
    let here = |all: &Vec<String>, me: &str| all.iter().any(|one| one == me);
    let by_node = ready.iter().all(|end| !end.nodes.is_empty());
    let by_zone = ready.iter().all(|end| !end.zones.is_empty());
    let mut all = Vec::new();
    if by_node {
        all.push(names(&|end| end.ready && here(&end.nodes, "a")));
    }
    if by_zone {
        all.push(names(&|end| end.ready && here(&end.zones, zone)));
    }
    all.push(names(&|end| end.ready));
    all.push(names(&|end| end.ends));
    first_of(all)
}

/// What should be in the kernel.
fn read(api: &Api) -> BTreeMap<String, Wanted> {
    let mut services: Vec<(&String, &Value)> = api.services.iter().collect();
    services.sort_by_key(|(name, one)| {
        (
            one["metadata"]["creationTimestamp"].as_str().unwrap(),
            *name,
        )
    });
    let mut all = BTreeMap::new();
    for (name, service) in services {
        let spec = &service["spec"];
        let is_local = |key: &str| spec[key] == "Local";
        let maglev =
            |missing: bool| match service["metadata"]["annotations"]["xebec.io/lb-algorithm"]
                .as_str()
            {
                Some(text) => text == "maglev",
                None => missing,
            };
        for port in spec["ports"].as_array().unwrap() {
            for cluster_ip in spec["clusterIPs"].as_array().unwrap() {
                let cluster_ip = cluster_ip.as_str().unwrap();
                let six = cluster_ip.contains(':');
                let ends = ends(api, name, port, if six { "IPv6" } else { "IPv4" });
                let any = ends.iter().any(|end| end.ready || end.ends);
                let mut fronts = vec![(cluster_ip.to_owned(), port["port"].clone(), "c")];
                let of = |list: &Value, kind: &'static str| -> Vec<(String, Value, &'static str)> {
                    let all = list.as_array().into_iter().flatten();
                    let ips =
                        all.map(|one| one["ip"].as_str().or(one.as_str()).unwrap().to_owned());
                    ips.filter(|ip| ip.contains(':') == six)
                        .map(|ip| (ip, port["port"].clone(), kind))
                        .collect()
                };
                fronts.extend(of(&spec["externalIPs"], "e"));
                fronts.extend(of(&service["status"]["loadBalancer"]["ingress"], "l"));
                if port["nodePort"].is_u64() {
                    let every = if six { "::" } else { "0.0.0.0" };
                    fronts.push((every.to_owned(), port["nodePort"].clone(), "n"));
                }
                for (ip, number, kind) in fronts {
                    let ip: std::net::IpAddr = ip.parse().unwrap();
                    let at = std::net::SocketAddr::new(ip, number.as_u64().unwrap() as u16);
                    let key = format!("{at}/{}", port["protocol"].as_str().unwrap());
                    let mut flags = if maglev(false) { HASH_INSIDE } else { 0 };
                    let drop =
                        |set: &BTreeSet<String>, flag| if set.is_empty() && any { flag } else { 0 };
                    let (inside, outside);
                    if kind == "c" {
                        inside = choose(&ends, is_local("internalTrafficPolicy"), &api.zone);
                        outside = inside.clone();
                        flags |= if maglev(false) { HASH_OUTSIDE } else { 0 };
                    } else {
                        inside = choose(&ends, false, &api.zone);
                        outside = choose(&ends, is_local("externalTrafficPolicy"), &api.zone);
                        flags |= EXTERNAL | if maglev(true) { HASH_OUTSIDE } else { 0 };
                        flags |= if is_local("externalTrafficPolicy") {
                            KEEP_SOURCE
                        } else {
                            0
                        };
                        let ranges = spec["loadBalancerSourceRanges"].is_array() && !six;
                        flags |= if ranges && kind == "l" {
                            SOURCE_RANGES
                        } else {
                            0
                        };
                    }
                    flags |= drop(&inside, DROP_INSIDE) | drop(&outside, DROP_OUTSIDE);
                    let affinity = if spec["sessionAffinity"] == "ClientIP" {
                        77
                    } else {
                        0
                    };
                    all.entry(key).or_insert((flags, affinity, inside, outside));
                }
            }
        }
    }
    all
}

fn kernel(maps: &Maps) -> BTreeMap<String, Wanted> {
    let named = maps.named().into_iter();
    let set = |run| maps.distinct(run);
    let all = named.map(|(name, one)| {
        (
            name,
            (one.flags, one.affinity, set(one.inside), set(one.outside)),
        )
    });
    all.collect()
}

fn random_service(rng: &mut StdRng, name: &str) -> Value {
    let number = name[1..].parse::<u32>().unwrap();
    let mut ips = vec![format!("10.96.0.{number}"), format!("fd00:96::{number:x}")];
    match rng.random_range(0..4) {
        0 => ips.reverse(),
        1 => drop(ips.remove(0)),
        2 => drop(ips.pop()),
        _ => {}
    }
    let policy = |rng: &mut StdRng| {
        if rng.random_bool(0.4) {
            "Local"
        } else {
            "Cluster"
        }
    };
    let external = rng.random_bool(0.5);
    let mut ports = Vec::new();
    for (index, name) in ["p", "q"].iter().enumerate().take(rng.random_range(1..=2)) {
        let protocol = ["TCP", "UDP", "SCTP"][rng.random_range(0..3)];
        let mut port = json!({"name": name, "port": 80 + index, "protocol": protocol});
        if external && rng.random_bool(0.7) {
            // Few, so that they meet.
            port["nodePort"] = json!(30_000 + 10 * index + rng.random_range(0..4));
        }
        ports.push(port);
    }
    let mut spec = json!({
        "type": if external { "LoadBalancer" } else { "ClusterIP" },
        "clusterIPs": ips, "ports": ports,
        "internalTrafficPolicy": policy(rng),
    });
    let mut status = json!({});
    if external {
        spec["externalTrafficPolicy"] = json!(policy(rng));
        if rng.random_bool(0.3) {
            spec["externalIPs"] = json!([
                format!("203.0.113.{}", rng.random_range(1..4)),
                "2001:db8::1"
            ]);
        }
        if rng.random_bool(0.5) {
            status = json!({"loadBalancer": {"ingress": [{"ip": format!("198.51.100.{number}")}]}});
            if rng.random_bool(0.5) {
                spec["loadBalancerSourceRanges"] =
                    json!([format!("192.0.2.{}/32", rng.random_range(0..9))]);
            }
        }
    }
    if rng.random_bool(0.3) {
        spec["sessionAffinity"] = json!("ClientIP");
        spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": 77}});
    }
    let mut metadata = json!({
        "namespace": "n", "name": name,
        "creationTimestamp": format!("2026-01-0{}T00:00:00Z", rng.random_range(1..9)),
    });
    if rng.random_bool(0.3) {
        let algorithm = if rng.random() { "maglev" } else { "random" };
        metadata["annotations"] = json!({"xebec.io/lb-algorithm": algorithm});
    }
    json!({"metadata": metadata, "spec": spec, "status": status})
}

fn random_slice(rng: &mut StdRng, name: &str, services: u32) -> Value {
    let six = rng.random_bool(0.4);
    let hints = rng.random_range(0..3);
    let mut endpoints = Vec::new();
    for _ in 0..rng.random_range(0..6) {
        // Each slice has addresses of its own, so that no two disagree; now and then one stands there twice.
        let own = name[1..].parse::<u32>().unwrap();
        let number = rng.random_range(1..9);
        if endpoints.iter().any(|one: &Value| one["number"] == number) {
            continue;
        }
        let address = if six {
            format!("fd00:1:{own:x}::{number}")
        } else {
            format!("10.1.{own}.{number}")
        };
        let mut one = json!({
            "number": number,
            "addresses": [address], "nodeName": (["a", "b", "c"][rng.random_range(0..3)]),
            "conditions": {"ready": rng.random_bool(0.6), "terminating": rng.random_bool(0.4)},
        });
        if rng.random_bool(0.7) {
            one["conditions"]["serving"] = json!(rng.random_bool(0.7));
        }
        if hints > 0 && rng.random_bool(0.9) {
            one["hints"] = json!({"forZones": [{"name": if rng.random() { "z" } else { "y" }}]});
            if hints > 1 && rng.random_bool(0.9) {
                one["hints"]["forNodes"] = json!([{"name": if rng.random() { "a" } else { "b" }}]);
            }
        }
        endpoints.push(one);
    }
    let ports: Vec<Value> = ["p", "q"]
        .iter()
        .flat_map(|name| ["TCP", "UDP", "SCTP"].map(|protocol| (name, protocol)))
        .filter(|_| rng.random_bool(0.7))
        .map(|(name, protocol)| json!({"name": name, "port": 8080, "protocol": protocol}))
        .collect();
    json!({
        "metadata": {"namespace": "n", "name": name, "labels": {
            "kubernetes.io/service-name": format!("s{}", rng.random_range(1..=services)),
        }},
        "addressType": if six { "IPv6" } else { "IPv4" },
        "endpoints": endpoints, "ports": ports,
    })
}

fn change(rng: &mut StdRng, api: &mut Api, world: &mut World) {
    const SERVICES: u32 = 8;
    let service = format!("s{}", rng.random_range(1..=SERVICES));
    let slice = format!("e{}", rng.random_range(1..=14));
    match rng.random_range(0..20) {
        0..=5 => {
            let object = random_service(rng, &service);
            world.service(object.clone());
            api.services.insert(service, object);
        }
        6 | 7 => {
            world.tables.remove_service(&format!("n/{service}"));
            api.services.remove(&service);
        }
        8..=16 => {
            let object = random_slice(rng, &slice, SERVICES);
            world.slice(object.clone());
            api.slices.insert(slice, object);
        }
        17 | 18 => {
            world.tables.remove_slice(&format!("n/{slice}"));
            api.slices.remove(&slice);
        }
        _ => {
            api.zone = ["", "z", "y"][rng.random_range(0..3)].to_owned();
            world.tables.set_zone(&api.zone);
        }
    }
}

#[test]
fn random_histories_end_as_a_direct_reading_says() {
    let given = std::env::var("XEBEC_MODEL_SEED").ok();
    let mut seed = given.map_or_else(rand::random, |seed| seed.parse().unwrap());
    for _ in 0..20 {
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let (mut api, mut world) = (Api::default(), World::new());
        for step in 0..150 {
            for _ in 0..rng.random_range(1..4) {
                change(&mut rng, &mut api, &mut world);
            }
            world.now += Duration::from_millis(rng.random_range(0..30));
            if rng.random_bool(0.1) {
                world.kernel.0.borrow_mut().fail = 1;
                let _ = world.tables.sync(world.now);
                world.kernel.0.borrow_mut().fail = 0;
            }
            world.tables.sync(world.now).unwrap();
            let maps = world.kernel.0.borrow();
            let (wanted, there) = (read(&api), kernel(&maps));
            for (name, value) in &wanted {
                assert_eq!(there.get(name), Some(value), "{name} at step {step}");
            }
            assert_eq!(wanted.len(), there.len(), "at step {step}");
        }
        for name in api.services.keys() {
            world.tables.remove_service(&format!("n/{name}"));
        }
        for name in api.slices.keys() {
            world.tables.remove_slice(&format!("n/{name}"));
        }
        world.sync();
        // Nothing is left, of anything.
        assert_eq!(world.tables.sizes(), [0; 5]);
        let maps = world.kernel.0.borrow();
        assert!(maps.frontends.is_empty() && maps.ranges.is_empty());
        assert!(maps.backends.values().all(|one| one.generation & 1 == 0));
        let used = world.tables.used();
        assert_eq!(
            (used.frontends, used.chunks, used.backends, used.ranges),
            (0, 0, 1, 0)
        );
        seed = rng.random();
    }
}

#[test]
fn churn_of_a_minute_leaves_what_the_objects_say_and_takes_no_room() {
    let seed = rand::random::<u64>();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let (mut api, mut world) = (Api::default(), World::new());
    let changes = if cfg!(debug_assertions) {
        20_000
    } else {
        60_000
    };
    for _ in 0..changes {
        change(&mut rng, &mut api, &mut world);
        world.now += Duration::from_millis(1);
        world.tables.sync(world.now).unwrap();
    }
    let maps = world.kernel.0.borrow();
    // The highest number ever used. What rests keeps room as well: about a thousand chunks and 60 backends at most, of
    // the tens of thousands that were given away.
    assert!(maps.chunks.keys().next_back() < Some(&4_000));
    assert!(maps.backends.keys().next_back() < Some(&400));
    assert_eq!(kernel(&maps), read(&api));
}
