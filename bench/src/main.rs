//! Benchmarks, each against a named peer in the same run: `cargo xtask bench [NAME] [--quick] [--json]`.

mod cleanup;
mod cluster;
mod idle;
mod machine;
mod net;
mod netns;
mod readme;
mod row;
mod traffic;
mod up;
mod writes;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
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
    run: fn(Effort) -> Result<Vec<Row>>,
}

/// All benchmarks, in the order in which they run.
const BENCHMARKS: &[Benchmark] = &[
    Benchmark {
        name: "up",
        about: "seconds from `xebec up` to a Ready node and to a Running pod",
        run: up::run,
    },
    Benchmark {
        name: "idle",
        about: "memory and CPU of a cluster without pods, size of the executable",
        run: idle::run,
    },
    Benchmark {
        name: "writes",
        about: "durable writes per second through the API server",
        run: writes::run,
    },
    Benchmark {
        name: "net",
        about: "TCP between pods and to Services, beside a bare veth pair",
        run: net::run,
    },
];

fn main() -> ExitCode {
    match run(Args::parse()) {
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
            println!("{:8} {}", benchmark.name, benchmark.about);
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
    let (mut rows, mut failed) = (Vec::new(), Vec::new());
    for benchmark in chosen {
        eprintln!("bench: {}: {}", benchmark.name, benchmark.about);
        match (benchmark.run)(effort) {
            Ok(measured) => {
                if args.json {
                    for row in &measured {
                        let line =
                            serde_json::to_string(row).context("could not write a row as JSON")?;
                        println!("{line}");
                    }
                }
                rows.extend(measured);
            }
            // The others may still be measured.
            Err(error) => {
                eprintln!("bench: {}: {error:#}", benchmark.name);
                failed.push(benchmark.name);
            }
        }
    }
    if !args.json && !rows.is_empty() {
        print!("{}", row::table(&rows));
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    if args.readme {
        let names: Vec<&str> = BENCHMARKS.iter().map(|benchmark| benchmark.name).collect();
        readme::update(&readme, &machine::line()?, &rows, &names)?;
    }
    Ok(())
}
