//! Benchmarks, each against a named peer in the same run: `cargo xtask bench [NAME] [--quick] [--json]`.

mod cleanup;
mod cluster;
mod flows;
mod idle;
mod lb;
mod machine;
mod net;
mod netns;
mod policy;
mod readme;
mod row;
mod services;
mod tail;
mod traffic;
mod up;
mod writes;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Parser;
use row::Row;

/// Measures the `xebec` executable that $XEBEC_BIN names; needs root.
#[derive(Parser)]
#[command(name = "xebec-bench")]
struct Args {
    /// Only this benchmark
    name: Option<String>,
    /// Short rounds and few: whether it works, not how fast it is
    #[arg(long)]
    quick: bool,
    /// Print one JSON object per line instead of a table
    #[arg(long)]
    json: bool,
    /// Write the results into README.md too
    #[arg(long)]
    readme: bool,
    /// Show what is there to measure
    #[arg(long)]
    list: bool,
}

/// How thoroughly to measure.
#[derive(Clone, Copy)]
struct Effort {
    /// Whether this is only a trial.
    quick: bool,
}

impl Effort {
    /// One of two values: for a full measurement, and for a trial.
    fn of<T>(self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }
}

/// A benchmark: its name, what it is about, what runs it.
struct Benchmark {
    name: &'static str,
    about: &'static str,
    /// Whether the README tells of its rows in a table of their own alone.
    apart: bool,
    run: fn(Effort) -> Result<Outcome>,
}

/// What a benchmark gives.
#[derive(Default)]
struct Outcome {
    /// Lines of the common table, if they are not told of apart.
    rows: Vec<Row>,
    /// Tables of its own, by name.
    sections: Vec<(&'static str, String)>,
    /// Lines of `--json` besides the rows'.
    lines: Vec<String>,
}

impl From<Vec<Row>> for Outcome {
    fn from(rows: Vec<Row>) -> Self {
        Self {
            rows,
            ..Self::default()
        }
    }
}

impl Outcome {
    /// Rows with an aim for the common table; the others are details, which follow `text` in a table of the benchmark's
    /// own.
    fn with_details(name: &'static str, text: &str, rows: Vec<Row>) -> Result<Self> {
        let (rows, details): (Vec<Row>, Vec<Row>) = rows.into_iter().partition(Row::has_aim);
        let section = section(text, &details);
        Self::of(name, section, rows, &details)
    }

    /// All rows in a table of the benchmark's own, after `text`.
    fn apart(name: &'static str, text: &str, rows: Vec<Row>) -> Result<Self> {
        let section = section(text, &rows);
        let (rows, details): (Vec<Row>, Vec<Row>) = rows.into_iter().partition(Row::has_aim);
        Self::of(name, section, rows, &details)
    }

    fn of(name: &'static str, section: String, rows: Vec<Row>, details: &[Row]) -> Result<Self> {
        Ok(Self {
            rows,
            sections: vec![(name, section)],
            lines: details.iter().map(Row::json).collect::<Result<_>>()?,
        })
    }
}

/// A text, and a table after it if there are rows.
fn section(text: &str, rows: &[Row]) -> String {
    if rows.is_empty() {
        return text.to_owned();
    }
    let lines = rows.iter().map(|row| row::line(&row.cells()));
    let table: Vec<String> = row::head().into_iter().chain(lines).collect();
    format!("{text}\n\n{}", table.join("\n"))
}

/// All benchmarks, in the order in which they run.
const BENCHMARKS: &[Benchmark] = &[
    Benchmark {
        name: "up",
        about: "seconds from `xebec up` to a Ready node and to a Running pod",
        apart: false,
        run: |effort| up::run(effort).map(Outcome::from),
    },
    Benchmark {
        name: "idle",
        about: "memory and CPU of a cluster without pods, size of the executable",
        apart: false,
        run: |effort| idle::run(effort).map(Outcome::from),
    },
    Benchmark {
        name: flows::read::NAME,
        about: "events of flows named, kept, and read by 1, 10 and 100 clients; memory of a flow",
        apart: true,
        run: flows::read::run,
    },
    Benchmark {
        name: flows::cost::NAME,
        about: "rates of a pod whose flows are observed, beside those of one whose are not",
        apart: true,
        run: flows::cost::run,
    },
    Benchmark {
        name: "writes",
        about: "durable writes per second through the API server",
        apart: false,
        run: |effort| writes::run(effort).map(Outcome::from),
    },
    Benchmark {
        name: "net",
        about: "TCP between pods and to Services, beside a bare veth pair",
        apart: false,
        run: |effort| net::run(effort).map(Outcome::from),
    },
    Benchmark {
        name: "services",
        about: "rates and latencies through up to 100,000 Services, beside kube-proxy's rules",
        apart: true,
        run: services::traffic,
    },
    Benchmark {
        name: "service-change",
        about: "time from an endpoint's change in the API to the first packet that obeys it",
        apart: false,
        run: services::change,
    },
    Benchmark {
        name: "service-tables",
        about: "decoded Services into the kernel's maps: rate, memory, and one change",
        apart: false,
        run: |effort| services::tables(effort).map(Outcome::from),
    },
    Benchmark {
        name: "service-sync",
        about: "time and memory of a full sync of Services from nothing",
        apart: false,
        run: services::sync,
    },
    Benchmark {
        name: "policy-change",
        about: "time from a policy's change in the API until every pod of the node is judged by it",
        apart: true,
        run: policy::change,
    },
    Benchmark {
        name: "policy-verdict",
        about: "nanoseconds that rules cost a packet, up to 524,288 of them",
        apart: true,
        run: policy::verdict,
    },
    Benchmark {
        name: "policy-memory",
        about: "the kernel's memory for the rules of 1,000 pods, and traffic under rules beside none",
        apart: true,
        run: policy::memory,
    },
    Benchmark {
        name: "policy-peers",
        about: "rates under up to 2,500 policies and the time of a change, beside iptables and nftables",
        apart: true,
        run: policy::peers,
    },
    Benchmark {
        name: "xdp-lb",
        about: "nanoseconds per packet of the programs, in the scenarios of the kernel's xdp-lb",
        apart: true,
        run: lb::run,
    },
    Benchmark {
        name: "flow-idle",
        about: "memory of idle flows, and the time until a million expired ones are replaced",
        apart: false,
        run: |effort| lb::expiry::run(effort).map(Outcome::from),
    },
    Benchmark {
        name: "xdp-live",
        about: "live frames per second through XDP, beside a bare redirect",
        apart: false,
        run: |effort| lb::live::run(effort).map(Outcome::from),
    },
];

fn main() -> ExitCode {
    let part = std::env::args_os()
        .nth(1)
        .is_some_and(|first| first == services::PART);
    let outcome = if part {
        services::part::main()
    } else {
        run(Args::parse())
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<()> {
    if args.list {
        for benchmark in BENCHMARKS {
            println!("{:14} {}", benchmark.name, benchmark.about);
        }
        return Ok(());
    }
    let chosen: Vec<&Benchmark> = BENCHMARKS
        .iter()
        .filter(|benchmark| {
            args.name
                .as_deref()
                .is_none_or(|name| name == benchmark.name)
        })
        .collect();
    if chosen.is_empty() {
        let names: Vec<&str> = BENCHMARKS.iter().map(|benchmark| benchmark.name).collect();
        bail!(
            "there is no benchmark {:?} (there are: {})",
            args.name.unwrap_or_default(),
            names.join(", ")
        );
    }
    if args.quick && args.readme {
        bail!("--quick measures too little for the README; leave out one of --quick and --readme");
    }
    if std::env::var_os("XEBEC_BIN").is_none() {
        bail!("XEBEC_BIN names no executable to measure; run `cargo xtask bench`");
    }
    if !nix::unistd::geteuid().is_root() {
        bail!("benchmarks start clusters, which needs root; run `cargo xtask bench`");
    }
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("another TLS provider is installed already"))?;
    cleanup::on_signals()?;
    let readme = PathBuf::from("README.md");
    if args.readme {
        readme::check(&readme)?;
    }
    let effort = Effort { quick: args.quick };
    let (mut rows, mut sections, mut failed) = (Vec::new(), Vec::new(), Vec::new());
    for benchmark in chosen {
        eprintln!("bench: {}: {}", benchmark.name, benchmark.about);
        match (benchmark.run)(effort) {
            Ok(measured) => {
                if args.json {
                    for row in &measured.rows {
                        println!("{}", row.json()?);
                    }
                    for line in &measured.lines {
                        println!("{line}");
                    }
                }
                rows.extend(measured.rows);
                sections.extend(measured.sections);
            }
            // The others may still be measured.
            Err(error) => {
                eprintln!("bench: {}: {error:#}", benchmark.name);
                failed.push(benchmark.name);
            }
        }
    }
    if !args.json {
        if !rows.is_empty() {
            print!("{}", row::table(&rows));
        }
        for (_, section) in &sections {
            println!("\n{section}");
        }
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    if args.readme {
        let common = BENCHMARKS.iter().filter(|benchmark| !benchmark.apart);
        let names: Vec<&str> = common.map(|benchmark| benchmark.name).collect();
        readme::update(&readme, &machine::line()?, &rows, &names, &sections)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may panic")]
    use super::*;
    use crate::row::{Aim, Case};

    #[test]
    fn what_has_no_aim_is_a_detail() {
        let row = |case, aim| {
            let case = Case {
                bench: "b",
                case,
                unit: "ms",
                aim,
            };
            Row::alone(case, &[2.0]).unwrap()
        };
        let rows = vec![row("p99", Aim::AtMost(10.0)), row("median", Aim::None)];
        let told = Outcome::with_details("b", "Beside others.", rows).unwrap();
        let cases: Vec<&str> = told.rows.iter().map(|row| row.case.as_str()).collect();
        assert_eq!(cases, ["p99"]);
        let [(name, section)] = &told.sections[..] else {
            panic!("one section");
        };
        assert_eq!(*name, "b");
        assert!(section.starts_with("Beside others.\n\n| benchmark | case |"));
        assert!(section.ends_with("| b | median | 2 ms | – | – | – | 1 | 0.0 % |"));
        assert!(!section.contains("p99"));
        // Nothing is left out of what programs read.
        assert!(told.lines.len() == 1 && told.lines[0].contains(r#""case":"median""#));
        let told = Outcome::with_details("b", "Beside others.", Vec::new()).unwrap();
        assert_eq!(told.sections[0].1, "Beside others.");
    }
}
