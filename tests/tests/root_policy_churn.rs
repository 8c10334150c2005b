//! Policies, labels and pods change, agents and the whole cluster are killed, policies come by the thousand: who must
//! never get through never does, who always must always does, and all is counted.
//!
//! `XEBEC_CHURN_SEED` repeats a history; `XEBEC_CHURN_SECONDS`, `XEBEC_CHURN_RESTARTS` and `XEBEC_CHURN_POLICIES` make
//! it longer.

mod policy_churn;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use policy_churn::churn::Churn;
use policy_churn::prober::{Prober, Wanted};
use policy_churn::world::{ARGS, MINUTE, NODES, PORT, World};
use policy_churn::{audit, bad_input, cuts};
use std::net::SocketAddr;
use xebec_tests::place::PROTOCOLS;
use xebec_tests::{Machine, assert_nothing_left, eventually};

fn from_env(name: &str, otherwise: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name}={text}")),
        Err(_) => Ok(otherwise),
    }
}

/// Who asks whom all the while.
fn probers(world: &World, stop: &Arc<AtomicBool>) -> Result<Vec<Prober>> {
    let mut all = Vec::new();
    for v4 in [true, false] {
        let service = SocketAddr::new(world.service[usize::from(!v4)], PORT);
        let at = |name| world.at(name, v4);
        for (from, to, wanted) in [
            ("friend", at("caged1")?, Wanted::Always),
            ("friend", at("caged2")?, Wanted::Always),
            ("friend", service, Wanted::Always),
            ("open1", at("open2")?, Wanted::Always),
            ("open2", at("open1")?, Wanted::Always),
            ("stranger1", at("caged1")?, Wanted::Never),
            ("stranger2", at("caged1")?, Wanted::Never),
            ("stranger2", service, Wanted::Never),
            ("open1", at("caged2")?, Wanted::Never),
        ] {
            for protocol in PROTOCOLS {
                let place = &world.pod(from)?.place;
                all.push(Prober::start(place, protocol, to, wanted, stop));
            }
        }
    }
    Ok(all)
}

/// Ends them all, and fails unless each did as it must.
fn account(probers: Vec<Prober>) -> Result<()> {
    let (mut failed, mut resent) = (Vec::new(), Vec::new());
    let (mut always, mut never, mut slowest) = (0, 0, Duration::ZERO);
    for prober in probers {
        let (what, wanted) = (prober.what.clone(), prober.wanted);
        match prober.end() {
            Ok(counts) if counts.tries < 100 => {
                failed.push(format!("{what}: {} tries", counts.tries))
            }
            Ok(counts) => {
                *if wanted == Wanted::Always {
                    &mut always
                } else {
                    &mut never
                } += counts.tries;
                slowest = slowest.max(counts.slowest);
                resent.extend(counts.resent);
            }
            Err(error) => failed.push(format!("{error:#}")),
        }
    }
    println!(
        "{always} answered, the slowest within {slowest:?}, {} after their first packet was sent again; {never} never: {resent:?}",
        resent.len()
    );
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    // A machine without time to spare may be late with an answer by itself.
    ensure!(
        resent.len() * 10_000 <= always,
        "{} of {always} were sent again",
        resent.len()
    );
    Ok(())
}

/// Kills the cluster and starts it again; both agents take over.
fn restart(world: &mut World) -> Result<()> {
    world.cluster.restart(&ARGS)?;
    eventually("the agents have taken over", MINUTE, || {
        let mut all = true;
        for node in NODES {
            let devices = world.cluster.agent_status(node)?["devices"].clone();
            all &= devices.as_str().is_some_and(|devices| !devices.is_empty());
        }
        Ok(all)
    })
}

fn under_churn(world: &mut World, probers: &[Prober]) -> Result<()> {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let seed = from_env("XEBEC_CHURN_SEED", clock.as_millis() as u64)?;
    let seconds = Duration::from_secs(from_env("XEBEC_CHURN_SECONDS", 20)?);
    println!("XEBEC_CHURN_SEED={seed}");
    let (stop, away, made) = (
        AtomicBool::new(false),
        AtomicBool::new(false),
        AtomicUsize::new(0),
    );
    let api = xebec_tests::api::Api::of(&world.cluster)?;
    std::thread::scope(|scope| {
        let churn = Churn {
            api: &api,
            stop: &stop,
            away: &away,
            made: &made,
        };
        let changing = scope.spawn(move || churn.run(seed));
        let going = |time: Duration| {
            let begun = Instant::now();
            while begun.elapsed() < time
                && !changing.is_finished()
                && !probers.iter().any(Prober::has_ended)
            {
                std::thread::sleep(Duration::from_millis(50));
            }
        };
        going(seconds);
        let restarts = (0..from_env("XEBEC_CHURN_RESTARTS", 2)?).try_for_each(|_| {
            away.store(true, Ordering::Relaxed);
            let outcome = restart(world);
            away.store(false, Ordering::Relaxed);
            going(Duration::from_secs(3));
            outcome
        });
        stop.store(true, Ordering::Relaxed);
        changing
            .join()
            .map_err(|_| anyhow!("panicked"))?
            .context("changes")?;
        println!("{} changes", made.load(Ordering::Relaxed));
        restarts
    })
}

fn all(world: &mut World, probers: &[Prober]) -> Result<()> {
    under_churn(world, probers).context("under churn")?;
    cuts::cuts(world).context("cuts")?;
    audit::audit(world).context("audit mode")?;
    bad_input::broken(world).context("broken policies")?;
    bad_input::many_blocks(world).context("many blocks")?;
    let count = from_env("XEBEC_CHURN_POLICIES", 1_500)? as usize;
    bad_input::very_many(world, count).context("very many policies")
}

#[test]
fn nobody_notices_what_is_not_about_them() -> Result<()> {
    let before = Machine::now()?;
    let mut world = World::up()?;
    let stop = Arc::new(AtomicBool::new(false));
    let probers = probers(&world, &stop)?;
    let outcome = all(&mut world, &probers);
    stop.store(true, Ordering::Relaxed);
    let counted = account(probers);
    if outcome.is_err() || counted.is_err() {
        eprintln!("--- log of the cluster ---\n{}", world.cluster.log());
    }
    world.cluster.down()?;
    drop(world);
    outcome.and(counted)?;
    assert_nothing_left(&before)
}
