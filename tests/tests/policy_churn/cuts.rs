//! A change that denies ends what it denies.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use serde_json::json;
use xebec_tests::eventually;
use xebec_tests::place::{PROTOCOLS, Talk};

use super::world::{CUT, MINUTE, World, policy};

/// Within which time what is forbidden ends, from the API's answer on.
const LIMIT: Duration = Duration::from_secs(1);
/// A machine that stands still for a while cuts late; it is not so slow three times.
const TRIES: usize = 3;
/// Without an answer for so long, a talk has ended.
const ENDED: Duration = Duration::from_secs(3);

/// Asks until nothing is answered any more: when the last answer came.
fn talked(mut talk: Talk) -> Result<Instant> {
    talk.set_patience(Duration::from_millis(500))?;
    let mut last = Instant::now();
    while last.elapsed() < ENDED {
        if talk.ask().is_ok() {
            last = Instant::now();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(last)
}

/// Connections and flows of both families end within a second of the policy that forbids them.
pub fn cuts(world: &World) -> Result<()> {
    let policies = world.api.namespace::<NetworkPolicy>(CUT);
    let deny =
        json!({"podSelector": {"matchLabels": {"role": "server"}}, "policyTypes": ["Ingress"]});
    let place = &world.pod("cut1")?.place;
    let mut took = Vec::new();
    for _ in 0..TRIES {
        let mut threads = Vec::new();
        for v4 in [true, false] {
            for protocol in PROTOCOLS {
                let to = world.at("cut2", v4)?;
                let mut talk = place.talk(protocol, to)?;
                talk.ask().with_context(|| format!("{protocol:?} {to}"))?;
                threads.push(std::thread::spawn(move || talked(talk)));
            }
        }
        std::thread::sleep(LIMIT);
        policies.create(&policy(CUT, "deny", &deny))?;
        let told = Instant::now();
        let mut worst = Duration::ZERO;
        for thread in threads {
            let last = thread.join().map_err(|_| anyhow!("panicked"))??;
            let before = told.saturating_duration_since(last);
            ensure!(
                before < LIMIT,
                "a talk ended {before:?} before it was forbidden"
            );
            worst = worst.max(last.saturating_duration_since(told));
        }
        policies.delete("deny")?;
        eventually("what is allowed again is answered", MINUTE, || {
            Ok(place.ask(PROTOCOLS[0], world.at("cut2", true)?).is_ok())
        })?;
        took.push(worst);
        if worst < LIMIT {
            break;
        }
    }
    println!("what is forbidden ended after {took:?}");
    ensure!(took.last().is_some_and(|last| *last < LIMIT), "{took:?}");
    Ok(())
}
