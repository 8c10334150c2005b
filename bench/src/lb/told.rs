//! What `xdp-lb` tells: its table, and how costs change with the number of Services.

use std::collections::BTreeMap;

use anyhow::Result;

use super::SUBJECTS;
use super::scenario::{LEFT_OUT, SCENARIOS};
use crate::row::{Aim, Case, Row, median, number};

/// All that was measured.
pub struct Told<'a> {
    sizes: &'a [usize],
    /// By scenario, subject and size.
    pub cells: BTreeMap<(usize, usize, usize), String>,
    /// By subject and scenario, of those that have an aim: each round's cost, by size.
    pub costs: BTreeMap<(usize, usize), BTreeMap<usize, Vec<f64>>>,
    /// What could not be measured, and why.
    pub notes: Vec<String>,
}

impl<'a> Told<'a> {
    /// Nothing yet.
    pub fn new(sizes: &'a [usize]) -> Self {
        Self {
            sizes,
            cells: BTreeMap::new(),
            costs: BTreeMap::new(),
            notes: Vec::new(),
        }
    }

    /// What each subject costs with the most Services over what it costs with the fewest, by scenarios that have an aim:
    /// the median over the rounds of each, which both were measured in.
    pub fn changes(&mut self) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        let (Some(fewest), Some(most)) = (self.sizes.first(), self.sizes.last()) else {
            return Ok(rows);
        };
        for (place, subject) in SUBJECTS.iter().enumerate() {
            let of_subject = self.costs.iter().filter(|((one, _), _)| *one == place);
            let ratios: Vec<f64> = of_subject
                .filter_map(|(_, costs)| {
                    let (few, many) = (costs.get(&0)?, costs.get(&(self.sizes.len() - 1))?);
                    let rounds = few.iter().zip(many);
                    Some(median(
                        &rounds.map(|(few, many)| many / few).collect::<Vec<_>>(),
                    ))
                })
                .collect();
            if ratios.is_empty() || fewest == most {
                continue;
            }
            let words = format!(
                "{}, {} Services over {}",
                subject.words,
                number(*most as f64),
                number(*fewest as f64)
            );
            let (low, high) = ratios
                .iter()
                .fold((f64::MAX, f64::MIN), |(low, high), one| {
                    (low.min(*one), high.max(*one))
                });
            self.notes.push(format!(
                "{words}, by scenarios that have an aim: median {:.2}, {low:.2} to {high:.2}",
                median(&ratios)
            ));
            rows.push(Row::alone(
                Case {
                    bench: "xdp-lb",
                    case: &words,
                    unit: "times",
                    aim: Aim::AtMost(1.05),
                },
                &ratios,
            )?);
        }
        Ok(rows)
    }

    /// The table: a line for each scenario.
    pub fn markdown(&self) -> String {
        let row = |words: &[String]| format!("| {} |", words.join(" | "));
        let mut head = vec!["scenario".to_owned()];
        for subject in &SUBJECTS {
            for size in self.sizes {
                head.push(format!("{}, {}", subject.words, number(*size as f64)));
            }
        }
        let mut lines = vec![
            "Nanoseconds of the program over an empty one, in a loop that writes the packet anew (and for a packet that comes alone: median, 99th percentile); columns by number of Services. Scenarios are named as in the Linux kernel's `bench xdp-lb`. Aims: XDP at most 100 ns for one flow (`hit`), 180 for 4,096 (`diverse`), 400 for 262,144 (`256k`); tc, which also enforces policy and tells of flows, 150 and 300; a new flow (`miss`, in a table of 524,288 and more) 800.".to_owned(),
            String::new(),
            row(&head),
            row(&vec!["---".to_owned(); head.len()]),
        ];
        for (index, scenario) in SCENARIOS.iter().enumerate() {
            let mut words = vec![scenario.name.to_owned()];
            for place in 0..SUBJECTS.len() {
                for column in 0..self.sizes.len() {
                    let cell = self.cells.get(&(index, place, column));
                    words.push(cell.cloned().unwrap_or_else(|| "–".to_owned()));
                }
            }
            lines.push(row(&words));
        }
        lines.push(String::new());
        lines.extend(self.notes.iter().map(|note| format!("- {note}")));
        lines.extend(
            LEFT_OUT
                .iter()
                .map(|(names, why)| format!("- not measured: {names}: {why}")),
        );
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may panic")]
    use super::*;

    #[test]
    fn a_change_is_that_of_the_rounds_which_both_sizes_had() {
        let mut told = Told::new(&[1, 100_000]);
        // The machine's speed changed between two rounds, which both sizes met.
        let costs = [
            (0, vec![100.0, 200.0, 200.0]),
            (1, vec![102.0, 204.0, 208.0]),
        ];
        told.costs.insert((0, 3), costs.into());
        // What one size alone has tells no change.
        told.costs.insert((1, 3), [(0, vec![1.0])].into());
        let rows = told.changes().unwrap();
        assert_eq!(rows.len(), 1);
        assert_eq!(rows[0].ours, 1.02);
        assert!(told.markdown().contains("median 1.02, 1.02 to 1.02"));
        let mut alone = Told::new(&[1]);
        alone.costs.insert((0, 3), [(0, vec![1.0])].into());
        assert!(alone.changes().unwrap().is_empty());
    }
}
