//! Audit mode, of a policy and of a pod: what would be dropped goes on, and is told.

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use serde_json::json;
use xebec_tests::eventually;
use xebec_tests::place::PROTOCOLS;

use super::world::{CUT, MINUTE, World, policy};

const KEY: &str = "policy.xebec.io/audit";

/// Whether all that is asked is answered, and told to be what a policy would drop.
fn is_told(world: &World) -> Result<bool> {
    let place = &world.pod("cut1")?.place;
    let since = std::time::Instant::now();
    for v4 in [true, false] {
        for protocol in PROTOCOLS {
            place.ask(protocol, world.at("cut2", v4)?)?;
        }
    }
    let since = format!("{}s", since.elapsed().as_secs() + 1);
    let observe = [
        "observe",
        "-n",
        CUT,
        "--verdict",
        "AUDIT",
        "--since",
        &since,
        "--last",
        "100",
        "-o",
        "json",
    ];
    let told = world.cluster.run(&observe)?;
    Ok(["TCP", "UDP"]
        .iter()
        .all(|protocol| told.contains(&format!("\"{protocol}\""))))
}

pub fn audit(world: &World) -> Result<()> {
    let policies = world.api.namespace::<NetworkPolicy>(CUT);
    let pods = world.api.namespace::<Pod>(CUT);
    let deny =
        json!({"podSelector": {"matchLabels": {"role": "server"}}, "policyTypes": ["Ingress"]});
    let mut audited = policy(CUT, "audited", &deny);
    audited["metadata"]["annotations"] = json!({KEY: "true"});
    policies.create(&audited)?;
    eventually("the policy in audit mode is told of", MINUTE, || {
        is_told(world)
    })?;
    // The pod in its place: the policy would drop now.
    pods.patch("cut2", &json!({"metadata": {"annotations": {KEY: "true"}}}))?;
    policies.replace("audited", &policy(CUT, "audited", &deny))?;
    eventually("the pod in audit mode is told of", MINUTE, || {
        is_told(world)
    })?;
    pods.patch("cut2", &json!({"metadata": {"annotations": {KEY: null}}}))?;
    let place = &world.pod("cut1")?.place;
    eventually("without it, it is dropped", MINUTE, || {
        place.is_silent(PROTOCOLS[0], world.at("cut2", true)?)
    })?;
    ensure!(
        place.is_silent(PROTOCOLS[1], world.at("cut2", false)?)?,
        "datagrams pass"
    );
    policies.delete("audited")?;
    eventually("it is answered again", MINUTE, || {
        Ok(place.ask(PROTOCOLS[0], world.at("cut2", true)?).is_ok())
    })
}
