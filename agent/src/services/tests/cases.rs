//! One thing after the other that users do, and what has to be in the kernel then.

use serde_json::json;
use xebec_dataplane_common::service::{
    DROP_INSIDE, DROP_OUTSIDE, EXTERNAL, HASH_INSIDE, HASH_OUTSIDE, KEEP_SOURCE, SOURCE_RANGES,
    THIS_NODE,
};

use super::{World, service, slice};
use crate::host_ports::HostPort;

fn texts(all: &[&str]) -> Vec<String> {
    all.iter().map(|one| (*one).to_owned()).collect()
}

#[test]
fn every_kind_of_frontend() {
    let mut world = World::new();
    let mut one = service(
        "a",
        json!({
            "type": "LoadBalancer", "clusterIPs": ["10.96.0.1", "fd00::1"],
            "externalIPs": ["203.0.113.1"], "externalTrafficPolicy": "Local",
            "ports": [{"name": "p", "port": 80, "nodePort": 30080}],
            "loadBalancerSourceRanges": [" 198.51.100.7/24 "],
            "sessionAffinity": "ClientIP",
        }),
    );
    one["status"] = json!({"loadBalancer": {"ingress": [
        {"ip": "203.0.113.2"}, {"ip": "203.0.113.3", "ipMode": "Proxy"}, {"hostname": "x"},
    ]}});
    world.service(one);
    world.slice(slice(
        "a",
        "s",
        &[("10.0.0.1", "a", "r"), ("10.0.0.2", "b", "r")],
    ));
    world.sync();
    let both = texts(&["10.0.0.1:8080", "10.0.0.2:8080"]);
    let here = texts(&["10.0.0.1:8080"]);
    let local = EXTERNAL | KEEP_SOURCE | HASH_OUTSIDE;
    let wanted = [
        ("10.96.0.1:80/TCP", &both, &both, 0),
        ("0.0.0.0:30080/TCP", &both, &here, local),
        ("203.0.113.1:80/TCP", &both, &here, local),
        ("203.0.113.2:80/TCP", &both, &here, local | SOURCE_RANGES),
    ];
    for (frontend, inside, outside, flags) in wanted {
        let served = world.served(frontend);
        assert_eq!(
            served,
            Some((inside.clone(), outside.clone())),
            "{frontend}"
        );
        assert_eq!(world.flags(frontend), flags, "{frontend}");
    }
    let maps = world.kernel.0.borrow();
    let named = maps.named();
    // And those of IPv6, with nothing behind them: refused.
    assert_eq!(named.len(), 6);
    for frontend in ["[fd00::1]:80/TCP", "[::]:30080/TCP"] {
        let value = named[frontend];
        assert_eq!((value.inside.count, value.outside.count), (0, 0));
        assert_eq!(value.flags & (DROP_INSIDE | DROP_OUTSIDE), 0);
    }
    assert!(named.values().all(|value| value.affinity == 10_800));
    let number = named["10.96.0.1:80/TCP"].service;
    let same = named.values().filter(|value| value.service == number);
    assert_eq!(same.count(), 4);
    let ranges: Vec<_> = maps.ranges.iter().collect();
    assert_eq!(ranges, [&(number, "198.51.100.0/24".parse().unwrap())]);
    drop(maps);
    let rows = world.tables.rows();
    let row = rows.iter().find(|row| row["type"] == "NodePort").unwrap();
    assert_eq!(row["frontend"], "0.0.0.0:30080/TCP");
    assert_eq!(
        (&row["service"], &row["port"]),
        (&json!("n/a"), &json!("p"))
    );
    assert_eq!(
        row["algorithm"],
        json!({"inside": "random", "outside": "maglev"})
    );
    assert_eq!(row["outside"][0]["backend"], "10.0.0.1:8080");
    assert_eq!(row["outside"][0]["local"], true);
    assert_eq!(
        (&row["inside"][1]["node"], &row["state"]),
        (&json!("b"), &json!("ok"))
    );
    world.tables.remove_service("n/a");
    world.tables.remove_slice("n/s");
    world.sync();
    assert_eq!(world.tables.sizes(), [0; 5]);
    assert!(world.kernel.0.borrow().frontends.is_empty());
    assert_eq!(world.tables.used().chunks, 0);
}

#[test]
fn those_that_are_no_matter_of_ours() {
    let mut world = World::new();
    world.service(service("none", json!({"clusterIPs": ["None"]})));
    world.service(service(
        "name",
        json!({"type": "ExternalName", "clusterIPs": [], "externalName": "x"}),
    ));
    let mut other = service("other", json!({}));
    other["metadata"]["labels"] = json!({"service.kubernetes.io/service-proxy-name": "x"});
    world.service(other);
    let mut headless = slice("h", "h", &[("10.0.0.1", "a", "r")]);
    headless["metadata"]["labels"]["service.kubernetes.io/headless"] = json!("");
    world.slice(headless);
    let mut names = slice("x", "fqdn", &[("10.0.0.1", "a", "r")]);
    names["addressType"] = json!("FQDN");
    world.slice(names);
    world.sync();
    assert_eq!(world.tables.sizes(), [0; 5]);
    // One that was ours is no more.
    world.service(service("a", json!({})));
    world.sync();
    assert!(world.served("10.96.0.1:80/TCP").is_some());
    world.service(service("a", json!({"clusterIPs": ["None"]})));
    world.sync();
    assert!(world.served("10.96.0.1:80/TCP").is_none());
    assert!(world.told().is_empty());
}

#[test]
fn no_endpoint_here_is_dropped_and_none_anywhere_refused() {
    let mut world = World::new();
    let spec = json!({
        "type": "NodePort", "ports": [{"name": "p", "port": 80, "nodePort": 30080}],
        "externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local",
    });
    world.service(service("a", spec));
    world.slice(slice("a", "s", &[("10.0.0.2", "b", "r")]));
    world.sync();
    let away = texts(&["10.0.0.2:8080"]);
    assert_eq!(world.served("10.96.0.1:80/TCP"), Some((vec![], vec![])));
    assert_eq!(world.flags("10.96.0.1:80/TCP"), DROP_INSIDE | DROP_OUTSIDE);
    assert_eq!(world.served("0.0.0.0:30080/TCP"), Some((away, vec![])));
    assert_eq!(
        world.flags("0.0.0.0:30080/TCP") & (DROP_INSIDE | DROP_OUTSIDE),
        DROP_OUTSIDE
    );
    world.slice(slice("a", "s", &[("10.0.0.2", "b", "")]));
    world.sync();
    assert_eq!(world.flags("10.96.0.1:80/TCP"), 0);
    assert_eq!(
        world.flags("0.0.0.0:30080/TCP") & (DROP_INSIDE | DROP_OUTSIDE),
        0
    );
}

/// The generation of the backend with this address.
fn generation(world: &World, address: &str) -> Option<u32> {
    let maps = world.kernel.0.borrow();
    let ip = address.parse::<std::net::IpAddr>().unwrap();
    let mut all = maps.backends.values();
    let found = all.find(|one| std::net::IpAddr::from(one.address) == ip);
    found.map(|one| one.generation)
}

#[test]
fn a_backend_lives_as_long_as_its_connections_may() {
    let mut world = World::new();
    world.service(service("a", json!({})));
    world.service(service("b", json!({"clusterIPs": ["10.96.0.2"]})));
    let frontend = "10.96.0.1:80/TCP";
    world.slice(slice(
        "a",
        "s",
        &[("10.0.0.1", "a", "r"), ("10.0.0.2", "a", "r")],
    ));
    world.slice(slice("b", "t", &[("10.0.0.1", "a", "r")]));
    world.sync();
    assert_eq!(world.kernel.0.borrow().backends.len(), 2);
    // It ends: nothing new, but what it has goes on.
    world.slice(slice(
        "a",
        "s",
        &[("10.0.0.1", "a", "st"), ("10.0.0.2", "a", "r")],
    ));
    world.slice(slice("b", "t", &[]));
    world.sync();
    assert_eq!(world.served(frontend).unwrap().0, ["10.0.0.2:8080"]);
    assert_eq!(generation(&world, "10.0.0.1"), Some(1));
    let rows = world.tables.rows();
    let row = rows.iter().find(|row| row["service"] == "n/a").unwrap();
    assert_eq!(row["inside"][0]["state"], "terminating");
    assert_eq!(row["inside"][0]["weight"], 0);
    // Not even serving: still there.
    world.slice(slice(
        "a",
        "s",
        &[("10.0.0.1", "a", "t"), ("10.0.0.2", "a", "")],
    ));
    world.sync();
    assert_eq!(world.served(frontend), Some((vec![], vec![])));
    assert_eq!(
        (
            generation(&world, "10.0.0.1"),
            generation(&world, "10.0.0.2")
        ),
        (Some(1), Some(1))
    );
    // Gone.
    world.slice(slice("a", "s", &[("10.0.0.2", "a", "r")]));
    world.sync();
    assert_eq!(generation(&world, "10.0.0.1"), Some(2));
    // Another time it is another.
    world.slice(slice(
        "a",
        "s",
        &[("10.0.0.1", "a", "r"), ("10.0.0.2", "a", "r")],
    ));
    world.sync();
    assert_eq!(generation(&world, "10.0.0.1"), Some(3));
}

#[test]
fn datagrams_leave_a_backend_that_does_not_answer() {
    let mut world = World::new();
    let port = json!([{"name": "p", "port": 53, "protocol": "UDP"}]);
    world.service(service("a", json!({"ports": port})));
    let mut udp = |endpoints: &[(&str, &str, &str)]| {
        let mut one = slice("a", "s", endpoints);
        one["ports"][0]["protocol"] = json!("UDP");
        world.slice(one);
        world.sync();
        generation(&world, "10.0.0.1")
    };
    assert_eq!(udp(&[("10.0.0.1", "a", "r")]), Some(1));
    assert_eq!(
        udp(&[("10.0.0.1", "a", "s"), ("10.0.0.2", "a", "r")]),
        Some(1)
    );
    assert_eq!(
        udp(&[("10.0.0.1", "a", ""), ("10.0.0.2", "a", "r")]),
        Some(2)
    );
    // Nor do they wait for one that ends.
    assert_eq!(udp(&[("10.0.0.1", "a", "r")]), Some(3));
    assert_eq!(
        udp(&[("10.0.0.1", "a", "st"), ("10.0.0.2", "a", "r")]),
        Some(3)
    );
    assert_eq!(
        udp(&[("10.0.0.1", "a", "t"), ("10.0.0.2", "a", "r")]),
        Some(4)
    );
}

#[test]
fn one_change_touches_one_service() {
    let mut world = World::new();
    for number in 0..50 {
        let name = format!("s{number}");
        world.service(service(
            &name,
            json!({"clusterIPs": [format!("10.96.1.{number}")]}),
        ));
        world.slice(slice(
            &name,
            &name,
            &[(&format!("10.0.1.{number}"), "a", "r")],
        ));
    }
    world.sync();
    world.kernel.0.borrow_mut().writes = [0; 3];
    world.slice(slice(
        "s7",
        "s7",
        &[("10.0.1.7", "a", "r"), ("10.0.2.7", "a", "r")],
    ));
    world.sync();
    assert_eq!(world.kernel.0.borrow().writes, [1, 1, 1]);
    // What changes nothing writes nothing.
    world.slice(slice(
        "s7",
        "s7",
        &[("10.0.2.7", "a", "r"), ("10.0.1.7", "a", "r")],
    ));
    world.service(service("s7", json!({"clusterIPs": ["10.96.1.7"]})));
    world.sync();
    assert_eq!(world.kernel.0.borrow().writes, [1, 1, 1]);
}

#[test]
fn the_older_service_has_the_port_and_the_other_is_told() {
    let mut world = World::new();
    let with_port = |name: &str, ip: &str, created: &str| {
        let mut one = service(
            name,
            json!({"type": "NodePort", "clusterIPs": [ip],
                "ports": [{"name": "p", "port": 80, "nodePort": 30080}]}),
        );
        one["metadata"]["creationTimestamp"] = json!(created);
        one
    };
    for (name, ip) in [
        ("new", "10.0.0.1"),
        ("old", "10.0.0.2"),
        ("older", "10.0.0.3"),
    ] {
        world.slice(slice(name, name, &[(ip, "a", "r")]));
    }
    let port = "0.0.0.0:30080/TCP";
    world.service(with_port("new", "10.96.0.1", "2026-01-03T00:00:00Z"));
    world.sync();
    assert_eq!(world.served(port).unwrap().0, ["10.0.0.1:8080"]);
    assert!(world.told().is_empty());
    world.service(with_port("old", "10.96.0.2", "2026-01-02T00:00:00Z"));
    world.sync();
    assert_eq!(world.served(port).unwrap().0, ["10.0.0.2:8080"]);
    assert_eq!(world.told(), ["n/new PortConflict"]);
    assert_eq!(world.state("n/new", port), "conflict");
    assert_eq!(world.state("n/new", "10.96.0.1:80/TCP"), "ok");
    // The loser's endpoints change: the winner stays, and nobody is told again.
    world.slice(slice("new", "new", &[("10.0.0.9", "a", "r")]));
    world.service(with_port("older", "10.96.0.3", "2026-01-01T00:00:00Z"));
    world.sync();
    assert_eq!(world.served(port).unwrap().0, ["10.0.0.3:8080"]);
    assert_eq!(world.told(), ["n/old PortConflict"]);
    world.tables.remove_service("n/older");
    world.sync();
    assert_eq!(world.served(port).unwrap().0, ["10.0.0.2:8080"]);
    world.tables.remove_service("n/old");
    world.sync();
    assert_eq!(world.served(port).unwrap().0, ["10.0.0.9:8080"]);
    assert_eq!(world.state("n/new", port), "ok");
    // Deleted and made again while nobody looked: it is the younger now.
    world.service(with_port("old", "10.96.0.2", "2026-01-02T00:00:00Z"));
    world.sync();
    world.service(with_port("old", "10.96.0.2", "2026-01-04T00:00:00Z"));
    world.sync();
    assert_eq!(world.served(port).unwrap().0, ["10.0.0.9:8080"]);
    assert_eq!(world.state("n/old", port), "conflict");
}

#[test]
fn a_node_port_goes_from_one_port_of_a_service_to_another() {
    let mut world = World::new();
    let ports = |first: u16, second: u16| {
        json!({"type": "NodePort", "ports": [
            {"name": "p", "port": first, "nodePort": 30080},
            {"name": "p", "port": second, "nodePort": 30081},
        ]})
    };
    world.slice(slice("a", "s", &[("10.0.0.1", "a", "r")]));
    for (first, second) in [(80, 81), (81, 80), (82, 81), (81, 82), (90, 91), (90, 90)] {
        world.service(service("a", ports(first, second)));
        world.sync();
        let named = world.kernel.0.borrow().named();
        let number = |frontend: &str| named[frontend].service;
        assert_eq!(
            number("0.0.0.0:30080/TCP"),
            number(&format!("10.96.0.1:{first}/TCP"))
        );
        if first != second {
            assert_eq!(
                number("0.0.0.0:30081/TCP"),
                number(&format!("10.96.0.1:{second}/TCP"))
            );
            assert_eq!(named.len(), 4);
        }
    }
}

#[test]
fn weights_and_algorithms_by_annotation() {
    let mut world = World::new();
    let mut one = service("a", json!({}));
    one["metadata"]["annotations"] = json!({
        "xebec.io/lb-algorithm": "maglev", "xebec.io/weights": r#"{"10.0.0.1": 3, "10.0.0.3": 0}"#,
    });
    world.service(one.clone());
    world.slice(slice(
        "a",
        "s",
        &[
            ("10.0.0.1", "a", "r"),
            ("10.0.0.2", "a", "r"),
            ("10.0.0.3", "a", "r"),
        ],
    ));
    world.sync();
    let frontend = "10.96.0.1:80/TCP";
    assert_eq!(world.flags(frontend), HASH_INSIDE | HASH_OUTSIDE);
    let share = |world: &World| {
        let maps = world.kernel.0.borrow();
        let targets = maps.targets(maps.named()[frontend].inside);
        let of = |text: &str| targets.iter().filter(|one| *one == text).count();
        (
            of("10.0.0.1:8080"),
            of("10.0.0.2:8080"),
            of("10.0.0.3:8080"),
        )
    };
    let (three, one_part, none) = share(&world);
    assert!(
        three.abs_diff(one_part * 3) <= 4 && none == 0,
        "{three} {one_part}"
    );
    one["metadata"]["annotations"]["xebec.io/lb-algorithm"] = json!("random");
    world.service(one.clone());
    world.sync();
    assert_eq!((share(&world), world.flags(frontend)), ((3, 1, 0), 0));
    assert!(world.told().is_empty());
    one["metadata"]["annotations"] =
        json!({"xebec.io/lb-algorithm": "best", "xebec.io/weights": "3"});
    world.service(one);
    world.sync();
    assert_eq!((share(&world), world.flags(frontend)), ((1, 1, 1), 0));
    assert_eq!(world.told(), ["n/a InvalidService"]);
}

#[test]
fn garbage_is_named_and_the_rest_works() {
    let mut world = World::new();
    world.service(service("good", json!({})));
    world.slice(slice("good", "good", &[("10.0.0.1", "a", "r")]));
    world.service(service(
        "bad",
        json!({
            "clusterIPs": ["0.0.0.0"], "externalIPs": ["127.0.0.1", "ff02::1", "::ffff:10.0.0.1", "x"],
            "ports": [{"port": 0}, {"port": 70000}, {"port": 1, "protocol": "ICMP"}],
        }),
    ));
    world.service(json!({"metadata": {"namespace": "n", "name": "worse"}, "spec": {"ports": 7}}));
    world.service(json!({"spec": {}}));
    world.service(service("odd", json!({"clusterIPs": ["10.96.0.2"], "ports": [
        {"port": 80, "nodePort": -1}, {"port": 80, "nodePort": 30000}, {"port": 443, "nodePort": 99999},
    ]})));
    let mut bad = slice(
        "good",
        "bad",
        &[
            ("127.0.0.1", "a", "r"),
            ("169.254.169.254", "a", "r"),
            ("fd00::1", "a", "r"),
            ("0.0.0.0", "a", "r"),
            ("224.0.0.1", "a", "r"),
            ("300.0.0.1", "a", "r"),
            ("10.0.0.2", "a", "r"),
        ],
    );
    bad["endpoints"][5]["addresses"] = json!([]);
    bad["ports"] = json!([{"name": "p", "port": 8080}, {"name": "p", "port": -5}, {"name": "q"}]);
    world.slice(bad);
    world.slice(json!({"metadata": {"namespace": "n", "name": "alone"}, "endpoints": []}));
    world.sync();
    let served = world.served("10.96.0.1:80/TCP").unwrap().0;
    assert_eq!(served, ["10.0.0.1:8080", "10.0.0.2:8080"]);
    let frontends: Vec<String> = world.kernel.0.borrow().named().into_keys().collect();
    assert_eq!(
        frontends,
        ["10.96.0.1:80/TCP", "10.96.0.2:443/TCP", "10.96.0.2:80/TCP"]
    );
    let mut told = world.told();
    told.sort();
    assert_eq!(
        told,
        [
            "n/bad InvalidService",
            "n/good InvalidEndpoints",
            "n/odd InvalidService",
            "n/worse InvalidService"
        ]
    );
    let rows = world.tables.rows();
    let invalid = rows
        .iter()
        .filter(|row| row["state"].as_str().unwrap().starts_with("invalid: "));
    assert!(invalid.count() >= 6);
}

#[test]
fn an_endpoint_in_two_slices_is_one() {
    let mut world = World::new();
    let policy = json!({"internalTrafficPolicy": "Local"});
    world.service(service("a", policy));
    for names in [["s", "t"], ["t", "s"]] {
        world.slice(slice("a", names[0], &[("10.0.0.1", "b", "r")]));
        world.slice(slice(
            "a",
            names[1],
            &[("10.0.0.1", "a", "r"), ("10.0.0.2", "b", "r")],
        ));
        world.sync();
        assert_eq!(
            world.served("10.96.0.1:80/TCP").unwrap().0,
            ["10.0.0.1:8080"]
        );
    }
    // A slice can go to another Service.
    world.service(service("b", json!({"clusterIPs": ["10.96.0.2"]})));
    world.slice(slice("b", "s", &[("10.0.0.1", "a", "r")]));
    world.slice(slice("b", "t", &[]));
    world.sync();
    assert_eq!(
        world.served("10.96.0.2:80/TCP").unwrap().0,
        ["10.0.0.1:8080"]
    );
    assert_eq!(world.served("10.96.0.1:80/TCP").unwrap().0.len(), 0);
}

#[test]
fn host_ports_are_frontends_after_services() {
    let mut world = World::new();
    let port = |host_ip: Option<&str>, host_port: u16, pod: &str| HostPort {
        protocol: 6,
        host_ip: host_ip.map(|ip| ip.parse().unwrap()),
        host_port,
        pod_ip: pod.parse().unwrap(),
        container_port: 80,
    };
    let all = [
        port(None, 8080, "10.0.0.1"),
        port(Some("192.0.2.1"), 8081, "10.0.0.1"),
        port(None, 8080, "fd00::5"),
        port(None, 30080, "10.0.0.1"),
    ];
    world.tables.set_host_ports(&all);
    world.sync();
    let pod = texts(&["10.0.0.1:80"]);
    for frontend in [
        "0.0.0.0:8080/TCP",
        "192.0.2.1:8081/TCP",
        "0.0.0.0:30080/TCP",
    ] {
        assert_eq!(
            world.served(frontend),
            Some((pod.clone(), pod.clone())),
            "{frontend}"
        );
        assert_eq!(world.flags(frontend), EXTERNAL | KEEP_SOURCE | THIS_NODE);
    }
    assert_eq!(world.served("[::]:8080/TCP").unwrap().0, ["[fd00::5]:80"]);
    let spec = json!({"type": "NodePort", "ports": [{"name": "p", "port": 80, "nodePort": 30080}]});
    world.service(service("a", spec));
    world.slice(slice("a", "s", &[("10.0.0.9", "a", "r")]));
    world.sync();
    assert_eq!(
        world.served("0.0.0.0:30080/TCP").unwrap().0,
        ["10.0.0.9:8080"]
    );
    world.tables.set_host_ports(&[]);
    world.sync();
    assert_eq!(world.kernel.0.borrow().frontends.len(), 2);
    world.tables.set_host_ports(&all);
    world.tables.remove_service("n/a");
    world.sync();
    assert_eq!(
        world.served("0.0.0.0:30080/TCP").unwrap().0,
        ["10.0.0.1:80"]
    );
}

#[test]
fn health_counts_ready_endpoints_of_this_node() {
    let mut world = World::new();
    let spec = |policy: &str| {
        service(
            "a",
            json!({"type": "LoadBalancer", "externalTrafficPolicy": policy, "healthCheckNodePort": 32000}),
        )
    };
    world.service(spec("Local"));
    world.slice(slice(
        "a",
        "s",
        &[
            ("10.0.0.1", "a", "r"),
            ("10.0.0.2", "a", "st"),
            ("10.0.0.3", "b", "r"),
        ],
    ));
    world.sync();
    assert_eq!(
        world.tables.take_health(),
        [("n/a".into(), Some((32000, 1)))]
    );
    world.slice(slice(
        "a",
        "s",
        &[("10.0.0.2", "a", "st"), ("10.0.0.3", "b", "r")],
    ));
    world.sync();
    assert_eq!(
        world.tables.take_health(),
        [("n/a".into(), Some((32000, 0)))]
    );
    world.service(spec("Cluster"));
    world.sync();
    assert_eq!(world.tables.take_health(), [("n/a".into(), None)]);
}

#[test]
fn zones_are_followed() {
    let mut world = World::new();
    world.service(service("a", json!({})));
    let mut one = slice("a", "s", &[("10.0.0.1", "b", "r"), ("10.0.0.2", "c", "r")]);
    for (index, zone) in ["z", "y"].iter().enumerate() {
        one["endpoints"][index]["hints"] = json!({"forZones": [{"name": zone}]});
    }
    world.slice(one);
    world.sync();
    let inside = |world: &World| world.served("10.96.0.1:80/TCP").unwrap().0;
    assert_eq!(inside(&world).len(), 2);
    world.tables.set_zone("y");
    world.sync();
    assert_eq!(inside(&world), ["10.0.0.2:8080"]);
    world.tables.set_zone("x");
    world.sync();
    assert_eq!(inside(&world).len(), 2);
}

#[test]
fn a_service_of_twenty_thousand_endpoints() {
    let mut world = World::new();
    world.service(service("a", json!({"externalIPs": ["203.0.113.1"]})));
    for part in 0..200 {
        let ips: Vec<String> = (0..100)
            .map(|at| format!("10.{}.{}.{at}", 1 + part / 100, part % 100))
            .collect();
        let all: Vec<(&str, &str, &str)> = ips.iter().map(|ip| (&**ip, "b", "r")).collect();
        world.slice(slice("a", &format!("s{part}"), &all));
    }
    world.sync();
    let (inside, outside) = world.served("10.96.0.1:80/TCP").unwrap();
    assert_eq!((inside.len(), outside.len()), (20_000, 20_000));
    assert_eq!(world.served("203.0.113.1:80/TCP").unwrap().1.len(), 20_000);
    assert!(world.told().is_empty());
}
