//! Port-forward over SPDY: a pair of streams, data and error, for each connection.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

use super::session::{Session, Stream};
use crate::records::Sandbox;
use crate::runtime::Runtime;

/// The longest piece read from a pod at once.
const PIECE: usize = 32 * 1024;

/// Serves a client's connections until it leaves.
pub(in super::super) async fn forward(
    runtime: &Arc<Runtime>,
    sandbox: &Arc<Sandbox>,
    mut session: Session,
) {
    // One of a pair whose other has not arrived yet.
    let mut single: HashMap<(String, u16), Stream> = HashMap::new();
    let mut connections = JoinSet::new();
    loop {
        let stream = tokio::select! {
            stream = session.accept() => stream,
            Some(_) = connections.join_next() => continue,
        };
        let Some(stream) = stream else { return };
        let (is_data, key) = match about(&stream) {
            Ok(about) => about,
            Err(err) => {
                // Dropping a stream resets it.
                tracing::debug!("a port-forward's stream is refused: {err:#}");
                continue;
            }
        };
        let Some(other) = single.remove(&key) else {
            single.insert(key, stream);
            continue;
        };
        let port = key.1;
        let (data, error) = match (is_data, is_data_stream(&other)) {
            (true, false) => (stream, other),
            (false, true) => (other, stream),
            _ => {
                tracing::debug!("a port-forward has two streams of one type for one request");
                continue;
            }
        };
        let (runtime, sandbox) = (runtime.clone(), sandbox.clone());
        connections.spawn(async move { connect(&runtime, &sandbox, port, data, error).await });
    }
}

fn is_data_stream(stream: &Stream) -> bool {
    stream.headers.get("streamtype") == Some("data")
}

/// Whether a stream is for data, and which request and port it belongs to.
fn about(stream: &Stream) -> anyhow::Result<(bool, (String, u16))> {
    let is_data = match stream.headers.get("streamtype") {
        Some("data") => true,
        Some("error") => false,
        other => anyhow::bail!("unknown stream type {other:?}"),
    };
    let port = stream.headers.get("port").unwrap_or_default();
    let port: u16 = port
        .parse()
        .ok()
        .filter(|port| *port > 0)
        .ok_or_else(|| anyhow::anyhow!("{port:?} is no port"))?;
    let request = match (stream.headers.get("requestid"), is_data) {
        (Some(id), _) => id.to_owned(),
        // Old clients number no requests; they open the error stream just before.
        (None, false) => stream.id.to_string(),
        (None, true) => stream.id.saturating_sub(2).to_string(),
    };
    Ok((is_data, (request, port)))
}

async fn connect(runtime: &Runtime, sandbox: &Sandbox, port: u16, data: Stream, error: Stream) {
    let connection = match runtime.dial(sandbox, port).await {
        Ok(connection) => connection,
        Err(err) => {
            let why = format!(
                "error forwarding port {port} to pod {}: {err:#}",
                sandbox.id
            );
            // The client hears why before it sees the end of its data.
            let _ = error.writer.write(why.as_bytes()).await;
            error.writer.finish().await;
            data.writer.finish().await;
            return;
        }
    };
    let (mut from_pod, mut to_pod) = connection.into_split();
    let Stream {
        mut reader, writer, ..
    } = data;
    let gone = writer.gone();
    let upload = async {
        while let Some(piece) = reader.read().await {
            if to_pod.write_all(&piece).await.is_err() {
                break;
            }
        }
        if !gone.is_cancelled() {
            let _ = to_pod.shutdown().await;
            // Half of the connection has ended; the answer may still come.
            std::future::pending::<()>().await;
        }
    };
    let download = async {
        loop {
            let mut piece = BytesMut::with_capacity(PIECE);
            match from_pod.read_buf(&mut piece).await {
                Ok(read) if read > 0 => {}
                // The end, or a reset, which is how many servers end.
                _ => return,
            }
            if writer.write(&piece).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = download => {}
        () = upload => {}
        () = gone.cancelled() => {}
    }
    writer.finish().await;
    error.writer.finish().await;
}
