//! What the shim asks of `libcontainer`; every function here runs in a helper.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::Context;
use libcontainer::container::Container;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;

/// The ends of the streams that go to the process.
#[derive(Default)]
pub(crate) struct ChildStdio {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
    /// Where the terminal's controlling end is sent instead.
    pub(crate) console: Option<PathBuf>,
}

/// Where `libcontainer` keeps the state of the container of a bundle.
fn state_root(bundle: &Path) -> PathBuf {
    bundle.join("oci")
}

fn builder(id: &str, bundle: &Path, stdio: ChildStdio) -> anyhow::Result<ContainerBuilder> {
    let root = state_root(bundle);
    std::fs::create_dir_all(&root).with_context(|| format!("cannot make {}", root.display()))?;
    let mut builder = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_root_path(root)?
        .validate_id()?
        .with_console_socket(stdio.console);
    if let Some(fd) = stdio.stdin {
        builder = builder.with_stdin(fd);
    }
    if let Some(fd) = stdio.stdout {
        builder = builder.with_stdout(fd);
    }
    if let Some(fd) = stdio.stderr {
        builder = builder.with_stderr(fd);
    }
    Ok(builder)
}

/// Creates and starts the container of `bundle`; returns its PID.
pub(crate) fn start(
    id: &str,
    bundle: &Path,
    stdio: ChildStdio,
    oom_score_adj: Option<i32>,
) -> anyhow::Result<i32> {
    let mut container = builder(id, bundle, stdio)?
        .as_init(bundle)
        .with_systemd(false)
        .with_detach(true)
        .build()?;
    let pid = container
        .pid()
        .context("the container has no process after its creation")?
        .as_raw();
    if let Some(score) = oom_score_adj
        && let Err(err) = std::fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string())
    {
        eprintln!("container {id}: the kernel refuses oom_score_adj {score}: {err}");
    }
    if let Err(err) = container.start() {
        let _ = container.delete(true);
        return Err(err.into());
    }
    Ok(pid)
}

/// Runs one more process in a running container; returns its PID.
pub(crate) fn exec(
    id: &str,
    bundle: &Path,
    process: &Path,
    stdio: ChildStdio,
) -> anyhow::Result<i32> {
    let pid = builder(id, bundle, stdio)?
        .as_tenant()
        .with_detach(true)
        .with_process(Some(process))
        .build()?;
    Ok(pid.as_raw())
}

/// Removes what is left of a container: processes, cgroups, state.
pub(crate) fn delete(id: &str, bundle: &Path) -> anyhow::Result<i32> {
    let dir = state_root(bundle).join(id);
    if dir.exists() {
        Container::load(dir)?.delete(true)?;
    }
    Ok(0)
}
