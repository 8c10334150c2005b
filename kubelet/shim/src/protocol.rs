//! What the CRI server and a shim say to each other: frames over a UNIX socket.
//!
//! A frame is one type byte, a big-endian `u32` length, and that many bytes.
//! Type 0 carries JSON; 1, 2 and 3 carry raw stdin, stdout and stderr.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// The longest payload either side accepts, in bytes.
pub const MAX_FRAME: usize = 4 << 20;
/// Bytes before each payload.
pub const HEADER: usize = 5;

/// What a frame's payload is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum FrameKind {
    /// A [`Request`] or a [`Reply`].
    Json = 0,
    /// Bytes for the process's standard input.
    Stdin = 1,
    /// Bytes from the process's standard output (all output of a terminal).
    Stdout = 2,
    /// Bytes from the process's standard error.
    Stderr = 3,
}

impl FrameKind {
    /// The kind that a type byte stands for.
    pub fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            0 => Self::Json,
            1 => Self::Stdin,
            2 => Self::Stdout,
            3 => Self::Stderr,
            _ => return None,
        })
    }
}

/// What a shim holds for one pod; the CRI server writes it as JSON to a file
/// and names that file in `--spec`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SandboxSpec {
    /// The sandbox's id.
    pub id: String,
    /// The socket to listen on.
    pub socket: String,
    /// Where the shim and `libcontainer` write what goes wrong.
    pub log: String,
    /// Hostname of the pod's own UTS namespace; `None` keeps the host's.
    pub hostname: Option<String>,
    /// Share the host's IPC namespace.
    pub host_ipc: bool,
    /// One PID namespace for all containers of the pod.
    pub shared_pid: bool,
    /// Directory in the cgroup2 hierarchy that the pod's processes join.
    pub unified_cgroup: Option<String>,
}

/// A request to a shim.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// Describe the sandbox and its containers; answered by [`Reply::State`].
    State,
    /// Send every container exit as [`Reply::Exited`] on this connection.
    Events,
    /// Create and start a container; answered by [`Reply::Started`].
    Start(StartRequest),
    /// Send a signal to a container's first process, or to all of them.
    Kill {
        /// Container id.
        id: String,
        /// Signal number.
        signal: i32,
        /// Signal every process of the container.
        all: bool,
    },
    /// Kill what is left of a container and forget it.
    Delete {
        /// Container id.
        id: String,
    },
    /// Open the container's log file anew (after a rotation).
    ReopenLog {
        /// Container id.
        id: String,
    },
    /// Run one more process in a container; the connection then carries its
    /// streams and ends with [`Reply::Exited`].
    Exec(ExecRequest),
    /// Join the streams of a container's first process.
    Attach {
        /// Container id.
        id: String,
    },
    /// New terminal size, within an exec or attach connection.
    Resize {
        /// Columns.
        width: u16,
        /// Rows.
        height: u16,
    },
    /// End of standard input, within an exec or attach connection.
    CloseStdin,
    /// Kill all containers and end the shim.
    Shutdown,
}

/// How to start a container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StartRequest {
    /// Container id.
    pub id: String,
    /// OCI bundle: the directory of `config.json`.
    pub bundle: String,
    /// The CRI log file; `None` throws output away.
    pub log_path: Option<String>,
    /// The process gets a terminal (as in `config.json`).
    pub tty: bool,
    /// Keep a standard input open for attach.
    pub stdin: bool,
    /// Close standard input when the first attached client ends its own.
    pub stdin_once: bool,
    /// Value for `/proc/<pid>/oom_score_adj`.
    pub oom_score_adj: Option<i32>,
}

/// How to start a process in a running container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExecRequest {
    /// Container id.
    pub id: String,
    /// The `process` object of the OCI runtime specification.
    pub process: serde_json::Value,
    /// The process gets a terminal.
    pub tty: bool,
    /// Standard input comes over the connection.
    pub stdin: bool,
}

/// One container as its shim knows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ContainerState {
    /// Container id.
    pub id: String,
    /// PID of its first process on the host; 0 when it has exited.
    pub pid: i32,
    /// Start time, nanoseconds since 1970.
    pub started_at: i64,
    /// How it ended, if it has.
    pub exit: Option<ExitRecord>,
}

/// How a container ended; also kept on disk as `exit.json` in its bundle.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExitRecord {
    /// Exit code, or 128 + signal.
    pub exit_code: i32,
    /// End time, nanoseconds since 1970.
    pub finished_at: i64,
    /// The kernel killed it for want of memory.
    pub oom_killed: bool,
    /// What went wrong, when it did not start.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

/// An answer of a shim.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Reply {
    /// Done.
    Ok,
    /// Not done, and why.
    Error {
        /// The reason.
        message: String,
    },
    /// The process runs.
    Started {
        /// PID on the host.
        pid: i32,
        /// Start time, nanoseconds since 1970.
        started_at: i64,
    },
    /// The sandbox as it is.
    State {
        /// PID of the shim.
        pid: i32,
        /// PID whose `ns/pid` is the pod's, when the pod shares one.
        pause_pid: Option<i32>,
        /// All containers not yet deleted.
        containers: Vec<ContainerState>,
    },
    /// A container or exec process ended.
    Exited {
        /// Container id.
        id: String,
        /// How.
        exit: ExitRecord,
    },
}

/// The bytes of one frame.
pub fn encode(kind: FrameKind, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + payload.len());
    out.push(kind as u8);
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    out.extend_from_slice(payload);
    out
}

/// The bytes of a JSON frame.
pub fn encode_json<T: Serialize>(value: &T) -> io::Result<Vec<u8>> {
    Ok(encode(
        FrameKind::Json,
        &serde_json::to_vec(value).map_err(io::Error::other)?,
    ))
}

/// Takes the first whole frame off `buffer`; `None` if it is not complete.
pub fn take_frame(buffer: &mut Vec<u8>) -> io::Result<Option<(FrameKind, Vec<u8>)>> {
    if buffer.len() < HEADER {
        return Ok(None);
    }
    let (kind, len) = header([buffer[0], buffer[1], buffer[2], buffer[3], buffer[4]])?;
    if buffer.len() < HEADER + len {
        return Ok(None);
    }
    let payload = buffer[HEADER..HEADER + len].to_vec();
    buffer.drain(..HEADER + len);
    Ok(Some((kind, payload)))
}

/// Reads a frame's header: its kind and its payload's length.
pub fn header(bytes: [u8; HEADER]) -> io::Result<(FrameKind, usize)> {
    let kind = FrameKind::from_byte(bytes[0]).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("unknown frame type {}", bytes[0]),
        )
    })?;
    let len = u32::from_be_bytes([bytes[1], bytes[2], bytes[3], bytes[4]]) as usize;
    if len > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("frame of {len} bytes is longer than {MAX_FRAME}"),
        ));
    }
    Ok((kind, len))
}

/// Sends one request and waits for its answer, on a blocking stream.
pub fn call(stream: &mut (impl Read + Write), request: &Request) -> io::Result<Reply> {
    stream.write_all(&encode_json(request)?)?;
    let mut head = [0; HEADER];
    stream.read_exact(&mut head)?;
    let (kind, len) = header(head)?;
    let mut body = vec![0; len];
    stream.read_exact(&mut body)?;
    if kind != FrameKind::Json {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the shim answered with raw bytes",
        ));
    }
    serde_json::from_slice(&body).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_any_split() {
        let mut wire = encode(FrameKind::Stdout, b"abc");
        wire.extend(encode_json(&Request::CloseStdin).unwrap());
        for cut in 0..wire.len() {
            let mut buffer = wire[..cut].to_vec();
            let mut got = Vec::new();
            while let Some(frame) = take_frame(&mut buffer).unwrap() {
                got.push(frame);
            }
            buffer.extend_from_slice(&wire[cut..]);
            while let Some(frame) = take_frame(&mut buffer).unwrap() {
                got.push(frame);
            }
            assert_eq!(got.len(), 2, "cut at {cut}");
            assert_eq!(got[0], (FrameKind::Stdout, b"abc".to_vec()));
            assert_eq!(got[1].0, FrameKind::Json);
        }
    }

    #[test]
    fn an_oversized_or_unknown_frame_is_refused() {
        assert!(header([0, 0xff, 0xff, 0xff, 0xff]).is_err());
        assert!(header([9, 0, 0, 0, 1]).is_err());
    }
}
