//! The shim's loop: requests, streams and exits, by `poll`.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use anyhow::Context;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::container::Container;
use crate::helper::{Helper, Outcome};
use crate::log_file::{Stream, now_nanos};
use crate::protocol::{
    ExecRequest, ExitRecord, FrameKind, Reply, Request, StartRequest, encode, encode_json,
    take_frame,
};
use crate::runtime;
use crate::stdio::Stdio;

/// Output queued for a client above which an exec process has to wait.
const SLOW_CLIENT: usize = 256 * 1024;
/// Output queued for an attached client above which it is let go: a container
/// must not wait for a reader.
const LOST_CLIENT: usize = 4 << 20;
/// Input queued for a process above which its client has to wait.
const SLOW_PROCESS: usize = 256 * 1024;

#[derive(Clone, Debug, Eq, PartialEq)]
enum Role {
    Plain,
    Events,
    Attached(String),
    Exec,
}

struct Conn {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    role: Role,
    close_when_sent: bool,
}

/// A process started in a container by exec; keyed by its connection.
struct Exec {
    container: String,
    stdio: Stdio,
    pid: i32,
    process_file: PathBuf,
}

enum Job {
    Start { id: String, conn: u64 },
    Exec { conn: u64 },
    Delete { id: String, conn: u64 },
}

#[derive(Clone, Copy)]
enum Source {
    Listener,
    Signals,
    Conn(u64),
    Container(usize, Option<Stream>),
    Exec(u64, Option<Stream>),
}

/// All state of a shim.
pub(crate) struct Server {
    listener: UnixListener,
    signals: SignalFd,
    pause: Option<Pid>,
    conns: BTreeMap<u64, Conn>,
    next_conn: u64,
    containers: Vec<Container>,
    execs: BTreeMap<u64, Exec>,
    jobs: Vec<(Helper, Job)>,
    /// Exits of children not yet known, while a helper may still name them.
    orphans: HashMap<i32, i32>,
    exec_count: u64,
    stop: bool,
}

impl Server {
    /// A server without containers; blocks the signals it reads.
    pub(crate) fn new(listener: UnixListener, pause: Option<Pid>) -> anyhow::Result<Self> {
        listener.set_nonblocking(true)?;
        let mut mask = SigSet::empty();
        for signal in [
            Signal::SIGCHLD,
            Signal::SIGTERM,
            Signal::SIGINT,
            Signal::SIGHUP,
        ] {
            mask.add(signal);
        }
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&mask), None)?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        Ok(Self {
            listener,
            signals,
            pause,
            conns: BTreeMap::new(),
            next_conn: 1,
            containers: Vec::new(),
            execs: BTreeMap::new(),
            jobs: Vec::new(),
            orphans: HashMap::new(),
            exec_count: 0,
            stop: false,
        })
    }

    /// Has [`run`](Self::run) end at once.
    pub(crate) fn stop(&mut self) {
        self.stop = true;
    }

    /// Serves until a shutdown is asked for and all is gone.
    pub(crate) fn run(mut self) -> anyhow::Result<()> {
        let mut buffer = vec![0; 32 * 1024];
        while !self.stop {
            let (mut fds, sources) = self.poll_set();
            // SAFETY: the pointer and length describe a live array.
            let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
            if ready < 0 {
                let err = io::Error::last_os_error();
                if err.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(err).context("cannot poll");
            }
            for (fd, source) in fds.iter().zip(sources) {
                if fd.revents != 0 {
                    self.handle(source, fd.revents, &mut buffer);
                }
            }
            self.reap(&mut buffer);
            self.conns
                .retain(|_, c| !(c.close_when_sent && c.output.is_empty()));
        }
        self.end_all();
        Ok(())
    }

    fn poll_set(&self) -> (Vec<libc::pollfd>, Vec<Source>) {
        let mut fds = Vec::new();
        let mut sources = Vec::new();
        let mut add = |fd: RawFd, events: i16, source: Source| {
            fds.push(libc::pollfd {
                fd,
                events,
                revents: 0,
            });
            sources.push(source);
        };
        add(self.listener.as_raw_fd(), libc::POLLIN, Source::Listener);
        add(self.signals.as_raw_fd(), libc::POLLIN, Source::Signals);
        for (id, conn) in &self.conns {
            let backlog = match &conn.role {
                Role::Exec => self.execs.get(id).map_or(0, |e| e.stdio.pending.len()),
                Role::Attached(c) => self
                    .containers
                    .iter()
                    .find(|x| x.id == *c)
                    .map_or(0, |c| c.stdio.pending.len()),
                _ => 0,
            };
            let mut events = 0;
            if backlog < SLOW_PROCESS && !conn.close_when_sent {
                events |= libc::POLLIN;
            }
            if !conn.output.is_empty() {
                events |= libc::POLLOUT;
            }
            add(conn.stream.as_raw_fd(), events, Source::Conn(*id));
        }
        for (index, container) in self.containers.iter().enumerate() {
            if container.pid != 0 {
                add_stdio(&container.stdio, true, |fd, events, stream| {
                    add(fd, events, Source::Container(index, stream));
                });
            }
        }
        for (conn, exec) in &self.execs {
            if exec.pid != 0 {
                let fast = self
                    .conns
                    .get(conn)
                    .is_none_or(|c| c.output.len() < SLOW_CLIENT);
                add_stdio(&exec.stdio, fast, |fd, events, stream| {
                    add(fd, events, Source::Exec(*conn, stream));
                });
            }
        }
        (fds, sources)
    }

    fn handle(&mut self, source: Source, revents: i16, buffer: &mut [u8]) {
        match source {
            Source::Listener => {
                while let Ok((stream, _)) = self.listener.accept() {
                    if stream.set_nonblocking(true).is_ok() {
                        self.conns.insert(
                            self.next_conn,
                            Conn {
                                stream,
                                input: Vec::new(),
                                output: Vec::new(),
                                role: Role::Plain,
                                close_when_sent: false,
                            },
                        );
                        self.next_conn += 1;
                    }
                }
            }
            Source::Signals => {
                while let Ok(Some(signal)) = self.signals.read_signal() {
                    if signal.ssi_signo == Signal::SIGTERM as u32 {
                        self.stop = true;
                    }
                }
            }
            Source::Conn(id) => self.serve_conn(id, revents, buffer),
            Source::Container(index, Some(stream)) => {
                self.drain_container(index, stream, buffer, 1);
            }
            Source::Container(index, None) => self.containers[index].stdio.flush(),
            Source::Exec(conn, Some(stream)) => self.drain_exec(conn, stream, buffer, 1),
            Source::Exec(conn, None) => {
                if let Some(exec) = self.execs.get_mut(&conn) {
                    exec.stdio.flush();
                }
            }
        }
    }

    fn serve_conn(&mut self, id: u64, revents: i16, buffer: &mut [u8]) {
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        let mut gone = false;
        if revents & libc::POLLOUT != 0 {
            gone |= flush(conn).is_err();
        }
        if revents & (libc::POLLIN | libc::POLLHUP | libc::POLLERR) != 0 && !gone {
            match conn.stream.read(buffer) {
                Ok(0) => gone = true,
                Ok(n) => conn.input.extend_from_slice(&buffer[..n]),
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => gone = true,
            }
        }
        while !gone {
            let Some(conn) = self.conns.get_mut(&id) else {
                return;
            };
            match take_frame(&mut conn.input) {
                Ok(Some((FrameKind::Json, payload))) => match serde_json::from_slice(&payload) {
                    Ok(request) => self.request(id, request),
                    Err(err) => self.error(id, format!("not a request of this protocol: {err}")),
                },
                Ok(Some((FrameKind::Stdin, payload))) => {
                    if let Some(stdio) = self.stdio_of(id) {
                        stdio.feed(&payload);
                    }
                }
                Ok(Some(_)) => gone = true,
                Ok(None) => break,
                Err(_) => gone = true,
            }
        }
        if gone {
            self.lose_conn(id);
        }
    }

    /// The streams that a connection's input goes to.
    fn stdio_of(&mut self, conn: u64) -> Option<&mut Stdio> {
        match &self.conns.get(&conn)?.role {
            Role::Exec => self.execs.get_mut(&conn).map(|e| &mut e.stdio),
            Role::Attached(id) => {
                let id = id.clone();
                self.containers
                    .iter_mut()
                    .find(|c| c.id == id)
                    .map(|c| &mut c.stdio)
            }
            _ => None,
        }
    }

    fn lose_conn(&mut self, id: u64) {
        let Some(conn) = self.conns.remove(&id) else {
            return;
        };
        if conn.role == Role::Exec
            && let Some(exec) = self.execs.get(&id)
            && exec.pid > 0
        {
            // Nobody can see this process any more: it ends, as with other runtimes.
            // SAFETY: the PID is our unreaped child's.
            unsafe { libc::kill(exec.pid, libc::SIGKILL) };
        }
        if let Role::Attached(container) = &conn.role
            && let Some(c) = self.containers.iter_mut().find(|c| c.id == *container)
            && c.stdin_once
        {
            c.stdio.end_input();
        }
    }

    fn request(&mut self, conn: u64, request: Request) {
        let result = match request {
            Request::State => {
                let reply = Reply::State {
                    pid: std::process::id() as i32,
                    pause_pid: self.pause.map(Pid::as_raw),
                    containers: self.containers.iter().map(Container::state).collect(),
                };
                self.send(conn, &reply);
                Ok(())
            }
            Request::Events => {
                if let Some(conn) = self.conns.get_mut(&conn) {
                    conn.role = Role::Events;
                }
                self.send(conn, &Reply::Ok);
                Ok(())
            }
            Request::Start(request) => self.start(conn, &request),
            Request::Exec(request) => self.exec(conn, &request),
            Request::Kill { id, signal, all } => self.kill(conn, &id, signal, all),
            Request::Delete { id } => self.delete(conn, id),
            Request::ReopenLog { id } => self
                .container(&id)
                .and_then(|c| c.reopen_log().context("cannot reopen the log"))
                .map(|()| self.send(conn, &Reply::Ok)),
            Request::Attach { id } => self.attach(conn, id),
            Request::Resize { width, height } => {
                if let Some(stdio) = self.stdio_of(conn) {
                    stdio.resize(width, height);
                }
                Ok(())
            }
            Request::CloseStdin => {
                self.close_stdin(conn);
                Ok(())
            }
            Request::Shutdown => {
                self.send(conn, &Reply::Ok);
                self.stop = true;
                Ok(())
            }
        };
        if let Err(err) = result {
            self.error(conn, format!("{err:#}"));
        }
    }

    fn container(&mut self, id: &str) -> anyhow::Result<&mut Container> {
        self.containers
            .iter_mut()
            .find(|c| c.id == id)
            .with_context(|| format!("container {id} is not in this sandbox"))
    }

    fn start(&mut self, conn: u64, request: &StartRequest) -> anyhow::Result<()> {
        anyhow::ensure!(
            !self.containers.iter().any(|c| c.id == request.id),
            "container {} was started before",
            request.id
        );
        let bundle = PathBuf::from(&request.bundle);
        let (ours, theirs) = if request.tty {
            Stdio::terminal(&bundle.join("console"))?
        } else {
            Stdio::pipes(request.stdin)?
        };
        let container = Container::new(request, ours)?;
        let (id, score) = (request.id.clone(), request.oom_score_adj);
        let helper = Helper::run(|| runtime::start(&id, &bundle, theirs, score))?;
        self.containers.push(container);
        self.jobs.push((helper, Job::Start { id, conn }));
        Ok(())
    }

    fn exec(&mut self, conn: u64, request: &ExecRequest) -> anyhow::Result<()> {
        let container = self.container(&request.id)?;
        anyhow::ensure!(
            container.pid != 0,
            "container {} is not running",
            request.id
        );
        let bundle = container.bundle.clone();
        self.exec_count += 1;
        let process_file = bundle.join(format!("exec-{}.json", self.exec_count));
        std::fs::write(&process_file, serde_json::to_vec(&request.process)?)
            .with_context(|| format!("cannot write {}", process_file.display()))?;
        let (ours, theirs) = if request.tty {
            Stdio::terminal(&bundle.join(format!("console-{}", self.exec_count)))?
        } else {
            Stdio::pipes(request.stdin)?
        };
        let id = request.id.clone();
        let helper = Helper::run(|| runtime::exec(&id, &bundle, &process_file, theirs))?;
        self.execs.insert(
            conn,
            Exec {
                container: id,
                stdio: ours,
                pid: 0,
                process_file,
            },
        );
        if let Some(conn) = self.conns.get_mut(&conn) {
            conn.role = Role::Exec;
        }
        self.jobs.push((helper, Job::Exec { conn }));
        Ok(())
    }

    fn kill(&mut self, conn: u64, id: &str, signal: i32, all: bool) -> anyhow::Result<()> {
        let container = self.container(id)?;
        container
            .kill(signal)
            .with_context(|| format!("cannot send signal {signal} to container {id}"))?;
        if all {
            container.kill_all(signal);
        }
        self.send(conn, &Reply::Ok);
        Ok(())
    }

    fn delete(&mut self, conn: u64, id: String) -> anyhow::Result<()> {
        let Some(container) = self.containers.iter().find(|c| c.id == id) else {
            self.send(conn, &Reply::Ok);
            return Ok(());
        };
        anyhow::ensure!(
            container.pid == 0,
            "container {id} is running; stop it first"
        );
        let bundle = container.bundle.clone();
        let name = id.clone();
        let helper = Helper::run(move || runtime::delete(&name, &bundle))?;
        self.jobs.push((helper, Job::Delete { id, conn }));
        Ok(())
    }

    fn attach(&mut self, conn: u64, id: String) -> anyhow::Result<()> {
        let container = self.container(&id)?;
        anyhow::ensure!(container.pid != 0, "container {id} is not running");
        container.attached = true;
        if let Some(conn) = self.conns.get_mut(&conn) {
            conn.role = Role::Attached(id);
        }
        self.send(conn, &Reply::Ok);
        Ok(())
    }

    fn close_stdin(&mut self, conn: u64) {
        let end = match self.conns.get(&conn).map(|c| c.role.clone()) {
            Some(Role::Exec) => true,
            Some(Role::Attached(id)) => self.container(&id).is_ok_and(|c| c.stdin_once),
            _ => false,
        };
        if end && let Some(stdio) = self.stdio_of(conn) {
            stdio.end_input();
        }
    }

    fn drain_container(
        &mut self,
        index: usize,
        stream: Stream,
        buffer: &mut [u8],
        mut rounds: usize,
    ) {
        while rounds > 0 {
            rounds -= 1;
            let Some(container) = self.containers.get_mut(index) else {
                return;
            };
            let Some(n) = container.stdio.read(stream, buffer) else {
                return;
            };
            container.log(stream, &buffer[..n]);
            if container.attached {
                let id = container.id.clone();
                self.fan_out(&id, stream, &buffer[..n]);
            }
        }
    }

    fn fan_out(&mut self, container: &str, stream: Stream, data: &[u8]) {
        let frame = encode(kind_of(stream), data);
        let mut lost = Vec::new();
        for (id, conn) in &mut self.conns {
            if matches!(&conn.role, Role::Attached(c) if c == container) {
                conn.output.extend_from_slice(&frame);
                if flush(conn).is_err() || conn.output.len() > LOST_CLIENT {
                    lost.push(*id);
                }
            }
        }
        for id in lost {
            self.lose_conn(id);
        }
    }

    fn drain_exec(&mut self, conn: u64, stream: Stream, buffer: &mut [u8], mut rounds: usize) {
        while rounds > 0 {
            rounds -= 1;
            let Some(exec) = self.execs.get_mut(&conn) else {
                return;
            };
            let Some(n) = exec.stdio.read(stream, buffer) else {
                return;
            };
            if let Some(client) = self.conns.get_mut(&conn) {
                client
                    .output
                    .extend_from_slice(&encode(kind_of(stream), &buffer[..n]));
                if flush(client).is_err() {
                    self.lose_conn(conn);
                }
            }
        }
    }

    /// Collects every child that has ended. Called after each wake-up, and a
    /// SIGCHLD wakes the loop, so that no exit is missed.
    fn reap(&mut self, buffer: &mut [u8]) {
        loop {
            let (pid, code) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid.as_raw(), code),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid.as_raw(), 128 + signal as i32),
                Ok(WaitStatus::StillAlive) | Err(nix::errno::Errno::ECHILD) => break,
                Ok(_) => continue,
                Err(nix::errno::Errno::EINTR) => continue,
                Err(err) => {
                    eprintln!("cannot wait for processes: {err}");
                    break;
                }
            };
            if let Some(at) = self.jobs.iter().position(|(h, _)| h.pid.as_raw() == pid) {
                let (helper, job) = self.jobs.remove(at);
                let outcome = helper.outcome();
                self.job_done(job, outcome, buffer);
            } else if !self.process_ended(pid, code, buffer) && !self.jobs.is_empty() {
                self.orphans.insert(pid, code);
            }
        }
        if self.jobs.is_empty() {
            self.orphans.clear();
        }
    }

    fn job_done(&mut self, job: Job, outcome: Outcome, buffer: &mut [u8]) {
        let early = |orphans: &mut HashMap<i32, i32>, pid: i32| orphans.remove(&pid);
        match (job, outcome) {
            (Job::Start { id, conn }, Outcome::Done(pid)) => {
                let Some(container) = self.containers.iter_mut().find(|c| c.id == id) else {
                    return;
                };
                if let Err(err) = container.stdio.accept_terminal() {
                    eprintln!("container {id}: {err:#}");
                }
                container.started(pid);
                let started_at = container.started_at;
                self.send(conn, &Reply::Started { pid, started_at });
                if let Some(code) = early(&mut self.orphans, pid) {
                    self.process_ended(pid, code, buffer);
                }
            }
            (Job::Start { id, conn }, Outcome::Failed(message)) => {
                self.containers.retain(|c| c.id != id);
                self.error(conn, message);
            }
            (Job::Exec { conn }, Outcome::Done(pid)) => {
                let Some(exec) = self.execs.get_mut(&conn) else {
                    return;
                };
                let _ = std::fs::remove_file(&exec.process_file);
                if let Err(err) = exec.stdio.accept_terminal() {
                    eprintln!("exec in container {}: {err:#}", exec.container);
                }
                exec.pid = pid;
                if self.conns.contains_key(&conn) {
                    self.send(
                        conn,
                        &Reply::Started {
                            pid,
                            started_at: now_nanos(),
                        },
                    );
                } else {
                    // SAFETY: the PID is our unreaped child's.
                    unsafe { libc::kill(pid, libc::SIGKILL) };
                }
                if let Some(code) = early(&mut self.orphans, pid) {
                    self.process_ended(pid, code, buffer);
                }
            }
            (Job::Exec { conn }, Outcome::Failed(message)) => {
                if let Some(exec) = self.execs.remove(&conn) {
                    let _ = std::fs::remove_file(&exec.process_file);
                }
                self.error(conn, message);
                if let Some(conn) = self.conns.get_mut(&conn) {
                    conn.close_when_sent = true;
                }
            }
            (Job::Delete { id, conn }, Outcome::Done(_)) => {
                self.containers.retain(|c| c.id != id);
                self.send(conn, &Reply::Ok);
            }
            (Job::Delete { conn, .. }, Outcome::Failed(message)) => self.error(conn, message),
        }
    }

    /// Handles the end of a known process; false if it is not known (yet).
    fn process_ended(&mut self, pid: i32, code: i32, buffer: &mut [u8]) -> bool {
        if let Some(index) = self.containers.iter().position(|c| c.pid == pid) {
            // What the process wrote is in the pipes; a daemon that still holds
            // them must not keep us here.
            self.drain_container(index, Stream::Stdout, buffer, 64);
            self.drain_container(index, Stream::Stderr, buffer, 64);
            let exit = self.containers[index].ended(code);
            let id = self.containers[index].id.clone();
            self.announce(&id, exit);
            return true;
        }
        let Some(conn) = self
            .execs
            .iter()
            .find(|(_, e)| e.pid == pid)
            .map(|(conn, _)| *conn)
        else {
            return false;
        };
        self.drain_exec(conn, Stream::Stdout, buffer, 64);
        self.drain_exec(conn, Stream::Stderr, buffer, 64);
        if let Some(exec) = self.execs.remove(&conn) {
            let exit = ExitRecord {
                exit_code: code,
                finished_at: now_nanos(),
                oom_killed: false,
                message: String::new(),
            };
            let id = exec.container;
            self.send(conn, &Reply::Exited { id, exit });
            if let Some(conn) = self.conns.get_mut(&conn) {
                conn.close_when_sent = true;
            }
        }
        true
    }

    /// Tells listeners and attached clients that a container has ended.
    fn announce(&mut self, id: &str, exit: ExitRecord) {
        let reply = Reply::Exited {
            id: id.to_owned(),
            exit,
        };
        let targets: Vec<u64> = self
            .conns
            .iter()
            .filter(|(_, c)| match &c.role {
                Role::Events => true,
                Role::Attached(a) => a == id,
                _ => false,
            })
            .map(|(id, _)| *id)
            .collect();
        for conn in targets {
            self.send(conn, &reply);
            if let Some(conn) = self.conns.get_mut(&conn)
                && conn.role != Role::Events
            {
                conn.close_when_sent = true;
            }
        }
    }

    fn send(&mut self, id: u64, reply: &Reply) {
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        match encode_json(reply) {
            Ok(frame) => conn.output.extend_from_slice(&frame),
            Err(err) => eprintln!("cannot encode an answer: {err}"),
        }
        if flush(conn).is_err() {
            self.lose_conn(id);
        }
    }

    fn error(&mut self, conn: u64, message: String) {
        eprintln!("{message}");
        self.send(conn, &Reply::Error { message });
    }

    /// Kills and removes every container, then the pod's first process.
    fn end_all(&mut self) {
        for container in &self.containers {
            let _ = container.kill(libc::SIGKILL);
            container.kill_all(libc::SIGKILL);
        }
        if let Some(pause) = self.pause {
            let _ = nix::sys::signal::kill(pause, Signal::SIGKILL);
        }
        // Helpers, too, are children: this ends when the last one is gone.
        for container in &mut self.containers {
            if container.pid != 0 {
                let code = match waitpid(Pid::from_raw(container.pid), None) {
                    Ok(WaitStatus::Exited(_, code)) => code,
                    _ => 128 + libc::SIGKILL,
                };
                container.ended(code);
            }
            let (id, bundle) = (container.id.clone(), container.bundle.clone());
            if let Ok(helper) = Helper::run(move || runtime::delete(&id, &bundle)) {
                let _ = waitpid(helper.pid, None);
                if let Outcome::Failed(message) = helper.outcome() {
                    eprintln!("container {}: {message}", container.id);
                }
            }
        }
    }
}

fn kind_of(stream: Stream) -> FrameKind {
    match stream {
        Stream::Stdout => FrameKind::Stdout,
        Stream::Stderr => FrameKind::Stderr,
    }
}

fn add_stdio(stdio: &Stdio, read: bool, mut add: impl FnMut(RawFd, i16, Option<Stream>)) {
    if read {
        if let Some(file) = &stdio.stdout {
            add(file.as_raw_fd(), libc::POLLIN, Some(Stream::Stdout));
        }
        if let Some(file) = &stdio.stderr {
            add(file.as_raw_fd(), libc::POLLIN, Some(Stream::Stderr));
        }
    }
    if let Some(file) = &stdio.stdin
        && !stdio.pending.is_empty()
    {
        add(file.as_raw_fd(), libc::POLLOUT, None);
    }
}

/// Sends what the client takes.
fn flush(conn: &mut Conn) -> io::Result<()> {
    while !conn.output.is_empty() {
        match conn.stream.write(&conn.output) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => {
                conn.output.drain(..n);
            }
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(err) => return Err(err),
        }
    }
    Ok(())
}
