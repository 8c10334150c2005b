//! Starts shims and speaks their protocol from async code.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use xebec_shim::protocol::{
    FrameKind, HEADER, Reply, Request, SandboxSpec, encode, encode_json, header,
};

/// A connection to a shim.
pub struct ShimClient {
    stream: UnixStream,
    input: Input,
}

/// What was read of a connection and not yet taken.
#[derive(Default)]
struct Input(BytesMut);

impl Input {
    /// The next frame; `None` at the end of the connection. Safe to cancel.
    async fn next(&mut self, from: &mut (impl AsyncRead + Unpin)) -> anyhow::Result<Option<Frame>> {
        loop {
            let mut missing = HEADER;
            if let Some(head) = self.0.first_chunk::<HEADER>() {
                let (kind, len) = header(*head)?;
                missing += len;
                if self.0.len() >= missing {
                    let payload = self.0.split_to(missing).freeze().slice(HEADER..);
                    return Ok(Some(match kind {
                        FrameKind::Json => Frame::Reply(
                            serde_json::from_slice(&payload)
                                .context("the shim's answer is unknown")?,
                        ),
                        kind => Frame::Output(kind, payload),
                    }));
                }
            }
            // Room for the frame and the next one's header: two reads a frame.
            self.0.reserve(missing + HEADER - self.0.len());
            if from.read_buf(&mut self.0).await? == 0 {
                return Ok(None);
            }
        }
    }
}

/// A frame as received.
#[derive(Debug)]
pub enum Frame {
    /// An answer.
    Reply(Reply),
    /// Output of a process.
    Output(FrameKind, Bytes),
}

impl ShimClient {
    /// Connects to a shim's socket.
    pub async fn connect(socket: &Path) -> anyhow::Result<Self> {
        let (Some(dir), Some(name)) = (socket.parent(), socket.file_name()) else {
            bail!("{} is not a socket's path", socket.display());
        };
        // The way around the 108 bytes that a socket's address may have.
        let dir = File::open(dir).with_context(|| format!("cannot open {}", dir.display()))?;
        let short = Path::new(&format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name);
        let stream = UnixStream::connect(short)
            .await
            .with_context(|| format!("the pod's shim does not answer at {}", socket.display()))?;
        Ok(Self {
            stream,
            input: Input::default(),
        })
    }

    /// PID of the shim: of the process that listens (`SO_PEERCRED`).
    pub fn peer(&self) -> anyhow::Result<i32> {
        let peer = self.stream.peer_cred();
        let peer = peer.context("cannot ask who listens on the shim's socket")?;
        peer.pid().context("the shim is of another PID namespace")
    }

    /// Sends a request.
    pub async fn send(&mut self, request: &Request) -> anyhow::Result<()> {
        self.stream
            .write_all(&encode_json(request)?)
            .await
            .context("cannot send to the pod's shim")
    }

    /// Sends standard input.
    pub async fn send_stdin(&mut self, data: &[u8]) -> anyhow::Result<()> {
        for part in data.chunks(64 * 1024) {
            self.stream
                .write_all(&encode(FrameKind::Stdin, part))
                .await
                .context("cannot send to the pod's shim")?;
        }
        Ok(())
    }

    /// The next frame; `None` when the shim has closed the connection. Safe to
    /// cancel: what was read stays for the next call.
    pub async fn next(&mut self) -> anyhow::Result<Option<Frame>> {
        self.input.next(&mut self.stream).await
    }

    /// Sends a request and waits for its answer; an error answer is an error.
    pub async fn call(&mut self, request: &Request) -> anyhow::Result<Reply> {
        self.send(request).await?;
        loop {
            match self.next().await? {
                Some(Frame::Reply(Reply::Error { message })) => bail!(message),
                Some(Frame::Reply(reply)) => return Ok(reply),
                Some(Frame::Output(..)) => {}
                None => bail!("the pod's shim has ended"),
            }
        }
    }

    /// Both directions at once: a sender for what goes to the process.
    pub fn split(self) -> (ShimReader, ShimWriter) {
        let (read, write) = self.stream.into_split();
        (
            ShimReader {
                stream: read,
                input: self.input,
            },
            ShimWriter { stream: write },
        )
    }
}

/// The receiving half of a connection.
pub struct ShimReader {
    stream: tokio::net::unix::OwnedReadHalf,
    input: Input,
}

impl ShimReader {
    /// As [`ShimClient::next`].
    pub async fn next(&mut self) -> anyhow::Result<Option<Frame>> {
        self.input.next(&mut self.stream).await
    }
}

/// The sending half of a connection.
pub struct ShimWriter {
    stream: tokio::net::unix::OwnedWriteHalf,
}

impl ShimWriter {
    /// Sends a request.
    pub async fn send(&mut self, request: &Request) -> anyhow::Result<()> {
        Ok(self.stream.write_all(&encode_json(request)?).await?)
    }

    /// Sends standard input.
    pub async fn send_stdin(&mut self, data: &[u8]) -> anyhow::Result<()> {
        for part in data.chunks(64 * 1024) {
            self.stream
                .write_all(&encode(FrameKind::Stdin, part))
                .await?;
        }
        Ok(())
    }
}

/// A process whose end can be waited for, though it is no child.
pub struct Process(tokio::io::unix::AsyncFd<OwnedFd>);

impl Process {
    /// Opens a running process.
    pub fn open(pid: i32) -> anyhow::Result<Self> {
        // SAFETY: a plain system call; the new descriptor is ours.
        let fd = unsafe {
            let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
            if fd < 0 {
                return Err(std::io::Error::last_os_error())
                    .with_context(|| format!("process {pid} is not there"));
            }
            OwnedFd::from_raw_fd(fd as i32)
        };
        // SAFETY: `OwnedFd` always gives the same descriptor, and keeps it open.
        let watched = unsafe {
            tokio::io::unix::AsyncFd::register_with_interest(fd, tokio::io::Interest::READABLE)
        };
        Ok(Self(watched.map_err(std::io::Error::from)?))
    }

    /// Returns when the process has ended.
    pub async fn ended(&self) -> anyhow::Result<()> {
        let _ready = self.0.readable().await?;
        Ok(())
    }
}

/// One request on a connection of its own.
pub async fn call(socket: &Path, request: &Request) -> anyhow::Result<Reply> {
    ShimClient::connect(socket).await?.call(request).await
}

/// Starts the shim of a sandbox; returns when it listens.
pub async fn start(command: &[String], spec: &SandboxSpec, file: &Path) -> anyhow::Result<()> {
    let (program, args) = command
        .split_first()
        .context("no command to start a shim is configured")?;
    tokio::fs::write(file, serde_json::to_vec(spec)?)
        .await
        .with_context(|| format!("cannot write {}", file.display()))?;
    let mut child = tokio::process::Command::new(program)
        .args(args)
        .arg("--spec")
        .arg(file)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start the shim {program}"))?;
    let mut said = String::new();
    let mut stdout = child.stdout.take().context("the shim has no output")?;
    let read = tokio::time::timeout(Duration::from_secs(20), stdout.read_to_string(&mut said));
    let read = read.await;
    // The child ends at once; the shim proper is its child.
    let _ = tokio::time::timeout(Duration::from_secs(5), child.wait()).await;
    read.context("the shim did not get ready in 20 seconds")??;
    if said.trim() != "ready" {
        bail!("the shim did not start: {}", said.trim());
    }
    Ok(())
}
