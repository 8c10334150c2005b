//! The base policy with no, one and two ports of each form, in each direction.

use serde_json::{Value, json};

use super::PORTS;
use super::case::{Case, Group, step};
use super::policy::{DIRECTIONS, base_with_ports, port, port_of, protocol};

/// Single ports, and what they are called.
fn singles() -> Vec<(String, Value)> {
    let mut singles = Vec::new();
    for over in [None, Some("TCP"), Some("UDP"), Some("SCTP")] {
        let word = over.unwrap_or("no protocol");
        for number in [None, Some(80), Some(81)] {
            let (what, mut one) = match number {
                None => (format!("{word}, no port"), json!({})),
                Some(number) => (format!("{word} {number}"), port(number)),
            };
            if let Some(over) = over {
                one["protocol"] = json!(over);
            }
            singles.push((what, one));
        }
    }
    for over in ["TCP", "UDP", "SCTP"] {
        for number in PORTS {
            let name = format!("serve-{number}-{}", over.to_lowercase());
            singles.push((format!("{over} {name}"), port_of(over, name)));
        }
        for last in [80, 84] {
            let range = json!({"protocol": over, "port": 53, "endPort": last});
            singles.push((format!("{over} 53 to {last}"), range));
        }
    }
    singles.extend([
        (
            "a name of another protocol".to_owned(),
            port_of("TCP", "serve-81-udp"),
        ),
        (
            "a name that nobody has".to_owned(),
            port_of("TCP", "serve-7981-udp"),
        ),
        (
            "a number that nobody serves".to_owned(),
            port_of("TCP", 7981),
        ),
    ]);
    singles
}

/// Two ports each, and what they are called.
fn pairs() -> [(&'static str, [Value; 2]); 7] {
    let empty = || json!({});
    [
        ("all and 80", [empty(), port(80)]),
        ("all and a name", [empty(), port("serve-80-tcp")]),
        ("all and UDP", [empty(), protocol("UDP")]),
        ("80 and 81", [port(80), port(81)]),
        ("80 and a name", [port(80), port("serve-81-tcp")]),
        (
            "80 and a name of UDP",
            [port(80), port_of("UDP", "serve-81-udp")],
        ),
        (
            "80 and a name, both of UDP",
            [port_of("UDP", 80), port_of("UDP", "serve-81-udp")],
        ),
    ]
}

/// All of them.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (ingress, direction) in DIRECTIONS {
        let mut add = |what: &str, ports: Vec<Value>| {
            let steps = vec![step([base_with_ports(ingress, ports)])];
            let what = format!("{direction}: {what}");
            cases.push(Case::new(Group::Ports, what, steps));
        };
        add("an empty list", vec![]);
        for (what, one) in singles() {
            add(&what, vec![one]);
        }
        for (what, two) in pairs() {
            add(what, two.into());
        }
    }
    cases
}
