//! Times of changes as rows: the median, the 99th percentile, and the one worst of all.

use anyhow::Result;

use crate::row::{Aim, Case, Row, median};

/// Of all rounds the 99th percentile, which an aim is for, and the median; with an aim, the one worst of all, too.
pub fn tail(bench: &'static str, what: &str, aim: Aim, rounds: &[Vec<f64>]) -> Result<Vec<Row>> {
    let p99s: Vec<f64> = rounds.iter().map(|took| at(took, 0.99)).collect();
    let medians: Vec<f64> = rounds.iter().map(|took| median(took)).collect();
    let all = rounds.concat();
    let worst = at(&all, 1.0);
    eprintln!(
        "bench: {bench}: {what}: {:.3} ms, p99 {:.3} ms, worst {worst:.3} ms",
        median(&medians),
        median(&p99s),
    );
    let row = |last: &str, aim, values: &[f64]| {
        let case = Case {
            bench,
            case: &format!("{what}, {last}"),
            unit: "ms",
            aim,
        };
        Row::alone(case, values)
    };
    let mut rows = vec![row("median", Aim::None, &medians)?, row("p99", aim, &p99s)?];
    if aim != Aim::None {
        let last = format!("worst of {}", all.len());
        rows.push(row(&last, Aim::None, &[worst])?);
    }
    Ok(rows)
}

/// The value that this part of all are not above.
pub fn at(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = ((sorted.len() as f64 * part).ceil() as usize).saturating_sub(1);
    sorted.get(place).copied().unwrap_or(f64::NAN)
}

/// Milliseconds between two readings of [`part::now`](crate::services::part::now).
pub fn millis(from: u64, to: u64) -> f64 {
    to.saturating_sub(from) as f64 / 1e6
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may panic")]
    use super::*;

    #[test]
    fn the_aim_is_for_the_99th_percentile_and_the_worst_is_not_hidden() {
        // One in a hundred is slow; in the second round two are.
        let mut rounds = vec![vec![1.0; 100]; 3];
        rounds[0][7] = 500.0;
        rounds[1][3] = 40.0;
        rounds[1][90] = 30.0;
        let rows = tail("b", "w", Aim::AtMost(10.0), &rounds).unwrap();
        let [middle, p99, worst] = &rows[..] else {
            panic!("three rows");
        };
        assert_eq!((p99.ours, p99.met, p99.rounds), (1.0, Some(true), 3));
        assert_eq!(p99.spread, 29.0);
        assert_eq!((middle.ours, middle.met), (1.0, None));
        assert_eq!(
            (worst.ours, worst.case.as_str()),
            (500.0, "w, worst of 300")
        );
        rounds[2][0..2].fill(30.0);
        let rows = tail("b", "w", Aim::AtMost(10.0), &rounds).unwrap();
        assert_eq!(rows[1].met, Some(false));
        assert_eq!(tail("b", "w", Aim::None, &rounds).unwrap().len(), 2);
        assert!(tail("b", "w", Aim::None, &[]).is_err());
    }
}
