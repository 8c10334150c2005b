//! Starts a shim: leaves its parent, makes the pod's namespaces, serves.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::Path;

use anyhow::{Context, bail};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{ForkResult, Pid, fork, setsid};

use crate::protocol::SandboxSpec;
use crate::server::Server;
use crate::stdio::bind_short;

/// Entry point of `xebec shim --spec FILE`; returns the process's exit code.
///
/// It writes `ready` to standard output when the socket listens, or one line
/// that says why not, and closes it; the pod then lives in a process of its own.
pub fn main(args: Vec<String>) -> i32 {
    let spec = match args.as_slice() {
        [flag, path] if flag == "--spec" => std::fs::read(path)
            .with_context(|| format!("cannot read {path}"))
            .and_then(|text| {
                serde_json::from_slice::<SandboxSpec>(&text)
                    .with_context(|| format!("{path} is not a sandbox spec"))
            }),
        _ => Err(anyhow::anyhow!(
            "usage: xebec shim --spec FILE (started by the container runtime)"
        )),
    };
    match spec.and_then(|spec| detach_and_serve(&spec)) {
        Ok(()) => 0,
        Err(err) => {
            println!("{err:#}");
            1
        }
    }
}

fn detach_and_serve(spec: &SandboxSpec) -> anyhow::Result<()> {
    // SAFETY: nothing has started a thread in this process yet.
    if let ForkResult::Parent { .. } = unsafe { fork() }? {
        return Ok(());
    }
    // A session of its own: signals to the starter's terminal don't reach the pod.
    setsid()?;
    match prepare(spec) {
        Ok(mut server) => {
            // A starter that was killed has noted nothing of this pod: nobody would ever end it.
            if let Err(err) = writeln!(std::io::stdout(), "ready") {
                eprintln!("the shim stops: who started it is gone: {err}");
                server.stop();
            }
            // The starter reads until the end of this stream.
            if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
                // SAFETY: both descriptors are open.
                unsafe {
                    libc::dup2(null.as_raw_fd(), 0);
                    libc::dup2(null.as_raw_fd(), 1);
                }
            }
            let code = match server.run() {
                Ok(()) => 0,
                Err(err) => {
                    eprintln!("the shim stops: {err:#}");
                    1
                }
            };
            let _ = std::fs::remove_file(&spec.socket);
            if let Some(dir) = &spec.unified_cgroup {
                leave_cgroup(Path::new(dir));
            }
            std::process::exit(code);
        }
        Err(err) => {
            println!("{err:#}");
            std::process::exit(1);
        }
    }
}

fn prepare(spec: &SandboxSpec) -> anyhow::Result<Server> {
    let log = File::options()
        .create(true)
        .append(true)
        .open(&spec.log)
        .with_context(|| format!("cannot open the shim's log {}", spec.log))?;
    // SAFETY: both descriptors are open; standard error now is the log.
    unsafe { libc::dup2(log.as_raw_fd(), 2) };
    crate::errors::install();
    std::env::set_current_dir("/")?;
    let name = c"xebec-shim";
    // SAFETY: prctl with a NUL-terminated name, and without pointers.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, name.as_ptr());
        if libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) < 0 {
            bail!(
                "cannot become a subreaper: {}",
                std::io::Error::last_os_error()
            );
        }
    }
    // The kernel should kill a container before the shim that watches it.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-998");
    if let Some(dir) = &spec.unified_cgroup {
        join_cgroup(Path::new(dir))?;
    }
    let mut flags = CloneFlags::empty();
    if !spec.host_ipc {
        flags |= CloneFlags::CLONE_NEWIPC;
    }
    if spec.hostname.is_some() {
        flags |= CloneFlags::CLONE_NEWUTS;
    }
    unshare(flags).context("cannot make the pod's namespaces")?;
    if let Some(hostname) = &spec.hostname {
        nix::unistd::sethostname(hostname)
            .with_context(|| format!("cannot set the hostname {hostname:?}"))?;
    }
    let _ = std::fs::remove_file(&spec.socket);
    let listener = bind_short(Path::new(&spec.socket))
        .with_context(|| format!("cannot listen on {}", spec.socket))?;
    let pause = match spec.shared_pid {
        true => Some(start_pause()?),
        false => None,
    };
    Server::new(listener, pause)
}

fn join_cgroup(dir: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir)
        .with_context(|| format!("cannot make the cgroup {}", dir.display()))?;
    std::fs::write(dir.join("cgroup.procs"), "0")
        .with_context(|| format!("cannot join the cgroup {}", dir.display()))
}

/// Moves this process to the parent group, so that the pod's can be removed.
fn leave_cgroup(dir: &Path) {
    if let Some(parent) = dir.parent() {
        let _ = std::fs::write(parent.join("cgroup.procs"), "0");
    }
    let _ = std::fs::remove_dir(dir);
}

/// The first process of a PID namespace that all containers of the pod share;
/// it only reaps.
fn start_pause() -> anyhow::Result<Pid> {
    // SAFETY: a fork-like clone (no shared memory, no new stack) in a process
    // with one thread; all pointers are null.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone,
            libc::CLONE_NEWPID | libc::SIGCHLD,
            0usize,
            0usize,
            0usize,
            0usize,
        )
    };
    if pid < 0 {
        bail!(
            "cannot start the pod's first process: {}",
            std::io::Error::last_os_error()
        );
    }
    if pid > 0 {
        return Ok(Pid::from_raw(pid as i32));
    }
    // SAFETY: only async-signal-safe calls in the child; it never returns.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, c"xebec-pause".as_ptr());
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        // All of them: the starter waits for the end of standard output.
        libc::syscall(libc::SYS_close_range, 0u32, u32::MAX, 0u32);
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = libc::SIG_IGN;
        action.sa_flags = libc::SA_NOCLDWAIT;
        libc::sigaction(libc::SIGCHLD, &action, std::ptr::null_mut());
        loop {
            libc::pause();
        }
    }
}
