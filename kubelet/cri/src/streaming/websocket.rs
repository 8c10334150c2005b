//! The WebSocket protocols of Kubernetes: channels of one process (v4, v5), or SPDY within.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{BufMut, Bytes, BytesMut};
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, Stream, StreamExt};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};

use super::process::{self, Channel, Input, Output, Sizes};
use super::tokens::{Streams, Target};
use crate::runtime::Runtime;

/// Protocols of exec and attach.
pub(super) const PROCESS_PROTOCOLS: &[&str] = &["v5.channel.k8s.io", "v4.channel.k8s.io"];
/// Port-forward: SPDY in binary messages.
pub(super) const FORWARD_PROTOCOLS: &[&str] = &["SPDY/3.1+portforward.k8s.io"];

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
/// In v5: the client sends no more on the channel that the next byte names.
const CLOSE: u8 = 255;

/// How long a client may take to answer the end of a connection.
const GOODBYE: Duration = Duration::from_secs(5);
/// A client's longest message: what it holds is in memory at once.
const LONGEST_MESSAGE: usize = 16 << 20;
const BUFFER: usize = 32 * 1024;

/// A client's WebSocket.
pub(super) type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// The answer to a client's `Sec-WebSocket-Key`.
pub(super) fn accept_key(key: &[u8]) -> String {
    let mut hash = ring::digest::Context::new(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY);
    hash.update(key);
    hash.update(b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    STANDARD.encode(hash.finish())
}

/// An upgraded connection as a WebSocket.
pub(super) async fn open(connection: Upgraded) -> Socket {
    let config = WebSocketConfig::default()
        .read_buffer_size(BUFFER)
        .write_buffer_size(BUFFER)
        .max_message_size(Some(LONGEST_MESSAGE))
        .max_frame_size(Some(LONGEST_MESSAGE));
    WebSocketStream::from_raw_socket(TokioIo::new(connection), Role::Server, Some(config)).await
}

/// Serves exec or attach.
pub(super) async fn process(runtime: &Runtime, target: &Target, streams: Streams, socket: Socket) {
    let (sink, source) = socket.split();
    let mut output = Channels(sink);
    let mut input = Box::pin(inputs(source));
    // An empty message says that the streams are open.
    let first = match (streams.stdout, streams.stderr) {
        (true, _) => STDOUT,
        (false, true) => STDERR,
        (false, false) => ERROR,
    };
    if output.message(first, &[]).await.is_err() {
        return;
    }
    let Some(status) = process::run(runtime, target, streams, &mut input, &mut output).await else {
        return;
    };
    let goodbye = async {
        output.message(ERROR, status.to_string().as_bytes()).await?;
        let close = CloseFrame {
            code: CloseCode::Normal,
            reason: "".into(),
        };
        output.0.send(Message::Close(Some(close))).await?;
        // The client answers with a close message of its own, after all it sent.
        while input.next().await.is_some() {}
        anyhow::Ok(())
    };
    if let Ok(Err(err)) = tokio::time::timeout(GOODBYE, goodbye).await {
        tracing::debug!("a client left before the end of its stream: {err:#}");
    }
}

/// What a client's messages say; ends when it is gone or breaks the protocol.
fn inputs(source: SplitStream<Socket>) -> impl Stream<Item = Input> {
    let state = (source, Sizes::default());
    futures::stream::unfold(state, |(mut source, mut sizes)| async move {
        loop {
            let message = match source.next().await? {
                Ok(Message::Binary(message)) => message,
                Ok(Message::Close(_)) => return None,
                Ok(Message::Text(_)) => {
                    tracing::debug!("a client sent text, where bytes are spoken");
                    return None;
                }
                Ok(_) => continue,
                Err(err) => {
                    tracing::debug!("a client's connection ended: {err}");
                    return None;
                }
            };
            match input(&message, &mut sizes) {
                Ok(Some(input)) => return Some((input, (source, sizes))),
                Ok(None) => {}
                Err(err) => tracing::debug!("a client's message is left out: {err:#}"),
            }
        }
    })
}

/// One message: a channel's number, then its bytes.
fn input(message: &Bytes, sizes: &mut Sizes) -> anyhow::Result<Option<Input>> {
    Ok(match message.split_first() {
        Some((&STDIN, [])) => None,
        Some((&STDIN, _)) => Some(Input::Stdin(message.slice(1..))),
        Some((&RESIZE, piece)) => sizes.push(piece)?,
        Some((&CLOSE, [STDIN])) => Some(Input::StdinEnd),
        Some((&channel, _)) => anyhow::bail!("there is no channel {channel} for a client"),
        None => None,
    })
}

struct Channels(SplitSink<Socket, Message>);

impl Channels {
    async fn message(&mut self, channel: u8, data: &[u8]) -> anyhow::Result<()> {
        let mut message = BytesMut::with_capacity(data.len() + 1);
        message.put_u8(channel);
        message.put_slice(data);
        Ok(self.0.send(Message::Binary(message.freeze())).await?)
    }
}

impl Output for Channels {
    async fn send(&mut self, channel: Channel, data: Bytes) -> anyhow::Result<()> {
        let channel = match channel {
            Channel::Stdout => STDOUT,
            Channel::Stderr => STDERR,
        };
        self.message(channel, &data).await
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_answered_as_in_the_standard() {
        assert_eq!(
            accept_key(b"dGhlIHNhbXBsZSBub25jZQ=="),
            "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        );
    }

    #[test]
    fn messages_say_what_they_say() {
        let mut sizes = Sizes::default();
        let mut say = |message: &'static [u8]| input(&Bytes::from_static(message), &mut sizes);
        assert_eq!(
            say(b"\x00abc").unwrap(),
            Some(Input::Stdin(Bytes::from_static(b"abc")))
        );
        assert_eq!(say(b"\xff\x00").unwrap(), Some(Input::StdinEnd));
        assert_eq!(
            say(b"\x04{\"Width\":3,\"Height\":2}").unwrap(),
            Some(Input::Resize {
                width: 3,
                height: 2
            })
        );
        assert_eq!(say(b"\x00").unwrap(), None);
        assert_eq!(say(b"").unwrap(), None);
        say(b"\x01abc").unwrap_err();
        say(b"\xff\x01").unwrap_err();
    }
}
