//! NetworkPolicies as truth tables: each pod asks each other one at each port, by real sockets on two nodes, and what is
//! heard is compared with what the policies say.

mod policies;

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result};
use policies::case::{self, Case, Group};
use policies::model::Model;
use policies::table::{self, Way};
use policies::world::{self, World};
use xebec_tests::{Machine, assert_nothing_left};

/// By a part of a title, some cases alone are run.
const CHOICE: &str = "XEBEC_CASE";

/// Each failure takes all of its patience: after so many, enough is known.
const MANY: usize = 20;

/// All cases, and those about addresses once more with such of IPv6.
fn all(facts: impl Fn(bool) -> Result<policies::Facts>) -> Result<Vec<Case>> {
    let mut cases = case::all(&facts(true)?);
    let again = case::all(&facts(false)?);
    cases.extend(again.into_iter().filter(|case| case.family.is_some()));
    Ok(cases)
}

#[test]
fn who_reaches_whom() -> Result<()> {
    let before = Machine::now()?;
    let mut world = World::up()?;
    let wanted = std::env::var(CHOICE).unwrap_or_default();
    let cases = all(|v4| world.facts(v4))?;
    let cases = cases.iter().filter(|case| case.title().contains(&wanted));
    let cases: Vec<&Case> = cases.collect();
    let mut failed = Vec::new();
    let (begun, mut count) = (Instant::now(), 0);
    for case in &cases {
        if failed.len() >= MANY {
            failed.push(format!("{} cases were not run", cases.len() - count));
            break;
        }
        count += 1;
        let begun = Instant::now();
        let outcome = run(&mut world, case);
        println!("{}: {:.1} s", case.title(), begun.elapsed().as_secs_f32());
        if let Err(error) = outcome {
            let words = format!("{}: {error:#}", case.title());
            println!("{words}");
            failed.push(words);
        }
        if let Err(error) = world.reset() {
            failed.push(format!("after {}: {error:#}", case.title()));
            break;
        }
    }
    let time = begun.elapsed().as_secs_f32();
    println!("{count} cases in {time:.1} s, {} failed", failed.len());
    if !failed.is_empty() {
        eprintln!("--- log of the cluster ---\n{}", world.cluster.log());
    }
    world.down()?;
    assert!(
        failed.is_empty(),
        "{} of {count} cases failed:\n{}",
        failed.len(),
        failed.join("\n")
    );
    assert_nothing_left(&before)
}

/// How pods are asked. By their own sockets only the pods of one node can ask at a time, so that few cases do.
fn ways(case: &Case) -> &'static [Way] {
    match case.group {
        Group::Peers | Group::Ports | Group::Conflicts | Group::Specs => &[Way::Pod, Way::Service],
        _ => &[Way::Pod, Way::Service, Way::Socket],
    }
}

fn run(world: &mut World, case: &Case) -> Result<()> {
    for (at, step) in case.steps.iter().enumerate() {
        let what = || format!("step {}", at + 1);
        world.act(&step.actions).with_context(what)?;
        let wanted = world.model.expect(&step.expected, case.family);
        let wanted = wanted.with_context(what)?;
        table::compare(world, &wanted, ways(case)).with_context(what)?;
    }
    Ok(())
}

#[test]
fn as_many_cases_as_there_should_be() -> Result<()> {
    let model = Model::made_up();
    let mut counts = BTreeMap::new();
    for case in case::all(&world::facts(&model, true)?) {
        *counts.entry(case.group).or_insert(0) += 1;
    }
    let wanted = [
        (Group::Targets, 6),
        (Group::Rules, 4),
        (Group::Peers, 112),
        (Group::Ports, 70),
        (Group::Example, 1),
        (Group::Actions, 6),
        (Group::Conflicts, 16),
        (Group::Namespaces, 2),
        (Group::Upstream, 13),
        (Group::Specs, 48),
    ];
    assert_eq!(counts, BTreeMap::from(wanted));
    Ok(())
}

/// Nothing is asked here: what the evaluator says is compared with what was written down.
#[test]
fn the_evaluator_reads_as_people_do() -> Result<()> {
    let made_up = Model::made_up();
    let mut compared = 0;
    for case in all(|v4| world::facts(&made_up, v4))? {
        let mut model = made_up.clone();
        for step in case.steps.iter().filter(|_| case.group == Group::Specs) {
            for action in &step.actions {
                model.apply(action)?;
            }
            let cluster = model.cluster();
            for (pair, allowed) in model.expect(&step.expected, case.family)? {
                let judged = model.judged(&cluster, &pair)?;
                assert_eq!(judged, allowed, "{}: {pair:?}", case.title());
                compared += 1;
            }
        }
    }
    assert!(compared > 5000, "only {compared} compared");
    Ok(())
}
