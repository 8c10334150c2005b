//! An agent of its own process between an API server and the kernel: growing maps, faults, who keeps an address.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "cluster/api.rs"]
mod api;
#[path = "cluster/custom.rs"]
mod custom;
#[path = "cluster/domains.rs"]
mod domains;
#[path = "cluster/faults.rs"]
mod faults;
#[path = "cluster/flows.rs"]
mod flows;
#[path = "cluster/growth.rs"]
mod growth;
#[path = "cluster/host.rs"]
mod host;
#[path = "cluster/masquerade.rs"]
mod masquerade;
#[path = "cluster/pressure.rs"]
mod pressure;
mod space;
#[path = "cluster/stage.rs"]
mod stage;
#[path = "cluster/upgrade.rs"]
mod upgrade;

/// The agent that the other tests start: this executable again.
#[test]
#[ignore = "the agent of other tests, which start it"]
fn part_agent() {
    stage::run_agent();
}

/// The client that other tests start in the node's cgroup.
#[test]
#[ignore = "a client of other tests, which start it"]
fn part_client() {
    stage::run_client();
}

/// Stages have API servers and agents of the same addresses, each in its own namespace; one at a time is enough for
/// a small machine.
static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn alone() -> std::sync::MutexGuard<'static, ()> {
    ONE.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
