//! Joins a client's streams with a process in a container, whatever the client speaks.

use bytes::Bytes;
use futures::{Stream, StreamExt};
use serde_json::Value;
use xebec_shim::protocol::{FrameKind, Reply, Request};

use super::status;
use super::tokens::{Streams, Target};
use crate::records::Phase;
use crate::runtime::Runtime;
use crate::shim_client::{Frame, ShimClient, ShimReader, ShimWriter};

/// What a client sends.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Input {
    Stdin(Bytes),
    StdinEnd,
    Resize { width: u16, height: u16 },
}

/// Where a process's output goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Channel {
    Stdout,
    Stderr,
}

/// The way of output to a client.
pub(super) trait Output {
    /// Returns when the client can take more.
    async fn send(&mut self, channel: Channel, data: Bytes) -> anyhow::Result<()>;
}

/// Runs or joins a process until it ends: what to tell the client at the end.
/// `None` when the client has gone; a process started for it is then killed.
pub(super) async fn run(
    runtime: &Runtime,
    target: &Target,
    streams: Streams,
    input: &mut (impl Stream<Item = Input> + Unpin),
    output: &mut impl Output,
) -> Option<Value> {
    let (attached, opened) = match target {
        Target::Exec {
            container, command, ..
        } => (
            false,
            exec(runtime, container, command, streams)
                .await
                .map_err(|err| format!("error executing command in container: {err:#}")),
        ),
        Target::Attach { container, .. } => (
            true,
            attach(runtime, container)
                .await
                .map_err(|err| format!("error attaching to container: {err:#}")),
        ),
        Target::PortForward { .. } => return Some(status::internal("a port is no process")),
    };
    let (mut reader, mut writer) = match opened {
        Ok(client) => client.split(),
        Err(message) => return Some(status::internal(&message)),
    };
    tokio::select! {
        end = send_output(&mut reader, streams, output) => match end {
            // The exit code of a container is in its status; attach has none.
            Ok(Some(_)) if attached => Some(status::success()),
            Ok(Some(code)) => Some(status::exited(code)),
            Ok(None) => None,
            Err(err) => Some(status::internal(&format!("{err:#}"))),
        },
        () = take_input(input, streams, &mut writer) => None,
    }
}

async fn exec(
    runtime: &Runtime,
    container: &str,
    command: &[String],
    streams: Streams,
) -> anyhow::Result<ShimClient> {
    let container = runtime.registry.container(container);
    let container = container.ok_or_else(|| anyhow::anyhow!("the container is gone"))?;
    runtime
        .open_exec(&container, command, streams.tty, streams.stdin)
        .await
}

async fn attach(runtime: &Runtime, container: &str) -> anyhow::Result<ShimClient> {
    let container = runtime.registry.container(container);
    let container = container.ok_or_else(|| anyhow::anyhow!("the container is gone"))?;
    anyhow::ensure!(
        container.record().phase == Phase::Running,
        "container {:?} is not running",
        container.id
    );
    runtime.open_attach(&container).await
}

/// Sends output until the process ends; its exit code, or `None` if the client is gone.
async fn send_output(
    reader: &mut ShimReader,
    streams: Streams,
    output: &mut impl Output,
) -> anyhow::Result<Option<i32>> {
    loop {
        match reader.next().await? {
            Some(Frame::Output(kind, data)) => {
                let channel = match kind {
                    FrameKind::Stderr => Channel::Stderr,
                    _ => Channel::Stdout,
                };
                let wanted = match channel {
                    Channel::Stdout => streams.stdout,
                    Channel::Stderr => streams.stderr,
                };
                if wanted && output.send(channel, data).await.is_err() {
                    return Ok(None);
                }
            }
            Some(Frame::Reply(Reply::Exited { exit, .. })) => return Ok(Some(exit.exit_code)),
            Some(Frame::Reply(Reply::Error { message })) => anyhow::bail!(message),
            Some(Frame::Reply(_)) => {}
            None => anyhow::bail!("the stream to the process has ended before the process"),
        }
    }
}

/// Passes input on until the client is gone.
async fn take_input(
    input: &mut (impl Stream<Item = Input> + Unpin),
    streams: Streams,
    writer: &mut ShimWriter,
) {
    while let Some(input) = input.next().await {
        // A process that takes no more input is no reason to end: its output,
        // and its exit code, are still to come.
        let _ = match input {
            Input::Stdin(data) if streams.stdin => writer.send_stdin(&data).await,
            Input::StdinEnd if streams.stdin => writer.send(&Request::CloseStdin).await,
            Input::Resize { width, height } if streams.tty => {
                writer.send(&Request::Resize { width, height }).await
            }
            _ => Ok(()),
        };
    }
}

/// Terminal sizes out of a stream of JSON objects, cut anywhere.
#[derive(Default)]
pub(super) struct Sizes {
    buffer: Vec<u8>,
}

/// A size's text is short; what grows beyond this is none.
const LONGEST_SIZE: usize = 4096;

impl Sizes {
    /// Takes in a piece; the newest size in it, if it completes one.
    pub(super) fn push(&mut self, piece: &[u8]) -> anyhow::Result<Option<Input>> {
        #[derive(serde::Deserialize)]
        struct Size {
            #[serde(rename = "Width", alias = "width")]
            width: u16,
            #[serde(rename = "Height", alias = "height")]
            height: u16,
        }
        self.buffer.extend_from_slice(piece);
        let mut sizes = serde_json::Deserializer::from_slice(&self.buffer).into_iter::<Size>();
        let mut newest = None;
        let mut done = 0;
        loop {
            match sizes.next() {
                Some(Ok(Size { width, height })) => {
                    newest = Some(Input::Resize { width, height });
                    done = sizes.byte_offset();
                }
                Some(Err(err)) if err.is_eof() => break,
                Some(Err(err)) => {
                    self.buffer.clear();
                    return Err(anyhow::anyhow!("a terminal size can't be read: {err}"));
                }
                None => {
                    done = self.buffer.len();
                    break;
                }
            }
        }
        self.buffer.drain(..done);
        anyhow::ensure!(
            self.buffer.len() <= LONGEST_SIZE,
            "a terminal size is too long"
        );
        Ok(newest)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_found_however_they_are_cut() {
        let text = b"{\"Width\":80,\"Height\":24}\n{\"Width\":132,\"Height\":43}\n";
        for cut in 0..=text.len() {
            let mut sizes = Sizes::default();
            let first = sizes.push(&text[..cut]).unwrap();
            let second = sizes.push(&text[cut..]).unwrap();
            let newest = second.or(first);
            assert_eq!(
                newest,
                Some(Input::Resize {
                    width: 132,
                    height: 43
                }),
                "cut at {cut}"
            );
            assert_eq!(sizes.push(b"").unwrap(), None);
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        assert!(Sizes::default().push(b"hello").is_err());
        assert!(
            Sizes::default()
                .push(b"{\"Width\":-1,\"Height\":2}")
                .is_err()
        );
        assert!(Sizes::default().push(&[b' '; 9000]).is_ok());
        assert!(Sizes::default().push(&[b'{'; 9000]).is_err());
    }
}
