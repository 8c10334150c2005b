//! Routes to other nodes' pods in the kernel's own tables, of both families: made, changed, found again and removed.
#![allow(clippy::unwrap_used, reason = "tests")]

mod namespaces;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use namespaces::Namespace;
use rtnetlink::{LinkUnspec, LinkVeth};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use xebec_agent::nodes::{NodeView, Nodes};
use xebec_agent::{link, routes};

const PATIENCE: Duration = Duration::from_secs(10);
const OWN: [&str; 2] = ["10.99.0.0/24", "fd00:99::/64"];

fn nodes(all: &[(&str, [&str; 2], [&str; 2])]) -> Nodes {
    let view = |addresses: &[&str; 2], ranges: &[&str; 2]| NodeView {
        addresses: addresses.map(|one| one.parse().unwrap()).into(),
        pod_ranges: ranges.map(|one| one.parse().unwrap()).into(),
        labels: Default::default(),
    };
    let named = all.iter();
    Some(
        named
            .map(|(name, ips, ranges)| ((*name).into(), view(ips, ranges)))
            .collect(),
    )
}

/// The routes that bear the agent's mark, as `ip` tells of them.
fn ours(namespace: &Namespace) -> BTreeSet<String> {
    let family = |flag: &str| {
        let output = namespace.within(|| {
            std::process::Command::new("ip")
                .args([flag, "route", "show", "proto", "88"])
                .output()
                .unwrap()
        });
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let all = family("-4") + &family("-6");
    let first_three = |line: &str| line.split(' ').take(3).collect::<Vec<_>>().join(" ");
    all.lines().map(first_three).collect()
}

/// Runs until the kernel has these routes, as an agent that is started and ended.
fn agent(namespace: &Namespace, told: &[Nodes], wanted: &[&str]) {
    let wanted: BTreeSet<String> = wanted.iter().map(|one| (*one).to_owned()).collect();
    let (sender, receiver) = watch::channel(None);
    let end = CancellationToken::new();
    std::thread::scope(|scope| {
        let (ended, own) = (end.clone(), OWN.map(|one| one.parse().unwrap()));
        let run = scope.spawn(move || {
            namespace.block_on(async || {
                routes::run("a".into(), own.into(), receiver, ended)
                    .await
                    .unwrap();
            });
        });
        for nodes in told {
            sender.send(nodes.clone()).unwrap();
        }
        let began = Instant::now();
        while ours(namespace) != wanted && began.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(10));
        }
        end.cancel();
        run.join().unwrap();
    });
    assert_eq!(ours(namespace), wanted);
}

#[test]
fn routes_follow_the_nodes() {
    if namespaces::left_out() {
        return;
    }
    let namespace = Namespace::new();
    namespace.block_on(async || {
        let handle = link::handle().unwrap();
        let add = handle.link().add(LinkVeth::new("up", "down").build());
        add.execute().await.unwrap();
        for name in ["up", "down"] {
            let (index, _) = link::find(&handle, name).await.unwrap().unwrap();
            let up = LinkUnspec::new_with_index(index).up().build();
            handle.link().set(up).execute().await.unwrap();
        }
        let (index, _) = link::find(&handle, "up").await.unwrap().unwrap();
        for (address, length) in [("192.0.2.1", 24), ("fd00:98::1", 64)] {
            let address: IpAddr = address.parse().unwrap();
            let add = handle.address().add(index, address, length);
            add.execute().await.unwrap();
        }
    });
    let a = ("a", ["192.0.2.1", "fd00:98::1"], OWN);
    let b = (
        "b",
        ["192.0.2.2", "fd00:98::2"],
        ["10.99.1.0/24", "fd00:99:0:1::/64"],
    );
    let c = (
        "c",
        ["192.0.2.3", "fd00:98::3"],
        ["10.99.2.0/24", "fd00:99:0:2::/64"],
    );
    let moved = ("b", ["192.0.2.7", "fd00:98::7"], b.2);
    let to_b = [
        "10.99.1.0/24 via 192.0.2.2",
        "fd00:99:0:1::/64 via fd00:98::2",
    ];
    let to_c = [
        "10.99.2.0/24 via 192.0.2.3",
        "fd00:99:0:2::/64 via fd00:98::3",
    ];
    let to_moved = [
        "10.99.1.0/24 via 192.0.2.7",
        "fd00:99:0:1::/64 via fd00:98::7",
    ];
    agent(&namespace, &[nodes(&[a, b, c])], &[to_b, to_c].concat());
    // The next agent knows which routes are the last one's: one node is gone, another has moved.
    agent(&namespace, &[nodes(&[a, moved])], &to_moved);
    agent(&namespace, &[nodes(&[a, b])], &to_b);
    agent(&namespace, &[nodes(&[a])], &[]);
}
