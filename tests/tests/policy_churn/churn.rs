//! Random policies, labels and pods, one change after the other.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Result;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use xebec_tests::api::Api;

use super::world::{BUSY, COLOURS, TOYS, pod, policy, ports};

/// How many policies there are at a time, the standing one aside.
const MOST: usize = 30;
/// Between two changes.
const PAUSE: Duration = Duration::from_millis(10);

/// What runs in a thread of its own.
pub struct Churn<'a> {
    pub api: &'a Api,
    pub stop: &'a AtomicBool,
    /// The API may be away.
    pub away: &'a AtomicBool,
    /// Changes that were made.
    pub made: &'a AtomicUsize,
}

/// A policy that takes nothing from the friend, and gives strangers nothing.
fn random(rng: &mut StdRng) -> Value {
    let colour = *COLOURS.choose(rng).unwrap_or(&"red");
    let toys = json!({"podSelector": {"matchLabels": {"toy": colour}}});
    let bits = rng.random_range(24..=32_u32);
    let last = rng.random_range(0..=255_u32) & !((1 << (32 - bits)) - 1);
    let block = format!("203.0.113.{last}/{bits}");
    let caged = json!({"matchLabels": {"role": "caged"}});
    match rng.random_range(0..7) {
        0 => json!({
            "podSelector": caged, "policyTypes": ["Ingress"], "ingress": [{"from": [toys], "ports": ports()}],
        }),
        1 => json!({
            "podSelector": {"matchLabels": {"toy": colour}}, "policyTypes": ["Ingress", "Egress"],
        }),
        2 => json!({
            "podSelector": {"matchLabels": {"friend": "yes"}}, "policyTypes": ["Egress"], "egress": [{}],
        }),
        3 => json!({
            "podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{"from": [{"ipBlock": {"cidr": block}}]}],
        }),
        4 => json!({"podSelector": caged, "policyTypes": ["Egress"]}),
        5 => json!({
            "podSelector": {"matchLabels": {"friend": "no"}}, "policyTypes": ["Egress"], "egress": [{}],
        }),
        _ => json!({
            "podSelector": {},
            "policyTypes": ["Ingress"],
            "ingress": [{
                "from": [{"namespaceSelector": {"matchLabels": {"colour": colour}}, "podSelector": {"matchLabels": {"toy": colour}}}],
                "ports": [{"port": 9000, "endPort": 9100}],
            }],
        }),
    }
}

impl Churn<'_> {
    /// Runs until it is stopped; then all of its policies are taken away.
    pub fn run(&self, seed: u64) -> Result<()> {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut there = VecDeque::new();
        let mut next = 0;
        while !self.stop.load(Ordering::Relaxed) {
            match self.change(&mut rng, &mut there, &mut next) {
                Ok(()) => {
                    self.made.fetch_add(1, Ordering::Relaxed);
                }
                Err(_) if self.away.load(Ordering::Relaxed) => {}
                // What was asked while the API went away is told of now.
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(error),
            }
            std::thread::sleep(PAUSE);
        }
        for name in there {
            let gone = self.api.namespace::<NetworkPolicy>(BUSY).delete(&name);
            gone.or_else(|error| if is_gone(&error) { Ok(()) } else { Err(error) })?;
        }
        Ok(())
    }

    fn change(&self, rng: &mut StdRng, there: &mut VecDeque<String>, next: &mut u32) -> Result<()> {
        let policies = self.api.namespace::<NetworkPolicy>(BUSY);
        let colour = *COLOURS.choose(rng).unwrap_or(&"red");
        let (toy, node) = *TOYS.choose(rng).unwrap_or(&TOYS[0]);
        let pods = self.api.namespace::<Pod>(BUSY);
        match rng.random_range(0..100) {
            0..45 if there.len() < MOST => {
                *next += 1;
                let name = format!("p{next}");
                // It may be there even if nobody says so.
                there.push_back(name.clone());
                policies.create(&policy(BUSY, &name, &random(rng)))
            }
            0..75 => {
                let Some(name) = there.front() else {
                    return Ok(());
                };
                let gone = policies.delete(name);
                if gone.as_ref().map_or_else(is_gone, |()| true) {
                    there.pop_front();
                }
                gone
            }
            75..85 => match there.back() {
                Some(name) => policies.replace(name, &policy(BUSY, name, &random(rng))),
                None => Ok(()),
            },
            85..93 => pods.patch(toy, &json!({"metadata": {"labels": {"toy": colour}}})),
            93..97 => {
                let patch = json!({"metadata": {"labels": {"colour": colour}}});
                self.api.cluster::<Namespace>().patch(BUSY, &patch)
            }
            _ => {
                if pods.get(toy).is_ok() {
                    pods.delete(toy)
                } else {
                    pods.create(&pod(BUSY, toy, node, ("toy", colour)))
                }
            }
        }
    }
}

/// Whether what was to be changed was not there, or was changed by another hand.
fn is_gone(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        matches!(cause.downcast_ref(), Some(kube::Error::Api(status)) if matches!(status.code, 404 | 409))
    })
}
