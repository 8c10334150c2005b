//! One line of results, the same for every benchmark, and the arithmetic behind it.
//!
//! A benchmark measures in rounds. Where there is a peer, each round measures ours and then the peer, so that
//! whatever the machine does meanwhile meets both. `ours` and `peer` are medians over the rounds; `ratio` is the
//! median of the rounds' own ratios ours/peer, so it may differ a little from the quotient of the two medians.
//! `spread` is (maximum - minimum) / median over the rounds of the number that the aim judges: of the ratios
//! where the aim is a ratio, else of ours; 0 for one round. `aim` is in the row's unit, or a ratio where the row's
//! peer is its measure; `met` is null where there is no aim.

use anyhow::{Context, Result, ensure};
use serde::Serialize;

/// What a row shall reach.
#[derive(Clone, Copy, PartialEq)]
pub enum Aim {
    /// Nothing is promised; the number is for information.
    None,
    /// Ours, in the row's unit, or less.
    AtMost(f64),
    /// Ours, in the row's unit, or more.
    AtLeast(f64),
    /// Ours divided by the peer's, or more.
    Ratio(f64),
}

/// One case of a benchmark: what it is called and what it shall reach.
pub struct Case<'a> {
    /// The benchmark.
    pub bench: &'static str,
    /// What is measured.
    pub case: &'a str,
    /// The unit of `ours` and `peer`.
    pub unit: &'static str,
    /// What it shall reach.
    pub aim: Aim,
}

/// One line of results; its serialized form is the line of `--json`.
#[derive(Serialize)]
pub struct Row {
    /// The benchmark.
    pub bench: &'static str,
    /// What was measured.
    pub case: String,
    /// The unit of `ours` and `peer`.
    pub unit: &'static str,
    /// Median of ours.
    pub ours: f64,
    /// Median of the peer's.
    pub peer: Option<f64>,
    /// Who the peer is.
    pub peer_name: Option<String>,
    /// Median of the rounds' ratios.
    pub ratio: Option<f64>,
    /// What was to be reached.
    pub aim: Option<f64>,
    /// Whether it was.
    pub met: Option<bool>,
    /// How many times it was measured.
    pub rounds: usize,
    /// (maximum - minimum) / median of what the aim judges.
    pub spread: f64,
    #[serde(skip)]
    judged: Aim,
}

impl Row {
    /// A row without a peer, from what its rounds gave.
    pub fn alone(case: Case, ours: &[f64]) -> Result<Self> {
        Self::new(case, ours, None)
    }

    /// A row with a peer, from rounds that gave (ours, peer's).
    pub fn paired(case: Case, peer_name: &str, rounds: &[(f64, f64)]) -> Result<Self> {
        let (ours, peers): (Vec<f64>, Vec<f64>) = rounds.iter().copied().unzip();
        Self::new(case, &ours, Some((peer_name, &peers)))
    }

    fn new(case: Case, ours: &[f64], peer: Option<(&str, &[f64])>) -> Result<Self> {
        ensure!(!ours.is_empty(), "{}: nothing was measured", case.case);
        let ratios: Option<Vec<f64>> = peer.map(|(_, peers)| {
            ours.iter()
                .zip(peers)
                .map(|(ours, peer)| ours / peer)
                .collect()
        });
        let ratio = ratios.as_deref().map(median);
        let (aim, met) = match case.aim {
            Aim::None => (None, None),
            Aim::AtMost(aim) => (Some(aim), Some(median(ours) <= aim)),
            Aim::AtLeast(aim) => (Some(aim), Some(median(ours) >= aim)),
            Aim::Ratio(aim) => (Some(aim), ratio.map(|ratio| ratio >= aim)),
        };
        let judged = match (&ratios, case.aim) {
            (Some(ratios), Aim::Ratio(_)) => ratios,
            _ => ours,
        };
        Ok(Self {
            bench: case.bench,
            case: case.case.to_owned(),
            unit: case.unit,
            ours: rounded(median(ours)),
            peer: peer.map(|(_, peers)| rounded(median(peers))),
            peer_name: peer.map(|(name, _)| name.to_owned()),
            ratio: ratio.map(rounded),
            aim,
            met,
            rounds: ours.len(),
            spread: rounded(spread(judged)),
            judged: case.aim,
        })
    }

    /// The line of `--json`.
    pub fn json(&self) -> Result<String> {
        serde_json::to_string(self).context("could not write a row as JSON")
    }

    /// Whether anything was to be reached.
    pub fn has_aim(&self) -> bool {
        self.judged != Aim::None
    }

    /// The cells of a table's row, as [`HEADINGS`] names them.
    pub fn cells(&self) -> [String; 8] {
        let or_dash = |value: Option<String>| value.unwrap_or_else(|| "–".to_owned());
        let aim = match self.judged {
            Aim::None => None,
            Aim::AtMost(aim) => Some(format!("≤ {}", number(aim))),
            Aim::AtLeast(aim) => Some(format!("≥ {}", number(aim))),
            Aim::Ratio(aim) => Some(format!("ratio ≥ {aim}")),
        };
        let verdict = self
            .met
            .map_or("", |met| if met { " ✓" } else { ", missed" });
        let peer = self
            .peer
            .zip(self.peer_name.as_ref())
            .map(|(value, name)| format!("{} ({name})", number(value)));
        [
            self.bench.to_owned(),
            self.case.clone(),
            format!("{} {}", number(self.ours), self.unit),
            or_dash(peer),
            or_dash(self.ratio.map(|ratio| format!("{ratio:.3}"))),
            or_dash(aim.map(|aim| aim + verdict)),
            self.rounds.to_string(),
            format!("{:.1} %", self.spread * 100.0),
        ]
    }
}

/// Headings of a table of rows.
pub const HEADINGS: [&str; 8] = [
    "benchmark",
    "case",
    "ours",
    "peer",
    "ratio",
    "aim",
    "rounds",
    "spread",
];

/// A line of a table in Markdown.
pub fn line(cells: &[String]) -> String {
    format!("| {} |", cells.join(" | "))
}

/// The first two lines of a table of rows in Markdown.
pub fn head() -> [String; 2] {
    let rule = HEADINGS.map(|_| "---".to_owned());
    [line(&HEADINGS.map(str::to_owned)), line(&rule)]
}

/// Rows as a table for a terminal.
pub fn table(rows: &[Row]) -> String {
    let mut lines = vec![HEADINGS.map(str::to_owned)];
    lines.extend(rows.iter().map(Row::cells));
    let widths: Vec<usize> = (0..HEADINGS.len())
        .map(|column| {
            lines
                .iter()
                .map(|line| line[column].chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for line in &lines {
        let padded: Vec<String> = line
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        text.push_str(padded.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// The middle value; of an even number, the mean of the two in the middle.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

/// (maximum - minimum) / median.
pub fn spread(values: &[f64]) -> f64 {
    let most = values.iter().copied().fold(f64::MIN, f64::max);
    let least = values.iter().copied().fold(f64::MAX, f64::min);
    let middle = median(values);
    if middle == 0.0 {
        return 0.0;
    }
    (most - least) / middle
}

/// Four significant digits: more would claim more than was measured.
pub fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let scale = 10f64.powi(3 - value.abs().log10().floor() as i32);
    (value * scale).round() / scale
}

/// A number for people: groups of three digits, decimals only where they matter.
pub fn number(value: f64) -> String {
    if value.abs() < 1000.0 {
        return rounded(value).to_string();
    }
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may panic")]
    use super::*;

    fn case(aim: Aim) -> Case<'static> {
        Case {
            bench: "b",
            case: "c",
            unit: "1/s",
            aim,
        }
    }

    #[test]
    fn the_ratio_is_the_median_of_rounds_and_the_aim_judges_it() {
        // The machine was half as fast in the second round; each round's own ratio does not notice.
        let rounds = [(90.0, 100.0), (47.5, 50.0), (96.0, 100.0)];
        let row = Row::paired(case(Aim::Ratio(0.95)), "p", &rounds).unwrap();
        assert_eq!((row.ours, row.peer), (90.0, Some(100.0)));
        assert_eq!((row.ratio, row.met), (Some(0.95), Some(true)));
        assert_eq!(row.spread, rounded((0.96 - 0.9) / 0.95));
        let missed = Row::paired(case(Aim::Ratio(0.951)), "p", &rounds).unwrap();
        assert_eq!(missed.met, Some(false));
    }

    #[test]
    fn an_aim_in_the_unit_judges_ours() {
        let ours = [10.0, 30.0, 20.0, 40.0];
        let row = Row::alone(case(Aim::AtMost(24.9)), &ours).unwrap();
        assert_eq!((row.ours, row.met, row.spread), (25.0, Some(false), 1.2));
        let row = Row::alone(case(Aim::AtLeast(25.0)), &ours).unwrap();
        assert_eq!((row.met, row.peer, row.ratio), (Some(true), None, None));
        assert!(Row::alone(case(Aim::None), &[]).is_err());
    }

    #[test]
    fn the_line_has_the_agreed_keys() {
        let row = Row::alone(case(Aim::None), &[1.0]).unwrap();
        assert_eq!(
            row.json().unwrap(),
            r#"{"bench":"b","case":"c","unit":"1/s","ours":1.0,"peer":null,"peer_name":null,"ratio":null,"aim":null,"met":null,"rounds":1,"spread":0.0}"#
        );
    }

    #[test]
    fn numbers_are_grouped_and_rounded() {
        assert_eq!(number(1_234_567.0), "1,234,567");
        assert_eq!(number(999.96), "1000");
        assert_eq!(number(0.123_456), "0.1235");
        assert_eq!(rounded(123_456.0), 123_500.0);
    }
}
