//! What `up` needs and does not find: a clear error, and nothing left behind.

use std::net::TcpListener;
use std::process::Command;

use anyhow::{Context, Result};
use xebec_tests::{Machine, assert_nothing_left, succeed, xebec_bin};

/// Runs a command that must fail, and gives what it says.
fn refusal(mut command: Command) -> Result<String> {
    let dir = std::env::temp_dir().join(format!("xebec-test-refusal-{}", std::process::id()));
    let output = command
        .env("XEBEC_DATA_DIR", dir.join("data"))
        .env("XEBEC_RUN_DIR", dir.join("run"))
        .output()
        .context("could not start the command")?;
    let _ = std::fs::remove_dir_all(&dir);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    anyhow::ensure!(!output.status.success(), "it went well: {said}");
    Ok(said)
}

fn up(prefix: &[&str], args: &[&str]) -> Command {
    let xebec = xebec_bin();
    let Some((program, rest)) = prefix.split_first() else {
        let mut command = Command::new(xebec);
        command.arg("up").args(args);
        return command;
    };
    let mut command = Command::new(program);
    command.args(rest).arg(xebec).arg("up").args(args);
    command
}

#[test]
fn without_root_without_bpf_and_with_a_taken_port() -> Result<()> {
    let before = Machine::now()?;
    let said = refusal(up(&["setpriv", "--reuid=65534", "--clear-groups"], &[]))?;
    assert!(
        said.contains("needs root") && said.contains("sudo"),
        "{said}"
    );

    // As on a kernel or in a container that allows no eBPF.
    for detach in [&[][..], &["--detach"]] {
        let said = refusal(up(&["setpriv", "--bounding-set=-sys_admin,-bpf"], detach))?;
        assert!(
            said.contains("the agent failed") && said.contains("BPF"),
            "{said}"
        );
    }

    let taken = TcpListener::bind("0.0.0.0:0").context("could not listen")?;
    let port = taken
        .local_addr()
        .context("it has no address")?
        .port()
        .to_string();
    let said = refusal(up(&[], &["--api-port", &port]))?;
    assert!(
        said.contains(&port) && said.contains("--api-port"),
        "{said}"
    );

    let said = refusal(up(&[], &["--node-ip", "198.51.100.99"]))?;
    assert!(
        said.contains("198.51.100.99") && said.contains("--node-ip"),
        "{said}"
    );

    let said = beside_a_switch("/run/another")?;
    assert!(
        said.contains("`xebec down --run-dir /run/another`"),
        "{said}"
    );
    let said = beside_a_switch("")?;
    assert!(said.contains("`xebec down` with its --run-dir"), "{said}");
    assert_nothing_left(&before)
}

/// What is said where there is a switch of the cluster with this run folder.
fn beside_a_switch(run: &str) -> Result<String> {
    let ip = |args: &[&str]| -> Result<String> {
        let output = Command::new("ip").args(args).output();
        succeed("ip", output.context("could not start ip")?)
    };
    ip(&["link", "add", "xebec0", "type", "bridge"])?;
    let signed = ip(&["link", "set", "xebec0", "alias", run]);
    let said = refusal(up(&[], &["--nodes", "2"]));
    ip(&["link", "del", "xebec0"])?;
    signed?;
    said
}
