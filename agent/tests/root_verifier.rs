//! The budget of the kernel's check: no program may cost more than is recorded in `dataplane-ebpf/verifier.txt`.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;

use xebec_agent::loader::Loaded;
use xebec_agent::loader::measure::{Figures, measure};

/// Seen from this package's folder, in which tests run.
const FILE: &str = "../dataplane-ebpf/verifier.txt";
/// Set, the figures are written instead of compared.
const RECORD: &str = "XEBEC_VERIFIER_RECORD";
/// How to set it.
const HOW: &str = "if that is meant to be, run `cargo xtask verifier --record` and commit dataplane-ebpf/verifier.txt";
/// The kernel itself refuses at a million.
const MOST: u32 = 50_000;
/// Programs that are above it, and what each may take until it is below: then its line here must go.
const ABOVE: &[(&str, u32)] = &[];
/// How much of the recorded figure, in percent, may come on top of it.
const GROWTH: u32 = 10;

/// Measuring limits the files that this process may open.
static FILES: Mutex<()> = Mutex::new(());

type Programs = BTreeMap<String, Figures>;

#[test]
fn no_program_costs_more_than_is_recorded() {
    if !nix::unistd::geteuid().is_root() || !Loaded::built_in() {
        eprintln!("left out: this test needs root, and an agent built by `cargo xtask`");
        return;
    }
    let _alone = FILES.lock().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut now = Programs::new();
    let measured = measure(dir.path(), |program| {
        now.insert(program.name, program.outcome.unwrap());
    });
    let unmounted = nix::mount::umount2(dir.path(), nix::mount::MntFlags::MNT_DETACH);
    measured.unwrap();
    unmounted.unwrap();
    print!("{}", text(&now));
    if std::env::var_os(RECORD).is_some() {
        std::fs::write(FILE, text(&now)).unwrap();
        assert_eq!(beyond(&now, ABOVE), Vec::<String>::new());
        return;
    }
    let recorded = std::fs::read_to_string(FILE).unwrap();
    let mut complaints = beyond(&now, ABOVE);
    complaints.extend(judge(&parse(&recorded), &now));
    assert!(
        complaints.is_empty(),
        "{}\n{HOW}\n(recorded: {})",
        complaints.join("\n"),
        recorded.lines().next().unwrap_or_default()
    );
}

/// What is over the limit, which no record can raise, or has a higher one without need.
fn beyond(now: &Programs, above: &[(&str, u32)]) -> Vec<String> {
    let mut complaints = Vec::new();
    for (name, figures) in now {
        let own = above.iter().find(|(program, _)| program == name);
        let most = own.map_or(MOST, |(_, most)| *most);
        let taken = figures.instructions;
        if taken > most {
            complaints.push(format!(
                "{name} takes the kernel {taken} instructions to check, more than {most}"
            ));
        }
        if own.is_some() && taken <= MOST {
            complaints.push(format!(
                "{name} takes {taken} instructions to check: take its line out of ABOVE in {}",
                file!()
            ));
        }
    }
    let gone = above.iter().filter(|(name, _)| !now.contains_key(*name));
    complaints.extend(gone.map(|(name, _)| format!("{name} is in ABOVE, but in no object")));
    complaints
}

fn judge(recorded: &Programs, now: &Programs) -> Vec<String> {
    let mut complaints = Vec::new();
    for name in recorded.keys().filter(|name| !now.contains_key(*name)) {
        complaints.push(format!(
            "{name} is recorded, but the object has no such program"
        ));
    }
    for (name, figures) in now {
        let Some(before) = recorded.get(name) else {
            complaints.push(format!("{name} is not recorded"));
            continue;
        };
        let total = |figures: &Figures| figures.stack.iter().sum::<u32>();
        for (what, before, after) in [
            (
                "instructions to check",
                before.instructions,
                figures.instructions,
            ),
            ("bytes of stack", total(before), total(figures)),
        ] {
            if u64::from(after) * 100 > u64::from(before) * u64::from(100 + GROWTH) {
                complaints.push(format!(
                    "{name}: {after} {what}, which is over {GROWTH} % more than the recorded {before}"
                ));
            }
        }
    }
    complaints
}

/// The first line tells where the figures come from; kernels differ in what they walk through.
fn text(programs: &Programs) -> String {
    let kernel = nix::sys::utsname::uname().unwrap();
    let mut text = format!(
        "# What Linux {} says of each program; written by `cargo xtask verifier --record`.\n",
        kernel.release().to_string_lossy()
    );
    text.push_str("# program, instructions checked, bytes of stack of it and its functions, bytes of machine code\n");
    for (name, figures) in programs {
        let stack: Vec<String> = figures.stack.iter().map(u32::to_string).collect();
        let (instructions, code) = (figures.instructions, figures.machine_code);
        writeln!(text, "{name} {instructions} {} {code}", stack.join("+")).unwrap();
    }
    text
}

fn parse(text: &str) -> Programs {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            let &[name, instructions, stack, machine_code] = &words[..] else {
                panic!("{FILE} has a line that is none: {line:?}; {HOW}");
            };
            let figures = Figures {
                instructions: instructions.parse().unwrap(),
                stack: stack.split('+').map(|one| one.parse().unwrap()).collect(),
                machine_code: machine_code.parse().unwrap(),
            };
            (name.to_owned(), figures)
        })
        .collect()
}

fn one(name: &str, instructions: u32, stack: &[u32]) -> Programs {
    let figures = Figures {
        instructions,
        stack: stack.to_vec(),
        machine_code: 7,
    };
    [(name.to_owned(), figures)].into()
}

#[test]
fn the_record_reads_as_it_was_written() {
    let _alone = FILES.lock().unwrap();
    let programs = one("a", 4000, &[200, 0, 16]);
    assert_eq!(parse(&text(&programs)), programs);
    let committed = std::fs::read_to_string(FILE).unwrap();
    assert!(!parse(&committed).is_empty());
}

#[test]
fn growth_and_what_is_missing_are_told() {
    let recorded = one("a", 1000, &[100, 100]);
    let told = |now: &Programs| judge(&recorded, now).len();
    assert_eq!(told(&one("a", 1100, &[120, 100])), 0);
    assert_eq!(told(&one("a", 500, &[0])), 0);
    assert_eq!(told(&one("a", 1101, &[100, 100])), 1);
    assert_eq!(told(&one("a", 1000, &[100, 121])), 1);
    // One that is gone, one that is new.
    assert_eq!(told(&one("b", 1000, &[100, 100])), 2);
    let large = one("a", MOST + 1, &[8]);
    assert_eq!(beyond(&large, &[]).len(), 1);
    assert_eq!(beyond(&large, &[("a", MOST + 1)]).len(), 0);
    assert_eq!(beyond(&large, &[("a", MOST)]).len(), 1);
    assert_eq!(beyond(&recorded, &[]).len(), 0);
    // An exception that is not needed, and one for nobody.
    assert_eq!(beyond(&recorded, &[("a", MOST + 1)]).len(), 1);
    assert_eq!(beyond(&recorded, &[("b", MOST + 1)]).len(), 1);
}
