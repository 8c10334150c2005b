//! Policies of which one part is broken: what is not understood lets nothing through to or from pods, and is told.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use xebec_policy::read::{Said, read};
use xebec_policy::rule::{Action, Peer, Policy, Ports, Rule};
use xebec_policy_oracle::random::{change, cluster};

use crate::plain::source;
use crate::{ALL, seeds};

/// Puts something else in the place of a part of an object; the path of it.
fn corrupt(random: &mut StdRng, value: &mut Value, path: String) -> String {
    let below: Vec<String> = match value {
        Value::Object(map) => map.keys().cloned().collect(),
        Value::Array(list) => (0..list.len()).map(|at| at.to_string()).collect(),
        _ => Vec::new(),
    };
    if below.is_empty() || random.random_bool(0.1) {
        let others = [
            json!(3.5),
            json!("\u{1}"),
            json!({}),
            json!([]),
            json!(null),
            json!({"strange": 1}),
            json!([[]]),
            json!(-1),
            json!(true),
        ];
        *value = others[random.random_range(0..others.len())].clone();
        return path;
    }
    let key = &below[random.random_range(0..below.len())];
    let part = value.pointer_mut(&format!("/{}", key.replace('~', "~0").replace('/', "~1")));
    corrupt(random, part.unwrap(), format!("{path}/{key}"))
}

fn rules(policies: &[Policy]) -> impl Iterator<Item = &Rule> {
    policies.iter().flat_map(|one| &one.rules)
}

/// Whether two rules say the same, wherever they stand: those before may be gone.
fn same(a: &Rule, b: &Rule) -> bool {
    let index = 0;
    Rule { index, ..a.clone() } == Rule { index, ..b.clone() }
}

/// Fails unless what is read of a policy that is broken lets no more through than the whole one.
fn compare(whole: &[Policy], broken: &[Policy]) -> Result<(), String> {
    for rule in rules(broken).filter(|rule| rule.action != Action::Deny) {
        if !rules(whole).any(|one| same(one, rule)) {
            return Err(format!("{rule:?} is new"));
        }
    }
    for rule in rules(whole).filter(|rule| rule.action == Action::Deny) {
        let stands_in = |one: &Rule| {
            let all = one.peers == [Peer::Anybody] && one.ports == [Ports::All];
            same(one, rule) || one.action == Action::Deny && one.direction == rule.direction && all
        };
        if !rules(broken).any(stands_in) {
            return Err(format!("{rule:?} is gone"));
        }
    }
    for direction in [0, 1] {
        let isolates = |all: &[Policy]| all.iter().any(|one| one.isolates[direction]);
        if isolates(whole) && !isolates(broken) {
            return Err("it does not isolate any more".to_owned());
        }
    }
    Ok(())
}

#[test]
fn what_is_broken_lets_nothing_more_through() {
    let mut told = 0;
    seeds().for_each(|seed| {
        let mut random = StdRng::seed_from_u64(seed);
        let mut world = cluster(&mut random, &ALL);
        for _ in 0..20 {
            for object in &world.policies {
                // Another reads NetworkPolicies and refuses what has another form; groups are no policies.
                let kind = object["kind"].as_str().unwrap();
                if ["NetworkPolicy", "CiliumCIDRGroup"].contains(&kind) {
                    continue;
                }
                let field = match object["spec"].is_null() {
                    true => "specs",
                    false => "spec",
                };
                let mut other = object.clone();
                let path = corrupt(&mut random, &mut other[field], field.to_owned());
                // Of a spec without any of its parts nobody knows what they were.
                let wide = path == field || path.split('/').count() == 2 && field == "specs";
                if wide && !other.pointer(&format!("/{path}")).unwrap().is_number() {
                    continue;
                }
                let said = |object: &Value| match read(source(object), object) {
                    (Said::Policies(policies), errors) => (policies, errors),
                    (Said::Group(_), _) => panic!("a group is no policy"),
                };
                let ((mut whole, before), (mut broken, after)) = (said(object), said(&other));
                // Those for nodes are for none then: nodes are not cut off by what nobody meant.
                whole.retain(|one| !one.for_nodes);
                broken.retain(|one| !one.for_nodes);
                if after.len() <= before.len() {
                    continue;
                }
                told += 1;
                assert!(after.iter().all(|error| error.starts_with("spec") && error.contains("; ")));
                if let Err(why) = compare(&whole, &broken) {
                    panic!("seed {seed}: {why} where {path} is broken: {after:#?}\n{object:#}\n{other:#}");
                }
            }
            change(&mut random, &mut world);
        }
    });
    assert!(told > 50, "{told}");
}
