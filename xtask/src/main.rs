//! What a developer types: `cargo xtask up | test | bench | build | codegen | setup`.

mod ebpf;
mod initramfs;
mod kernels;
mod setup;
mod shell;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::OnceLock;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use shell::{Cmd, root};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Build, run, test and measure Xebec")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what the build and the tests lack (Debian and Ubuntu packages)
    Setup,
    /// Build the `xebec` executable; prints its path
    Build {
        /// Build with the release profile
        #[arg(long)]
        release: bool,
    },
    /// Build, then start a cluster: everything after `up` goes to `xebec up`
    Up {
        /// Arguments for `xebec up`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Set up what the tests need and run them all (the ones that need root through sudo)
    Test {
        /// Leave out the tests that need root
        #[arg(long)]
        no_root: bool,
        /// Only tests whose name contains this
        filter: Option<String>,
    },
    /// Run the benchmarks: `cargo xtask bench [NAME] [--quick] [--json]`
    Bench {
        /// Arguments for the benchmark runner
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Compare what the kernel's check of each program costs with dataplane-ebpf/verifier.txt (needs root)
    Verifier {
        /// Write what this kernel says instead
        #[arg(long)]
        record: bool,
    },
    /// Try every eBPF program on Debian's kernels, each booted under qemu (takes minutes)
    VerifyKernels {
        /// Versions of kernels that apt knows
        #[arg(default_values = kernels::DEFAULT)]
        kernels: Vec<String>,
        /// Run all tests of packets there, not only a few (takes long, and one of them needs the module bridge)
        #[arg(long)]
        all: bool,
    },
    /// Write the type table of the Kubernetes API anew; `--check` only compares
    Codegen {
        /// Fail when the committed table differs, and change nothing
        #[arg(long)]
        check: bool,
    },
}

fn main() -> ExitCode {
    match run(Args::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Setup => setup::for_tests(),
        Command::Build { release } => {
            setup::for_build()?;
            println!("{}", build(release)?.display());
            Ok(())
        }
        Command::Up { args } => {
            setup::for_build()?;
            let xebec = build(true)?;
            let error = Cmd::as_root(&xebec).arg("up").args(args).exec();
            Err(error).context("could not start xebec")
        }
        Command::Test { no_root, filter } => test(no_root, filter.as_deref()),
        Command::Bench { args } => {
            setup::for_tests()?;
            let xebec = build(true)?;
            cargo(["build", "--release", "-p", "xebec-bench"])?.run()?;
            let bench = artifact(true, "xebec-bench")?;
            Cmd::as_root(bench)
                .env("XEBEC_BIN", &xebec)
                .args(args)
                .run()
        }
        Command::Verifier { record } => verifier(record),
        Command::VerifyKernels { kernels, all } => verify_kernels(&kernels, all),
        Command::Codegen { check } => codegen(check),
    }
}

/// Cargo, with the eBPF object that the agent embeds.
fn cargo<const N: usize>(args: [&str; N]) -> Result<Cmd> {
    static OBJECT: OnceLock<PathBuf> = OnceLock::new();
    let object = match OBJECT.get() {
        Some(object) => object,
        None => {
            let built = ebpf::build()?;
            OBJECT.get_or_init(|| built)
        }
    };
    Ok(Cmd::cargo(args).env("XEBEC_EBPF_OBJECT", object))
}

/// Builds the executable.
fn build(release: bool) -> Result<PathBuf> {
    let mut cmd = cargo(["build", "-p", "xebec"])?;
    if release {
        cmd = cmd.arg("--release");
    }
    cmd.run()?;
    artifact(release, "xebec")
}

/// Where cargo puts an executable of this workspace.
fn artifact(release: bool, name: &str) -> Result<PathBuf> {
    let path = shell::target_dir()?
        .join(shell::host_triple()?)
        .join(if release { "release" } else { "debug" })
        .join(name);
    anyhow::ensure!(path.exists(), "cargo built no {}", path.display());
    Ok(path)
}

fn codegen(check: bool) -> Result<()> {
    let mut cmd = Cmd::cargo(["run", "--quiet", "-p", "xebec-codegen", "--"]);
    if check {
        cmd = cmd.arg("--check");
    }
    cmd.run()
}

/// The budget of the kernel's check, compared or written anew.
fn verifier(record: bool) -> Result<()> {
    setup::for_build()?;
    let test = "no_program_costs_more_than_is_recorded";
    for binary in shell::test_binaries(cargo([])?, "xebec-agent")? {
        if binary.name != "root_verifier" {
            continue;
        }
        let folder = root().join(&binary.package_dir);
        let mut cmd = Cmd::as_root(&binary.path)
            .dir(folder)
            .args(["--exact", "--nocapture", test]);
        if record {
            cmd = cmd.env("XEBEC_VERIFIER_RECORD", "1");
        }
        return cmd.run();
    }
    anyhow::bail!("xebec-agent has no test root_verifier")
}

/// The programs, and the tests that need nothing but them, on other kernels.
fn verify_kernels(kernels: &[String], all: bool) -> Result<()> {
    setup::for_build()?;
    cargo(["build", "-p", "xebec-agent", "--example", "this_kernel"])?.run()?;
    let contents = kernels::Contents {
        init: artifact(false, "examples/this_kernel")?,
        tests: shell::test_binaries(cargo([])?, "xebec-agent")?
            .into_iter()
            .filter(|test| kernels::TESTS.iter().any(|(name, _)| *name == test.name))
            .map(|test| (test.name, test.path))
            .collect(),
        all,
    };
    kernels::verify(kernels, &contents)
}

/// Unit tests as the calling user, then the root tests one package after the other.
fn test(no_root: bool, filter: Option<&str>) -> Result<()> {
    setup::for_tests()?;
    let xebec = build(false)?;
    let kubectl = setup::kubectl()?;
    let base = |cmd: Cmd| cmd.env("XEBEC_BIN", &xebec).env("KUBECTL", &kubectl);
    if filter.is_none() {
        codegen(true)?;
    }
    // All but `root_*`, which come below; no documentation has examples.
    let tests = ["--lib", "--bins", "--test", "[!r]*"];
    let mut unit = base(cargo(["test", "--quiet"])?).args(tests);
    if let Some(filter) = filter {
        unit = unit.arg(filter);
    }
    unit.run()?;
    if no_root {
        println!("root tests left out on request");
        return Ok(());
    }
    for package in setup::ROOT_TEST_PACKAGES {
        // The build runs as the calling user so that no file in the target folder belongs to root.
        base(cargo(["test", "--no-run", "--quiet", "-p", package])?).run()?;
        for binary in shell::test_binaries(cargo([])?, package)? {
            let mut cmd = base(Cmd::as_root(&binary.path))
                .dir(root().join(&binary.package_dir))
                .args(["--test-threads=1"]);
            if let Some(filter) = filter {
                cmd = cmd.arg(filter);
            }
            cmd.run()?;
        }
    }
    Ok(())
}
