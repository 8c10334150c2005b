//! `up --detach`: starts `up` in the background and returns when the nodes are Ready.

use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::paths::{Layout, private_dir};
use crate::up::state::UpState;

/// Runs this executable again without `--detach`, in a session of its own with its log in a file.
pub fn run(layout: &Layout) -> Result<()> {
    super::require_root()?;
    private_dir(&layout.data)?;
    let log_path = layout.log();
    let mut log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .read(true)
        .open(&log_path)
        .with_context(|| format!("could not open {}", log_path.display()))?;
    let before = log
        .seek(SeekFrom::End(0))
        .context("could not read the log")?;
    let executable = std::env::current_exe().context("could not find this executable")?;
    let args = std::env::args_os().skip(1).filter(|arg| arg != "--detach");
    let copy = || log.try_clone().context("could not share the log");
    let mut child = Command::new(executable)
        .args(args)
        .stdin(Stdio::null())
        .stdout(copy()?)
        .stderr(copy()?)
        // Ctrl-C in this terminal is not meant for the cluster.
        .process_group(0)
        .spawn()
        .context("could not start the cluster's process")?;
    loop {
        if let Some(status) = child
            .try_wait()
            .context("could not wait for the cluster's process")?
        {
            let mut text = String::new();
            log.seek(SeekFrom::Start(before))
                .context("could not read the log")?;
            log.read_to_string(&mut text)
                .context("could not read the log")?;
            bail!("the cluster did not start ({status}):\n{}", text.trim_end());
        }
        let ready =
            UpState::read(layout)?.filter(|state| state.pid == child.id() as i32 && state.ready);
        if let Some(state) = ready {
            println!(
                "Ready: {} (log: {})",
                state.node_names(),
                log_path.display()
            );
            println!();
            println!(
                "  export KUBECONFIG={}",
                layout.admin_kubeconfig().display()
            );
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
