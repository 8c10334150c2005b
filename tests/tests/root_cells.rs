//! What Services promise, kind by kind, with sockets of pods, nodes and a machine outside, of both families, over two
//! nodes: one cluster for all of it.

mod cells;

use anyhow::Result;
use cells::world::World;
use xebec_tests::{Machine, assert_nothing_left};

/// A scenario's name and what runs it.
type Scenario = (&'static str, fn(&mut World) -> Result<()>);

const SCENARIOS: [Scenario; 1] = [("every frontend", cells::frontends::every_frontend)];

#[test]
fn what_services_promise() -> Result<()> {
    let outside = cells::world::Outside::new()?;
    let before = Machine::now()?;
    let mut world = World::up(&outside)?;
    // By a part of a name, one scenario alone is run.
    let wanted = std::env::var("XEBEC_CELL").unwrap_or_default();
    for (name, scenario) in SCENARIOS {
        if name.contains(&wanted) {
            let begun = std::time::Instant::now();
            scenario(&mut world).map_err(|error| error.context(name))?;
            println!("{name}: {:.1} s", begun.elapsed().as_secs_f32());
        }
    }
    world.down()?;
    assert_nothing_left(&before)
}
