//! Maps that are full, are replaced, or refuse.

use std::time::Duration;

use serde_json::json;
use xebec_dataplane_common::service::{Backend, ENDING};

use super::{Plain, ROOM, World, service, slice};
use crate::maps::Room;
use crate::services::tables::Tables;

fn add(world: &mut World, number: u32, endpoints: u32) {
    let name = format!("s{number}");
    world.service(service(
        &name,
        json!({"clusterIPs": [format!("10.96.1.{number}")]}),
    ));
    let ips: Vec<String> = (0..endpoints)
        .map(|at| format!("10.{number}.{}.{}", at / 250, at % 250))
        .collect();
    let all: Vec<(&str, &str, &str)> = ips.iter().map(|ip| (&**ip, "a", "r")).collect();
    world.slice(slice(&name, &name, &all));
    world.sync();
}

/// How many backends a Service's frontend has.
fn served(world: &World, number: u32) -> Option<usize> {
    let (inside, _) = world.served(&format!("10.96.1.{number}:80/TCP"))?;
    Some(inside.len())
}

#[test]
fn what_does_not_fit_is_named_and_the_rest_goes_on() {
    let few = [
        Room {
            frontends: 2,
            ..ROOM
        },
        Room { chunks: 3, ..ROOM },
        Room {
            backends: 1 + 41,
            ..ROOM
        },
    ];
    for room in few {
        let mut world = World::with(room);
        add(&mut world, 1, 20);
        add(&mut world, 2, 10);
        assert!(world.told().is_empty());
        add(&mut world, 3, 20);
        assert_eq!(world.told(), ["n/s3 DataplaneFull"], "{room:?}");
        assert_eq!(world.state("n/s3", "10.96.1.3:80/TCP"), "full");
        assert_eq!(
            (served(&world, 1), served(&world, 2), served(&world, 3)),
            (Some(20), Some(10), None)
        );
        let need = world.tables.need();
        assert!(
            need.frontends > room.frontends
                || need.chunks > room.chunks
                || need.backends > room.backends,
            "{need:?} {room:?}"
        );
        // It stays so, and is told once.
        add(&mut world, 3, 21);
        assert!(world.told().is_empty());
        // One that is there grows too large: it stays as it was, and is named.
        if room.chunks == 3 {
            add(&mut world, 2, 40);
            assert_eq!(
                (world.told(), served(&world, 2)),
                (vec!["n/s2 DataplaneFull".to_owned()], Some(10))
            );
            add(&mut world, 2, 10);
        }
        // Room is made.
        world.tables.remove_service("n/s1");
        world.tables.remove_slice("n/s1");
        world.sync();
        while world.tables.wants_another_try() {
            world.sync();
        }
        assert_eq!(
            (served(&world, 2), served(&world, 3)),
            (Some(10), Some(21)),
            "{room:?}"
        );
        assert_eq!(world.state("n/s3", "10.96.1.3:80/TCP"), "ok");
        let (used, need) = (world.tables.used(), world.tables.need());
        assert_eq!(used, need);
    }
}

#[test]
fn larger_maps_take_over_with_the_same_numbers() {
    let small = Room { chunks: 3, ..ROOM };
    let mut world = World::with(small);
    world.tables.expect_growth();
    world
        .tables
        .set_node_addresses([("192.0.2.1".parse().unwrap(), 1)].into())
        .unwrap();
    for number in 1..=3 {
        add(&mut world, number, 20);
    }
    assert_eq!((served(&world, 1), served(&world, 2)), (Some(20), None));
    // Users are not told of what is about to fit.
    assert!(world.told().is_empty() && world.tables.waits_for_growth());
    let backends = world.kernel.0.borrow().backends.clone();
    let number = world.kernel.0.borrow().named()["10.96.1.1:80/TCP"].service;
    // Something is decided and not yet written when the maps are replaced.
    world.slice(slice("s1", "s1", &[("10.1.0.0", "a", "r")]));
    let larger = Plain::new(Room {
        chunks: 100,
        ..ROOM
    });
    world.now += Duration::from_millis(25);
    world.tables.rewrite(larger.clone(), world.now).unwrap();
    world.kernel = larger;
    world.sync();
    assert_eq!(
        [1, 2, 3].map(|number| served(&world, number)),
        [Some(1), Some(20), Some(20)]
    );
    let maps = world.kernel.0.borrow();
    assert_eq!(maps.named()["10.96.1.1:80/TCP"].service, number);
    assert_eq!(maps.addresses.len(), 1);
    for (number, backend) in backends
        .into_iter()
        .filter(|(_, one)| one.generation & 1 == 1)
    {
        let now = maps.backends[&number];
        let gone = now.generation & 1 == 0;
        assert_eq!((now.address, now.port), (backend.address, backend.port));
        assert_eq!(now.generation, backend.generation + u32::from(gone));
    }
    drop(maps);
    let (used, need) = (world.tables.used(), world.tables.need());
    assert_eq!((used, need), (need, used));
    assert_eq!(used.chunks, 5);
    assert!(world.told().is_empty() && !world.tables.waits_for_growth());
}

#[test]
fn a_larger_map_of_backends_takes_over_by_itself() {
    let small = Room {
        backends: 1 + 25,
        ..ROOM
    };
    let mut world = World::with(small);
    world.tables.expect_growth();
    add(&mut world, 1, 20);
    // They share most of them.
    for number in [2, 3] {
        let name = format!("s{number}");
        world.service(service(
            &name,
            json!({"clusterIPs": [format!("10.96.1.{number}")]}),
        ));
        let ips: Vec<String> = (0..30).map(|at| format!("10.9.0.{at}")).collect();
        let all: Vec<(&str, &str, &str)> = ips.iter().map(|ip| (&**ip, "a", "r")).collect();
        world.slice(slice(&name, &name, &all));
    }
    world.sync();
    assert_eq!(
        [1, 2, 3].map(|number| served(&world, number)),
        [Some(20), None, None]
    );
    let need = world.tables.whole_need();
    assert_eq!((need.backends, need.frontends), (1 + 20 + 30, 3));
    let larger = Plain::new(Room {
        backends: need.backends,
        ..ROOM
    });
    {
        let (from, mut to) = (world.kernel.0.borrow(), larger.0.borrow_mut());
        to.frontends = from.frontends.clone();
        to.chunks = from.chunks.clone();
    }
    world.tables.copy_backends(&mut larger.clone()).unwrap();
    let all = |kernel: &Plain| kernel.0.borrow().backends.clone();
    assert_eq!(all(&larger), all(&world.kernel));
    world.tables.change_backends(larger.clone());
    world.kernel = larger;
    world.sync();
    assert_eq!(
        [1, 2, 3].map(|number| served(&world, number)),
        [Some(20), Some(30), Some(30)]
    );
    assert!(world.told().is_empty() && !world.tables.waits_for_growth());
}

#[test]
fn who_had_room_keeps_it_when_maps_grow_and_still_do_not_do() {
    let small = Room { chunks: 3, ..ROOM };
    let mut world = World::with(small);
    world.tables.expect_growth();
    for number in 1..=3 {
        add(&mut world, number, 20);
    }
    // The one that fits is the last by age and by number.
    add(&mut world, 1, 400);
    add(&mut world, 2, 400);
    assert_eq!(served(&world, 1), Some(20));
    world.tables.remove_service("n/s1");
    world.tables.remove_slice("n/s1");
    world.sync();
    while world.tables.wants_another_try() {
        world.sync();
    }
    assert_eq!((served(&world, 2), served(&world, 3)), (None, Some(20)));
    let larger = Plain::new(Room { chunks: 26, ..ROOM });
    world.now += Duration::from_millis(25);
    world.tables.rewrite(larger.clone(), world.now).unwrap();
    world.kernel = larger;
    world.sync();
    assert_eq!((served(&world, 2), served(&world, 3)), (None, Some(20)));
    // Now it is sure, and told once.
    assert!(world.told().is_empty());
    for _ in 0..2 {
        world.tables.refuse_growth("they may not");
    }
    let notices = world.tables.take_notices();
    assert_eq!(notices.len(), 1);
    assert!(notices[0].words.ends_with("; they may not"), "{notices:?}");
}

#[test]
fn who_ends_or_is_not_ready_gets_nothing_new_from_affinity() {
    let mut world = World::new();
    let flags = |world: &World| {
        let maps = world.kernel.0.borrow();
        let there = maps
            .backends
            .values()
            .filter(|one| one.generation & 1 == 1)
            .map(|one| (std::net::IpAddr::from(one.address), one.flags & ENDING != 0));
        let all: std::collections::BTreeMap<_, _> = there.collect();
        all.into_values().collect::<Vec<bool>>()
    };
    world.service(service("s1", json!({"clusterIPs": ["10.96.1.1"]})));
    let tell = |world: &mut World, states: [&str; 2]| {
        world.slice(slice(
            "s1",
            "s1",
            &[("10.1.0.1", "a", states[0]), ("10.1.0.2", "a", states[1])],
        ));
        world.sync();
        flags(world)
    };
    assert_eq!(tell(&mut world, ["r", "r"]), [false, false]);
    // One that ends and still answers, and one that was ready before.
    assert_eq!(tell(&mut world, ["st", "r"]), [true, false]);
    assert_eq!(tell(&mut world, ["r", "r"]), [false, false]);
    assert_eq!(tell(&mut world, ["", "r"]), [true, false]);
    // Where nobody else is left, clients stay with those that end.
    assert_eq!(tell(&mut world, ["st", "st"]), [false, false]);
    assert_eq!(tell(&mut world, ["st", "r"]), [true, false]);
}

#[test]
fn a_write_that_fails_is_made_up_for() {
    let mut world = World::new();
    add(&mut world, 1, 3);
    world.kernel.0.borrow_mut().fail = 2;
    world.slice(slice("s1", "s1", &[("10.9.0.1", "a", "r")]));
    for _ in 0..2 {
        world.now += Duration::from_millis(25);
        assert!(world.tables.sync(world.now).is_err());
        assert!(world.tables.is_behind() && world.tables.wants_another_try());
    }
    // The old endpoints serve until then.
    assert_eq!(served(&world, 1), Some(3));
    world.sync();
    assert_eq!(served(&world, 1), Some(1));
    assert_eq!(world.tables.used().chunks, 1);
    assert!(!world.tables.is_behind());
}

#[test]
fn backends_of_an_agent_before_keep_their_numbers() {
    let mut world = World::new();
    add(&mut world, 1, 3);
    let maps = world.kernel.0.borrow();
    let mut before = vec![Backend::default(); 100];
    for (number, backend) in &maps.backends {
        before[*number as usize] = *backend;
    }
    drop(maps);
    let kernel = Plain::new(ROOM);
    let mut now = world.now;
    let mut again = World {
        tables: Tables::new(kernel.clone(), "a", before.clone()),
        kernel,
        now,
    };
    again.service(service("s2", json!({"clusterIPs": ["10.96.1.2"]})));
    again.slice(slice(
        "s2",
        "s2",
        &[("10.8.0.1", "a", "r"), ("10.1.0.1", "a", "r")],
    ));
    again.sync();
    now += Duration::from_millis(100);
    again.tables.settle(now).unwrap();
    let maps = again.kernel.0.borrow();
    let find = |all: &[Backend], text: &str| {
        let ip = text.parse::<std::net::IpAddr>().unwrap();
        let mut all = all.iter().enumerate();
        let (number, one) = all
            .find(|(_, one)| std::net::IpAddr::from(one.address) == ip)
            .unwrap();
        (number as u32, one.generation)
    };
    let (number, generation) = find(&before, "10.1.0.1");
    assert_eq!(maps.backends[&number].generation, generation);
    for gone in ["10.1.0.0", "10.1.0.2"] {
        let (number, generation) = find(&before, gone);
        assert_eq!(maps.backends[&number].generation, generation + 1);
    }
}
