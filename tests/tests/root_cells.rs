//! What Services promise, kind by kind, with sockets of pods, nodes and a machine outside, of both families, over two
//! nodes: one cluster for all of it, which is started anew for each way that packets can take.

mod cells;

use anyhow::Result;
use cells::{
    addresses, alone, bad_input, endpoints, express, faults, frontends, left_alone, life, local,
    near, odd, policies, sctp, told, too_big, ways, weights, world::World,
};
use xebec_tests::{Machine, assert_nothing_left};

/// A scenario's name and what runs it.
type Scenario = (&'static str, fn(&mut World) -> Result<()>);
/// Flags of `up`, and what is run with them.
type Mode = (&'static [&'static str], &'static [Scenario]);

const MODES: [Mode; 6] = [
    (
        &[],
        &[
            ("every frontend", frontends::every_frontend),
            ("mapped addresses", frontends::mapped),
            ("host ports", frontends::host_ports),
            ("hairpin", frontends::hairpin),
            ("nobody there", frontends::nobody_there),
            ("external traffic", policies::external_traffic),
            ("internal traffic", policies::internal_traffic),
            ("source ranges", policies::source_ranges),
            ("local ones that end", local::ending),
            ("left alone", left_alone::left_alone),
            ("weights", weights::weights),
            ("not ready", endpoints::not_ready),
            ("near ones", endpoints::near_ones),
            ("one zone", near::one_zone),
            ("hints", near::hints),
            ("same ones", endpoints::same_ones),
            ("hashed", endpoints::hashed),
            ("written by hand", endpoints::written_by_hand),
            ("told by commands", told::by_commands),
            ("told at ports", told::at_ports),
            ("removed", life::removed),
            ("parted", life::parted),
            ("terminating", life::terminating),
            ("same address", bad_input::same_address),
            ("slices that disagree", bad_input::slices_that_disagree),
            ("crowd", bad_input::crowd),
            ("in fragments", odd::in_fragments),
            ("closed", odd::closed),
            ("crowded", odd::crowded),
            ("too big, said by a router", too_big::said_by_a_router),
            ("too big, said by a node", too_big::said_by_a_node),
            ("associations", sctp::associations),
            ("associations from outside", sctp::from_outside),
            ("associations with oneself", sctp::hairpin),
            ("associations without Services", sctp::without_services),
            ("associations with nobody", sctp::nobody_there),
            ("around the stack", ways::around),
            ("agent alone", alone::agent_alone),
            ("addresses come and go", addresses::come_and_go),
            ("ports used again, addresses", addresses::ports_used_again),
            ("killed", faults::killed),
        ],
    ),
    (
        &["--lb-mode", "dsr"],
        &[
            ("every frontend, dsr", frontends::every_frontend),
            ("direct", ways::direct),
        ],
    ),
    (
        &["--lb-mode", "hybrid", "--host-legacy-routing"],
        &[
            ("every frontend, legacy routing", frontends::every_frontend),
            ("hybrid", ways::hybrid),
            ("through the stack", ways::through),
        ],
    ),
    (
        &["--xdp", "native"],
        &[
            ("every frontend, xdp", frontends::every_frontend),
            ("associations, xdp", sctp::associations),
            ("associations from outside, xdp", sctp::from_outside),
            ("associations by xdp", express::associations),
            ("by the driver's xdp", express::by_driver),
        ],
    ),
    (
        &["--xdp", "generic", "--nodeport-addresses", "primary"],
        &[
            ("by the stack's xdp", express::by_stack),
            ("primary addresses", addresses::primary),
        ],
    ),
    (
        &["--nodeport-addresses", addresses::MORE_BLOCKS],
        &[("addresses in blocks", addresses::blocks)],
    ),
];

#[test]
fn what_services_promise() -> Result<()> {
    let outside = cells::world::Outside::new()?;
    let before = Machine::now()?;
    let mut world = World::up(&outside)?;
    // By a part of a name, one scenario alone is run.
    let mut failed = Vec::new();
    let wanted = std::env::var("XEBEC_CELL").unwrap_or_default();
    for (flags, scenarios) in MODES {
        let scenarios = scenarios.iter().filter(|(name, _)| name.contains(&wanted));
        let scenarios: Vec<_> = scenarios.collect();
        if !flags.is_empty() && !scenarios.is_empty() {
            let begun = std::time::Instant::now();
            let outcome = world.switch(flags);
            println!("{flags:?}: {:.1} s", begun.elapsed().as_secs_f32());
            if let Err(error) = outcome {
                failed.push(format!("{flags:?}: {error:#}"));
                break;
            }
        }
        for (name, scenario) in scenarios {
            let begun = std::time::Instant::now();
            let outcome = scenario(&mut world);
            println!("{name}: {:.1} s", begun.elapsed().as_secs_f32());
            if let Err(error) = outcome {
                let words = format!("{name}: {error:#}");
                // Here as well: what follows can be long.
                println!("{words}");
                failed.push(words);
                // What it leaves is not to disturb others.
                world.delete(&["--all"])?;
            }
        }
    }
    if !failed.is_empty() {
        eprintln!("--- log of the cluster ---\n{}", world.cluster.log());
    }
    world.down()?;
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    assert_nothing_left(&before)
}
