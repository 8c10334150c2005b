//! The table in README.md between two comments, written by the benchmarks themselves.

use std::path::Path;

use anyhow::{Context, Result};

use crate::row::{self, Row};

const BEGIN: &str = "<!-- measured: begin -->";
const END: &str = "<!-- measured: end -->";

/// Fails where there is no place for a table, before anything is measured in vain.
pub fn check(path: &Path) -> Result<()> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("could not read {}", path.display()))?;
    replaced(&text, "", &[], &[])
        .map(drop)
        .with_context(|| format!("{} is of no use for --readme", path.display()))
}

/// Puts these rows into the README's table, in the order of `benchmarks`; rows of benchmarks that were not run
/// stay if the machine is the same.
pub fn update(
    path: &Path,
    machine: &str,
    rows: &[Row],
    benchmarks: &[&str],
    sections: &[(&str, String)],
) -> Result<()> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("could not read {}", path.display()))?;
    let left = || format!("{} was left as it is", path.display());
    let mut updated = replaced(&text, machine, rows, benchmarks).with_context(left)?;
    for (name, section) in sections {
        updated = with_section(&updated, name, machine, section).with_context(left)?;
    }
    std::fs::write(path, updated).with_context(|| format!("could not write {}", path.display()))?;
    eprintln!("bench: results written to {}", path.display());
    Ok(())
}

/// Puts a benchmark's own table between comments of its own; they follow the common table where they are missing.
fn with_section(text: &str, name: &str, machine: &str, section: &str) -> Result<String> {
    let (begin, end) = (
        format!("<!-- measured {name}: begin -->"),
        format!("<!-- measured {name}: end -->"),
    );
    let body = format!("{begin}\nMeasured on: {machine}. {section}\n{end}");
    if let Some((before, rest)) = text.split_once(&begin) {
        let (_, after) = rest
            .split_once(&end)
            .with_context(|| format!("it has no line {end}"))?;
        return Ok(format!("{before}{body}{after}"));
    }
    let (before, after) = text
        .split_once(END)
        .with_context(|| format!("it has no line {END}"))?;
    Ok(format!("{before}{END}\n\n{body}{after}"))
}

fn replaced(text: &str, machine: &str, rows: &[Row], benchmarks: &[&str]) -> Result<String> {
    let (before, rest) = text
        .split_once(BEGIN)
        .with_context(|| format!("it has no line {BEGIN}"))?;
    let (old, after) = rest
        .split_once(END)
        .with_context(|| format!("it has no line {END}"))?;
    if !rows.iter().any(|row| benchmarks.contains(&row.bench)) {
        // Nothing was measured that the table tells of: it stays, even if it is of another machine.
        return Ok(text.to_owned());
    }
    let machine = format!("Measured on: {machine}.");
    let mut table = row::head().to_vec();
    for benchmark in benchmarks {
        let new: Vec<String> = rows
            .iter()
            .filter(|row| row.bench == *benchmark)
            .map(|row| row::line(&row.cells()))
            .collect();
        if !new.is_empty() {
            table.extend(new);
        } else if old.contains(&machine) {
            let start = format!("| {benchmark} |");
            let kept = old.lines().filter(|line| line.starts_with(&start));
            table.extend(kept.map(str::to_owned));
        }
    }
    Ok(format!(
        "{before}{BEGIN}\n{machine}\n\n{}\n{END}{after}",
        table.join("\n")
    ))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may panic")]
    use super::*;
    use crate::row::{Aim, Case};

    fn row(bench: &'static str, ours: f64) -> Row {
        let case = Case {
            bench,
            case: "c",
            unit: "s",
            aim: Aim::AtMost(1.0),
        };
        Row::alone(case, &[ours]).unwrap()
    }

    #[test]
    fn a_section_is_added_once_and_replaced_then() {
        let text = format!("# A\n{BEGIN}\nrows\n{END}\n\nend\n");
        let first = with_section(&text, "s", "m", "| 1 |").unwrap();
        assert!(first.contains("rows") && first.ends_with("\n\nend\n"));
        let second = with_section(&first, "s", "n", "| 2 |").unwrap();
        assert!(second.contains("Measured on: n. | 2 |") && !second.contains("| 1 |"));
        assert_eq!(second.matches("measured s: begin").count(), 1);
        assert!(second.ends_with("<!-- measured s: end -->\n\nend\n"));
        assert!(with_section("none", "s", "m", "").is_err());
    }

    #[test]
    fn only_the_text_between_the_markers_changes() {
        let text = format!("# A\n\n{BEGIN}\nold\n{END}\n\nend\n");
        let all = ["up", "idle"];
        let first = replaced(&text, "m", &[row("up", 0.5), row("idle", 0.7)], &all).unwrap();
        assert!(first.starts_with("# A\n\n") && first.ends_with("\n\nend\n"));
        assert!(!first.contains("old"));
        assert!(first.contains("| up | c | 0.5 s | – | – | ≤ 1 ✓ | 1 | 0.0 % |"));
        // One benchmark anew on the same machine: the other's row stays, in its place.
        let second = replaced(&first, "m", &[row("up", 2.0)], &all).unwrap();
        let place = |what: &str| second.find(what).unwrap();
        assert!(place("| up | c | 2 s | – | – | ≤ 1, missed |") < place("| idle | c | 0.7 s"));
        // On another machine nothing of the old one stays.
        let third = replaced(&second, "n", &[row("up", 2.0)], &all).unwrap();
        assert!(!third.contains("idle"));
        // But what has tables of its own alone changes nothing.
        let fourth = replaced(&second, "n", &[row("apart", 2.0)], &all).unwrap();
        assert_eq!(fourth, second);
        assert!(replaced("no markers", "m", &[], &all).is_err());
    }
}
