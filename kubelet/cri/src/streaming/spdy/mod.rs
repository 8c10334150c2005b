//! SPDY/3.1, the older of the protocols that clients of Kubernetes speak.

pub mod dictionary;
mod forward;
mod frame;
mod headers;
mod process;
mod session;

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio_tungstenite::tungstenite::Message;
use tokio_util::codec::{BytesCodec, FramedWrite};
use tokio_util::io::StreamReader;

pub(super) use forward::forward;
pub(super) use process::process;
pub(super) use session::Session;

use super::websocket::Socket;

/// Protocols of exec and attach over SPDY.
pub(super) const PROCESS_PROTOCOLS: &[&str] = &["v4.channel.k8s.io"];
/// Protocols of port-forward over SPDY.
pub(super) const FORWARD_PROTOCOLS: &[&str] = &["portforward.k8s.io"];

/// SPDY right on a connection.
pub(super) fn open(connection: Upgraded) -> Session {
    let (reader, writer) = tokio::io::split(TokioIo::new(connection));
    Session::serve(reader, FramedWrite::new(writer, BytesCodec::new()))
}

/// SPDY in the binary messages of a WebSocket.
pub(super) fn tunnel(socket: Socket) -> Session {
    let (sink, source) = socket.split();
    let bytes = source
        .take_while(|message| std::future::ready(!matches!(message, Ok(Message::Close(_)))))
        .filter_map(|message| {
            std::future::ready(match message {
                Ok(Message::Binary(bytes)) => Some(Ok(bytes)),
                Ok(_) => None,
                Err(err) => Some(Err(std::io::Error::other(err))),
            })
        });
    let sink = sink.with(|bytes: Bytes| {
        std::future::ready(Ok::<_, tokio_tungstenite::tungstenite::Error>(
            Message::Binary(bytes),
        ))
    });
    Session::serve(StreamReader::new(bytes), sink)
}
