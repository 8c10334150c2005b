//! The `xebec` executable: one binary that is the cluster, its parts and its command line.

mod agent;
mod bpf;
mod demo;
mod down;
mod image;
mod kubeconfig;
mod observe;
mod paths;
mod pki;
mod policy;
mod relay;
mod service;
mod status;
mod tables;
mod tcp_bench;
mod text;
mod ui;
mod unix_http;
mod up;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{CommandFactory, Parser, Subcommand};
use paths::Layout;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

#[derive(Parser)]
#[command(
    name = "xebec",
    version,
    about = "Kubernetes on an eBPF dataplane, in one binary",
    propagate_version = true
)]
struct Cli {
    /// Where the cluster's data lies
    #[arg(
        long,
        global = true,
        env = "XEBEC_DATA_DIR",
        default_value = "/var/lib/xebec"
    )]
    data_dir: PathBuf,
    /// Where sockets and mounts lie
    #[arg(
        long,
        global = true,
        env = "XEBEC_RUN_DIR",
        default_value = "/run/xebec"
    )]
    run_dir: PathBuf,
    /// Log filter, such as `info`, `debug` or `xebec_agent=debug`
    #[arg(
        long,
        global = true,
        env = "XEBEC_LOG",
        default_value = "warn,xebec=info"
    )]
    log: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start a cluster on this machine
    Up(up::Up),
    /// Stop the cluster; its data stays for the next `up`
    Down(down::Down),
    /// What runs, and whether it is healthy
    Status(status::Status),
    /// The node agent alone, on any Kubernetes: in place of its kube-proxy and CNI plugin
    Agent(Box<agent::Agent>),
    /// Endpoints: the pods that the node's agent has connected
    #[command(subcommand)]
    Endpoint(tables::Table),
    /// Services: frontends, backends, and who gets which
    #[command(subcommand)]
    Service(service::Service),
    /// Network policies: as they are in the kernel, what they make of a flow, and whether a file of them is right
    #[command(subcommand)]
    Policy(policy::Policy),
    /// Identities: the label sets that policies tell apart
    #[command(subcommand)]
    Identity(tables::Table),
    /// Domains: what resolvers told pods that are under rules for them
    #[command(subcommand)]
    Fqdn(tables::Table),
    /// The kernel's side of the dataplane
    #[command(subcommand)]
    Bpf(bpf::Bpf),
    /// Who talked to whom, allowed or dropped, and by which rule
    Observe(Box<observe::Observe>),
    /// One endpoint of Hubble's API for the flows of all nodes
    Relay(Box<relay::Relay>),
    /// Show who talks to whom, and flows as they happen, on a page for browsers
    Ui(ui::Ui),
    /// Images of the container runtime
    #[command(subcommand)]
    Image(image::Image),
    /// Print the administrator's kubeconfig
    Kubeconfig {
        /// Merge it into the user's kubeconfig instead ($KUBECONFIG or ~/.kube/config)
        #[arg(long)]
        write: bool,
    },
    /// Print a shell completion script
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// The process of one of several nodes; `up` starts it
    #[command(hide = true)]
    Node {
        /// Name of the node
        name: String,
    },
    /// The small application of the demo image
    #[command(subcommand, hide = true)]
    Demo(demo::Demo),
}

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let name = args.next().unwrap_or_default();
    if Path::new(&name)
        .file_name()
        .is_some_and(|name| name == "xebec-cni")
    {
        return xebec_cni::main();
    }
    // The shim stays single-threaded and small: it never meets the async runtime or clap.
    if args.next().is_some_and(|first| first == "shim") {
        let args = args.map(|arg| arg.to_string_lossy().into_owned()).collect();
        return ExitCode::from(u8::try_from(xebec_shim::main(args)).unwrap_or(1));
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    match run(cli) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xebec: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Does what is asked; false where the answer is no.
fn run(cli: Cli) -> Result<bool> {
    let node = match &cli.command {
        Command::Node { name } => Some(name.as_str()),
        _ => None,
    };
    init_log(&cli.log, node)?;
    let layout = Layout {
        data: cli.data_dir,
        run: cli.run_dir,
    };
    if matches!(cli.command, Command::Agent(_) | Command::Node { .. }) {
        xebec_agent::memory::share_one_heap();
    }
    let runtime = match &cli.command {
        Command::Up(_) | Command::Agent(_) => tokio::runtime::Builder::new_multi_thread(),
        // It makes its own once it has joined its cgroup.
        Command::Node { name } => return up::child::run(name).map(|()| true),
        _ => tokio::runtime::Builder::new_current_thread(),
    }
    .enable_all()
    .build()
    .context("could not start the async runtime")?;
    let done = match cli.command {
        Command::Policy(policy) => return runtime.block_on(policy.run(&layout)),
        Command::Up(up) => {
            if up.detach {
                return up::detach::run(&layout).map(|()| true);
            }
            runtime.block_on(up.run(layout, &cli.log))
        }
        Command::Agent(agent) => runtime.block_on(agent.run(layout)),
        Command::Down(down) => runtime.block_on(down.run(layout, &cli.log)),
        Command::Status(status) => runtime.block_on(status.run(&layout)),
        Command::Endpoint(table) => runtime.block_on(table.run(&layout, "endpoints")),
        Command::Service(service) => runtime.block_on(service.run(&layout)),
        Command::Identity(table) => runtime.block_on(table.run(&layout, "identities")),
        Command::Fqdn(table) => runtime.block_on(table.run(&layout, "fqdns")),
        Command::Bpf(bpf) => runtime.block_on(bpf.run(&layout)),
        Command::Observe(observe) => runtime.block_on(observe.run(&layout)),
        Command::Relay(relay) => runtime.block_on(relay.run()),
        Command::Ui(ui) => runtime.block_on(ui.run(&layout)),
        Command::Image(image) => runtime.block_on(image.run(&layout)),
        Command::Kubeconfig { write } => kubeconfig::run(&layout, write),
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "xebec", &mut std::io::stdout());
            Ok(())
        }
        Command::Node { name } => up::child::run(&name),
        Command::Demo(demo) => runtime.block_on(demo.run()),
    };
    done.map(|()| true)
}

/// Writes the time, and which of several nodes speaks: they share one log.
struct Clock {
    node: Option<String>,
}

impl FormatTime for Clock {
    fn format_time(&self, writer: &mut Writer<'_>) -> std::fmt::Result {
        SystemTime.format_time(writer)?;
        match &self.node {
            Some(node) => write!(writer, " {node}"),
            None => Ok(()),
        }
    }
}

fn init_log(filter: &str, node: Option<&str>) -> Result<()> {
    let filter = EnvFilter::try_new(filter).with_context(|| {
        format!("--log {filter:?} is no log filter (try `info` or `xebec_agent=debug`)")
    })?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_timer(Clock {
            node: node.map(str::to_owned),
        })
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    Ok(())
}
