//! The only process of a small machine that `cargo xtask verify-kernels` boots: tries every eBPF program on its
//! kernel, runs tests there, tells of them line by line, and turns the machine off.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use xebec_agent::loader::measure::measure;
use xebec_agent::loader::{Loaded, Xdp};
use xebec_agent::network::Device;

/// Kernel modules, to be loaded in the order of their names.
const MODULES: &str = "/modules";
/// Test executables.
const TESTS: &str = "/tests";
/// For each of them a file with words of the names of the tests to be run; without it all are.
const WORDS: &str = "/words";
const CGROUP: &str = "/sys/fs/cgroup";

fn main() {
    // As an ordinary process it would turn off the machine that it was built on.
    if std::process::id() != 1 {
        eprintln!("this is for the machines that `cargo xtask verify-kernels` boots");
        std::process::exit(2);
    }
    if let Err(error) = run() {
        say("failed", &format!("{error:#}"));
    }
    say("end", "");
    // A console has sent what was written before it is turned off.
    std::thread::sleep(std::time::Duration::from_millis(200));
    let _ = reboot(RebootMode::RB_POWER_OFF);
}

/// A line for `cargo xtask`, which looks for its first word.
fn say(what: &str, words: &str) {
    let words = words.replace(['\n', '\r'], " ");
    println!("xebec-kernel: {what} {words}");
}

fn run() -> Result<()> {
    for (kind, at) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/tmp"),
        ("tmpfs", "/run"),
        ("cgroup2", CGROUP),
    ] {
        std::fs::create_dir_all(at).with_context(|| format!("could not make {at}"))?;
        mount(Some(kind), at, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("could not mount {at}"))?;
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease");
    say("release", release.context("the kernel has no name")?.trim());
    for module in sorted(MODULES)? {
        let file = File::open(&module)?;
        finit_module(&file, &CString::default(), ModuleInitFlags::empty())
            .with_context(|| format!("could not load {}", module.display()))?;
    }
    let programs = Path::new("/tmp/measured");
    measure(programs, |program| match program.outcome {
        Ok(figures) => {
            let stack: Vec<String> = figures.stack.iter().map(u32::to_string).collect();
            let (instructions, code) = (figures.instructions, figures.machine_code);
            let words = format!("{} {instructions} {} {code}", program.name, stack.join("+"));
            say("program", &words);
        }
        Err(error) => say("refused", &format!("{} {error:#}", program.name)),
    })?;
    nix::mount::umount(programs).context("could not unmount the programs")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(attach())?;
    for test in sorted(TESTS)? {
        run_test(&test)?;
    }
    Ok(())
}

fn sorted(dir: &str) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir).with_context(|| format!("could not list {dir}"))?;
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    Ok(paths)
}

/// Attaches every hook where it belongs, each by itself.
async fn attach() -> Result<()> {
    let dir = Path::new("/tmp/attached");
    let mut loaded = Loaded::new(dir)?;
    let names: HashMap<&str, &str> = [("pod", "podp"), ("net", "netp")].into();
    for (name, peer) in &names {
        ip(&format!("link add {name} type veth peer name {peer}"))?;
        ip(&format!("link set {name} up"))?;
        ip(&format!("link set {peer} up"))?;
    }
    let told = |hook: &str, outcome: Result<String>| match outcome {
        Ok(how) => say("attached", &format!("{hook} {how}")),
        Err(error) => say("unattached", &format!("{hook} {error:#}")),
    };
    let pod = loaded.attach_pod("pod");
    let way = match loaded.uses_filters() {
        Some(true) => "clsact",
        _ => "tcx",
    };
    told("pod", pod.map(|()| way.into()));
    let device = Device {
        index: nix::net::if_::if_nametoindex("net").context("there is no device net")?,
        name: "net".into(),
        bus: None,
    };
    for xdp in [Xdp::Off, Xdp::Generic, Xdp::Native] {
        let by = loaded.attach_network(std::slice::from_ref(&device), xdp);
        let by = by.await.and_then(|by| {
            let by = by.first().context("no device was served")?;
            Ok(by.to_string())
        });
        told(&format!("network/{xdp:?}").to_lowercase(), by);
    }
    let sockets = loaded.attach_sockets(Path::new(CGROUP));
    told("sockets", sockets.map(|()| "cgroup2".into()));
    drop(loaded);
    nix::mount::umount(dir).context("could not unmount the links")?;
    for name in names.keys() {
        ip(&format!("link del {name}"))?;
    }
    Ok(())
}

fn ip(line: &str) -> Result<()> {
    let output = Command::new("/bin/ip").args(line.split(' ')).output();
    let output = output.context("could not start ip")?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {line}: {words}");
    Ok(())
}

/// Runs the tests of an executable, and tells of each and of why it failed.
fn run_test(test: &Path) -> Result<()> {
    let name = test.file_name().unwrap_or_default().to_string_lossy();
    let words = std::fs::read_to_string(Path::new(WORDS).join(&*name)).unwrap_or_default();
    let output = Command::new(test)
        .arg("--test-threads=1")
        .args(words.split_whitespace())
        .env("PATH", "/bin")
        .env("RUST_BACKTRACE", "0")
        // Emulated, a million would take too long: two runs, with and without the way around the stack.
        .env("XEBEC_MODEL_PACKETS", "40000")
        .output()
        .with_context(|| format!("could not start {}", test.display()))?;
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        say("output", line);
    }
    for line in String::from_utf8_lossy(&output.stderr).lines() {
        say("output", line);
    }
    say(
        if output.status.success() {
            "passed"
        } else {
            "tests-failed"
        },
        &name,
    );
    Ok(())
}
