//! Exec and attach over SPDY: one stream for each of a process's.

use std::time::Duration;

use anyhow::{Context, ensure};
use bytes::Bytes;
use futures::{Stream, StreamExt};

use super::super::process::{self, Channel, Input, Output, Sizes};
use super::super::tokens::{Streams, Target};
use super::session::{Reader, Session, Stream as SpdyStream, Writer};
use crate::runtime::Runtime;

/// How long a client may take to open the streams that it asked for.
const ARRIVAL: Duration = Duration::from_secs(30);

/// The streams of one process, by their `streamtype`.
#[derive(Default)]
struct Arrived {
    error: Option<SpdyStream>,
    stdin: Option<SpdyStream>,
    stdout: Option<SpdyStream>,
    stderr: Option<SpdyStream>,
    resize: Option<SpdyStream>,
}

impl Arrived {
    fn take(&mut self, stream: SpdyStream) -> anyhow::Result<()> {
        let kind = stream.headers.get("streamtype").unwrap_or_default();
        let slot = match kind {
            "error" => &mut self.error,
            "stdin" => &mut self.stdin,
            "stdout" => &mut self.stdout,
            "stderr" => &mut self.stderr,
            "resize" => &mut self.resize,
            _ => anyhow::bail!("a stream has the unknown type {kind:?}"),
        };
        ensure!(slot.is_none(), "a client opened two streams of one type");
        *slot = Some(stream);
        Ok(())
    }

    fn complete(&self, streams: Streams) -> bool {
        self.error.is_some()
            && self.stdin.is_some() == streams.stdin
            && self.stdout.is_some() == streams.stdout
            && self.stderr.is_some() == streams.stderr
            && self.resize.is_some() == streams.tty
    }
}

/// Serves exec or attach.
pub(in super::super) async fn process(
    runtime: &Runtime,
    target: &Target,
    streams: Streams,
    mut session: Session,
) {
    let arrived = match tokio::time::timeout(ARRIVAL, arrive(&mut session, streams)).await {
        Ok(Ok(arrived)) => arrived,
        Ok(Err(err)) => return tracing::debug!("a SPDY client's streams are wrong: {err:#}"),
        Err(_) => return tracing::debug!("a SPDY client does not open its streams"),
    };
    let split = |stream: Option<SpdyStream>| match stream {
        Some(stream) => (Some(stream.reader), Some(stream.writer)),
        None => (None, None),
    };
    let ((stdin, stdin_end), (resize, resize_end)) = (split(arrived.stdin), split(arrived.resize));
    let mut output = Writers {
        stdout: split(arrived.stdout).1,
        stderr: split(arrived.stderr).1,
    };
    let (_, error) = split(arrived.error);
    let gone = session.gone();
    let mut input = futures::stream::select(inputs(stdin), resizes(resize))
        .chain(futures::stream::pending())
        .take_until(Box::pin(gone.cancelled_owned()))
        .boxed();
    let Some(status) = process::run(runtime, target, streams, &mut input, &mut output).await else {
        return;
    };
    // What still comes in is of no use.
    drop(input);
    let writers = [output.stdout, output.stderr, stdin_end, resize_end];
    for writer in writers.into_iter().flatten() {
        writer.finish().await;
    }
    if let Some(error) = error {
        let _ = error.write(status.to_string().as_bytes()).await;
        error.finish().await;
    }
    session.close().await;
}

async fn arrive(session: &mut Session, streams: Streams) -> anyhow::Result<Arrived> {
    let mut arrived = Arrived::default();
    while !arrived.complete(streams) {
        let stream = session.accept().await.context("the client has left")?;
        arrived.take(stream)?;
    }
    Ok(arrived)
}

/// Pieces of standard input, then its end.
fn inputs(reader: Option<Reader>) -> impl Stream<Item = Input> + Send {
    futures::stream::unfold(reader, |reader| async move {
        let mut reader = reader?;
        Some(match reader.read().await {
            Some(piece) => (Input::Stdin(piece), Some(reader)),
            None => (Input::StdinEnd, None),
        })
    })
}

fn resizes(reader: Option<Reader>) -> impl Stream<Item = Input> + Send {
    futures::stream::unfold(
        (reader, Sizes::default()),
        |(reader, mut sizes)| async move {
            let mut reader = reader?;
            loop {
                match sizes.push(&reader.read().await?) {
                    Ok(Some(size)) => return Some((size, (Some(reader), sizes))),
                    Ok(None) => {}
                    Err(err) => tracing::debug!("a terminal's size is left out: {err:#}"),
                }
            }
        },
    )
}

struct Writers {
    stdout: Option<Writer>,
    stderr: Option<Writer>,
}

impl Output for Writers {
    async fn send(&mut self, channel: Channel, data: Bytes) -> anyhow::Result<()> {
        let writer = match channel {
            Channel::Stdout => &self.stdout,
            Channel::Stderr => &self.stderr,
        };
        match writer {
            Some(writer) => writer.write(&data).await,
            None => Ok(()),
        }
    }
}
