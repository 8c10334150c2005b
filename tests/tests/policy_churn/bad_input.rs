//! Policies that are broken, huge or very many: nobody else notices.

use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use serde_json::{Value, json};
use xebec_tests::eventually;

use super::world::{BUSY, CUT, MINUTE, World, policy, ports};

/// Address blocks of one policy.
const BLOCKS: u32 = 10_000;
/// Who writes at once.
const WRITERS: usize = 8;

/// Fails unless the API refuses a policy, and says where it is wrong.
fn refused(world: &World, spec: &Value, path: &str) -> Result<()> {
    let policies = world.api.namespace::<NetworkPolicy>(CUT);
    let error = policies.create(&policy(CUT, "broken", spec)).err();
    let error = format!("{:#}", error.with_context(|| format!("taken: {spec}"))?);
    ensure!(error.contains(path), "{path}: {error}");
    Ok(())
}

pub fn broken(world: &World) -> Result<()> {
    let ingress = |rule: Value| json!({"podSelector": {}, "ingress": [rule]});
    let from = |cidr: &str, except: Value| {
        ingress(json!({"from": [{"ipBlock": {"cidr": cidr, "except": except}}]}))
    };
    let selector = json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "Near"}]}});
    for (spec, path) in [
        (selector, "podSelector.matchExpressions[0].operator"),
        (from("10.0.0.0/33", json!([])), "ipBlock.cidr"),
        (
            from("10.0.0.0/8", json!(["192.168.0.0/16"])),
            "ipBlock.except",
        ),
        (
            ingress(json!({"ports": [{"port": 70_000}]})),
            "ports[0].port",
        ),
        (
            ingress(json!({"ports": [{"port": 90, "endPort": 80}]})),
            "endPort",
        ),
        (
            ingress(json!({"ports": [{"port": 80, "protocol": "IP"}]})),
            "protocol",
        ),
    ] {
        refused(world, &spec, path)?;
    }
    Ok(())
}

/// Waits until both agents have so many policies of a namespace in force.
fn in_force(world: &World, namespace: &str, count: usize) -> Result<()> {
    eventually(
        &format!("{count} policies are in force"),
        MINUTE * 2,
        || {
            let now = world.policies_of(namespace)?;
            Ok(now == [(count, count); 2])
        },
    )
}

pub fn many_blocks(world: &World) -> Result<()> {
    let block = |number: u32| {
        let address = std::net::Ipv4Addr::from_bits(0xcb00_0000 + number * 2);
        json!({"ipBlock": {"cidr": format!("{address}/32")}})
    };
    let spec = json!({
        "podSelector": {},
        "policyTypes": ["Ingress"],
        "ingress": [{"from": (0..BLOCKS).map(block).collect::<Vec<_>>(), "ports": ports()}],
    });
    let policies = world.api.namespace::<NetworkPolicy>(BUSY);
    policies.create(&policy(BUSY, "blocks", &spec))?;
    let begun = Instant::now();
    // The standing one, and this.
    in_force(world, BUSY, 2)?;
    println!(
        "a policy of {BLOCKS} blocks was in force after {:?}",
        begun.elapsed()
    );
    policies.delete("blocks")?;
    in_force(world, BUSY, 1)
}

pub fn very_many(world: &World, count: usize) -> Result<()> {
    let policies = || world.api.namespace::<NetworkPolicy>(BUSY);
    let by_all = |what: &str, each: &(dyn Fn(usize) -> Result<()> + Sync)| -> Result<()> {
        let begun = Instant::now();
        std::thread::scope(|scope| {
            let write = |writer| move || (writer..count).step_by(WRITERS).try_for_each(each);
            let threads: Vec<_> = (0..WRITERS)
                .map(|writer| scope.spawn(write(writer)))
                .collect();
            let mut joined = threads.into_iter().map(|thread| thread.join());
            joined.try_for_each(|outcome| outcome.map_err(|_| anyhow!("panicked"))?)
        })?;
        println!(
            "{count} policies {what} by {WRITERS} writers in {:?}",
            begun.elapsed()
        );
        Ok(())
    };
    by_all("written", &|number| {
        let spec = json!({
            "podSelector": {"matchLabels": {"role": "caged"}},
            "policyTypes": ["Ingress"],
            "ingress": [{
                "from": [{"podSelector": {"matchLabels": {"toy": format!("t{number}")}}}],
                "ports": [{"port": 1 + number % 60_000}],
            }],
        });
        policies().create(&policy(BUSY, &format!("many-{number}"), &spec))
    })?;
    let begun = Instant::now();
    in_force(world, BUSY, count + 1)?;
    println!(
        "all were in force {:?} after the last was written",
        begun.elapsed()
    );
    by_all("deleted", &|number| {
        policies().delete(&format!("many-{number}"))
    })?;
    in_force(world, BUSY, 1)
}
