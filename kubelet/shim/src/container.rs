//! One container as its shim keeps it: process, streams, log, cgroup, end.

use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::log_file::{LogFile, Stream, now_nanos};
use crate::protocol::{ContainerState, ExitRecord, StartRequest};
use crate::stdio::Stdio;

/// A container that was started, or whose start is under way.
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) stdio: Stdio,
    pub(crate) stdin_once: bool,
    pub(crate) attached: bool,
    /// 0 before the start and after the end.
    pub(crate) pid: i32,
    pub(crate) started_at: i64,
    pub(crate) exit: Option<ExitRecord>,
    log: Option<LogFile>,
    cgroups: Vec<PathBuf>,
}

impl Container {
    /// Opens the log of a container about to start.
    pub(crate) fn new(request: &StartRequest, stdio: Stdio) -> anyhow::Result<Self> {
        let log = match &request.log_path {
            Some(path) => Some(
                LogFile::open(Path::new(path))
                    .with_context(|| format!("cannot open log {path}"))?,
            ),
            None => None,
        };
        Ok(Self {
            id: request.id.clone(),
            bundle: request.bundle.clone().into(),
            stdio,
            stdin_once: request.stdin_once,
            attached: false,
            pid: 0,
            started_at: 0,
            exit: None,
            log,
            cgroups: Vec::new(),
        })
    }

    /// Notes the running process.
    pub(crate) fn started(&mut self, pid: i32) {
        self.pid = pid;
        self.started_at = now_nanos();
        self.cgroups = own_cgroups(pid, &self.id);
    }

    /// Writes a piece of output to the log.
    pub(crate) fn log(&mut self, stream: Stream, data: &[u8]) {
        if let Some(log) = &mut self.log
            && let Err(err) = log.write(stream, data)
        {
            eprintln!("container {}: cannot write its log: {err}", self.id);
        }
    }

    /// Leaves a rotated log file for a new one.
    pub(crate) fn reopen_log(&mut self) -> std::io::Result<()> {
        match &mut self.log {
            Some(log) => log.reopen(),
            None => Ok(()),
        }
    }

    /// Records the end, on disk too, and kills what the first process left behind.
    pub(crate) fn ended(&mut self, exit_code: i32) -> ExitRecord {
        if let Some(log) = &mut self.log {
            let _ = log.finish();
        }
        let oom_killed = self.cgroups.iter().any(|dir| was_oom_killed(dir));
        self.kill_all(libc::SIGKILL);
        let exit = ExitRecord {
            exit_code,
            finished_at: now_nanos(),
            oom_killed,
            message: String::new(),
        };
        self.pid = 0;
        self.log = None;
        self.stdio = Stdio::default();
        self.exit = Some(exit.clone());
        if let Err(err) = write_exit(&self.bundle, &exit) {
            eprintln!("container {}: cannot record its exit: {err:#}", self.id);
        }
        exit
    }

    /// Signals the first process.
    pub(crate) fn kill(&self, signal: i32) -> std::io::Result<()> {
        if self.pid <= 0 {
            return Ok(());
        }
        // SAFETY: the PID is our unreaped child's, so it can't belong to another.
        if unsafe { libc::kill(self.pid, signal) } < 0 {
            let err = std::io::Error::last_os_error();
            if err.raw_os_error() != Some(libc::ESRCH) {
                return Err(err);
            }
        }
        Ok(())
    }

    /// Signals every process in the container's cgroup.
    pub(crate) fn kill_all(&self, signal: i32) {
        for dir in &self.cgroups {
            let Ok(procs) = std::fs::read_to_string(dir.join("cgroup.procs")) else {
                continue;
            };
            for pid in procs.lines().filter_map(|l| l.parse::<i32>().ok()) {
                if pid > 1 {
                    // SAFETY: plain kill; the cgroup belongs to this container alone.
                    unsafe { libc::kill(pid, signal) };
                }
            }
        }
    }

    /// For [`crate::protocol::Reply::State`].
    pub(crate) fn state(&self) -> ContainerState {
        ContainerState {
            id: self.id.clone(),
            pid: self.pid,
            started_at: self.started_at,
            exit: self.exit.clone(),
        }
    }
}

fn write_exit(bundle: &Path, exit: &ExitRecord) -> anyhow::Result<()> {
    let temporary = bundle.join("exit.json.new");
    std::fs::write(&temporary, serde_json::to_vec(exit)?)?;
    std::fs::rename(&temporary, bundle.join("exit.json"))?;
    Ok(())
}

/// The cgroup directories that belong to the container alone, by hierarchy.
fn own_cgroups(pid: i32, id: &str) -> Vec<PathBuf> {
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    own_cgroups_from(&groups, &mounts, id)
}

fn own_cgroups_from(groups: &str, mounts: &str, id: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        // Only a directory named after the container may be signalled as a whole.
        if path.rsplit('/').next() != Some(id) {
            continue;
        }
        for mount in mounts.lines() {
            let Some((left, right)) = mount.split_once(" - ") else {
                continue;
            };
            let mut right = right.split(' ');
            let kind = right.next().unwrap_or_default();
            let options = right.nth(1).unwrap_or_default();
            let matches = if controllers.is_empty() {
                kind == "cgroup2"
            } else {
                kind == "cgroup"
                    && controllers
                        .split(',')
                        .all(|c| options.split(',').any(|o| o == c))
            };
            if matches && let Some(point) = left.split(' ').nth(4) {
                found.push(Path::new(point).join(path.trim_start_matches('/')));
                break;
            }
        }
    }
    found
}

fn was_oom_killed(cgroup: &Path) -> bool {
    // cgroup v2 has memory.events, v1 has memory.oom_control (kernel 4.13 on).
    ["memory.events", "memory.oom_control"].iter().any(|file| {
        std::fs::read_to_string(cgroup.join(file)).is_ok_and(|text| {
            text.lines()
                .any(|l| l.strip_prefix("oom_kill ").is_some_and(|n| n.trim() != "0"))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_cgroups_named_after_the_container_count() {
        let groups = "9:name=systemd:/\n4:memory:/kubepods/pod1/abc\n2:cpu,cpuacct:/kubepods/pod1/abc\n0::/kubepods/pod1/abc\n1:pids:/\n";
        let mounts = "30 25 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      31 25 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:3 - cgroup cgroup rw,cpu,cpuacct\n\
                      32 25 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let found = own_cgroups_from(groups, mounts, "abc");
        assert_eq!(
            found,
            [
                PathBuf::from("/sys/fs/cgroup/memory/kubepods/pod1/abc"),
                PathBuf::from("/sys/fs/cgroup/cpu,cpuacct/kubepods/pod1/abc"),
                PathBuf::from("/sys/fs/cgroup/unified/kubepods/pod1/abc"),
            ]
        );
        assert!(own_cgroups_from(groups, mounts, "other").is_empty());
    }
}
