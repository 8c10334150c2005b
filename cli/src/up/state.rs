//! What a running `up` says of itself, for `status` and `down`.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::node::NodeConfig;
use crate::paths::{Layout, write_private};

/// The content of `<run>/up.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UpState {
    /// The process that runs the cluster.
    pub pid: i32,
    /// That process's start time, clock ticks since boot (proc(5) stat field 22): pids are used again.
    pub start_time: u64,
    /// URL of the API server.
    pub server: String,
    /// The nodes.
    pub nodes: Vec<NodeConfig>,
    /// The nodes have been Ready.
    #[serde(default)]
    pub ready: bool,
}

impl UpState {
    /// The state of the process that asks.
    pub fn of_this_process(server: &str, nodes: &[NodeConfig]) -> Result<Self> {
        let pid = std::process::id() as i32;
        let start_time = start_time(pid).context("could not read this process's start time")?;
        Ok(Self {
            pid,
            start_time,
            server: server.to_owned(),
            nodes: nodes.to_vec(),
            ready: false,
        })
    }

    /// Writes it for others.
    pub fn write(&self, layout: &Layout) -> Result<()> {
        let json = serde_json::to_vec_pretty(self).context("could not write JSON")?;
        write_private(&layout.up_state(), &json)
    }

    /// Says that the nodes have been Ready.
    pub fn mark_ready(layout: &Layout) -> Result<()> {
        let mut state = Self::read(layout)?.context("the state file of this cluster is gone")?;
        state.ready = true;
        state.write(layout)
    }

    /// What the last `up` wrote, if it is there.
    pub fn read(layout: &Layout) -> Result<Option<Self>> {
        let path = layout.up_state();
        match std::fs::read(&path) {
            Ok(json) => serde_json::from_slice(&json).map(Some).with_context(|| {
                format!(
                    "{} can't be read; remove it if no cluster runs",
                    path.display()
                )
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("could not read {}", path.display())),
        }
    }

    /// The names of the nodes, for people.
    pub fn node_names(&self) -> String {
        let names: Vec<&str> = self.nodes.iter().map(|node| node.name.as_str()).collect();
        names.join(", ")
    }

    /// Whether that process is still the one that wrote this, and has not ended.
    pub fn is_running(&self) -> bool {
        start_time(self.pid) == Some(self.start_time) && !has_ended(self.pid)
    }
}

/// Start time of a process in clock ticks since boot; none if it is gone.
fn start_time(pid: i32) -> Option<u64> {
    stat_fields(&format!("/proc/{pid}"))?
        .split_whitespace()
        .nth(19)?
        .parse()
        .ok()
}

/// Whether all threads of a process have ended. A process that was killed shows its first thread as a zombie while others
/// may still hold its sockets and locks.
fn has_ended(pid: i32) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return true;
    };
    threads.flatten().all(|thread| {
        // A thread that has gone meanwhile has ended.
        stat_fields(&thread.path().to_string_lossy())
            .is_none_or(|fields| fields.starts_with(['Z', 'X']))
    })
}

/// The fields of proc(5) `stat` from the state on. The command's name before them may hold spaces and brackets.
fn stat_fields(folder: &str) -> Option<String> {
    let stat = std::fs::read_to_string(format!("{folder}/stat")).ok()?;
    Some(stat.rsplit_once(") ")?.1.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_running_process_is_known_by_pid_and_start_time() {
        let state = UpState::of_this_process("https://x", &[]).unwrap();
        assert!(state.is_running());
        let other = UpState {
            start_time: state.start_time + 1,
            ..state
        };
        assert!(
            !other.is_running(),
            "a later process with the same pid is another one"
        );
    }
}
