//! The table of `services`: all variants beside each other, at every size.

use anyhow::{Context, Result};
use serde::Serialize;

use super::traffic::{Side, Way};
use super::wire::Measured;
use crate::row::{median, number, rounded, spread};

/// What one variant did at one size.
#[derive(Serialize)]
pub struct Cell {
    bench: &'static str,
    mode: &'static str,
    side: &'static str,
    variant: &'static str,
    services: usize,
    /// Transactions per second, median of the rounds.
    rate: f64,
    /// Microseconds, median of the rounds' medians.
    p50: f64,
    /// Microseconds, median of the rounds' 99th percentiles.
    p99: f64,
    /// Median of the rounds' ratios to the bare path.
    of_bare: Option<f64>,
    /// (maximum - minimum) / median of these ratios; of the rates, for the bare path.
    spread: f64,
    rounds: usize,
    #[serde(skip)]
    place: (Side, Way),
}

impl Cell {
    /// From the rounds of a variant and of the bare path.
    pub fn new(
        mode: &'static str,
        side: Side,
        way: Way,
        services: usize,
        rounds: &[Measured],
        bare: Option<&[Measured]>,
    ) -> Self {
        let all = |what: fn(&Measured) -> f64| rounds.iter().map(what).collect::<Vec<f64>>();
        let rates = all(|one| one.rate);
        let bare = bare.filter(|_| way != Way::Bare);
        let ratios: Option<Vec<f64>> = bare.map(|bare| {
            rates
                .iter()
                .zip(bare)
                .map(|(rate, bare)| rate / bare.rate)
                .collect()
        });
        Self {
            bench: "services",
            mode,
            side: match side {
                Side::Pod => "pod",
                Side::Outside => "outside",
            },
            variant: way.name(),
            services,
            rate: rounded(median(&rates)),
            p50: rounded(median(&all(|one| one.p50))),
            p99: rounded(median(&all(|one| one.p99))),
            of_bare: ratios.as_deref().map(|ratios| rounded(median(ratios))),
            spread: rounded(spread(ratios.as_deref().unwrap_or(&rates))),
            rounds: rates.len(),
            place: (side, way),
        }
    }

    fn text(&self) -> String {
        let part = self
            .of_bare
            .map(|part| format!(" = {part:.3}"))
            .unwrap_or_default();
        format!(
            "{}{part} ± {:.0} % ({:.0}/{:.0} µs)",
            number(self.rate),
            self.spread * 50.0,
            self.p50,
            self.p99
        )
    }
}

/// All cells, and what could not be measured.
#[derive(Default)]
pub struct Matrix {
    /// In the order in which they were measured.
    pub cells: Vec<Cell>,
    /// Variants that are missing, and why.
    pub notes: Vec<String>,
}

/// The columns: who asks, through what.
const COLUMNS: [(Side, Way, &str); 7] = [
    (Side::Pod, Way::Bare, "bare path"),
    (Side::Pod, Way::Iptables, "kube-proxy iptables"),
    (Side::Pod, Way::Nftables, "kube-proxy nftables"),
    (Side::Pod, Way::Sockets, "Xebec, socket LB"),
    (Side::Pod, Way::Packets, "Xebec, per packet"),
    (Side::Outside, Way::Bare, "bare path, outside client"),
    (Side::Outside, Way::Packets, "Xebec, NodePort"),
];

impl Matrix {
    /// One line of JSON for each cell.
    pub fn lines(&self) -> Result<Vec<String>> {
        self.cells
            .iter()
            .map(|cell| serde_json::to_string(cell).context("could not write a cell as JSON"))
            .collect()
    }

    /// The table.
    pub fn markdown(&self) -> String {
        let mut lines = vec![
            "Through Services of 10 endpoints each: transactions per second = their part of the bare path's ± half of the spread of this (p50/p99). Peers: the rule sets that kube-proxy 1.36.2 wrote for the same Services; they have no UDP and no node ports. Aims: 0.95 of the bare path, no less than any peer, and flat within 5 % from 1 to 100,000 Services.".to_owned(),
            String::new(),
        ];
        let row = |words: Vec<String>| format!("| {} |", words.join(" | "));
        let mut head = vec!["transaction".to_owned(), "Services".to_owned()];
        head.extend(COLUMNS.iter().map(|(_, _, name)| (*name).to_owned()));
        lines.push(row(head.clone()));
        lines.push(row(vec!["---".to_owned(); head.len()]));
        let mut modes: Vec<&str> = Vec::new();
        let mut sizes: Vec<usize> = Vec::new();
        for cell in &self.cells {
            if !modes.contains(&cell.mode) {
                modes.push(cell.mode);
            }
            if !sizes.contains(&cell.services) {
                sizes.push(cell.services);
            }
        }
        for mode in modes {
            for &services in &sizes {
                let mut words = vec![mode.to_owned(), number(services as f64)];
                words.extend(COLUMNS.iter().map(|(side, way, _)| {
                    self.cells
                        .iter()
                        .find(|cell| {
                            cell.mode == mode
                                && cell.services == services
                                && cell.place == (*side, *way)
                        })
                        .map_or_else(|| "–".to_owned(), Cell::text)
                }));
                lines.push(row(words));
            }
        }
        if !self.notes.is_empty() {
            lines.push(String::new());
            lines.push("Not measured:".to_owned());
            lines.extend(self.notes.iter().map(|note| format!("- {note}")));
        }
        lines.join("\n")
    }
}
