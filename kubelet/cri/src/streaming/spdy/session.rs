//! One SPDY connection: streams that a client opens, over one pair of bytes' ways.
//!
//! Flow control by windows is left out on both sides, as in the clients of
//! Kubernetes, which neither send nor heed window updates: a stream that nobody
//! reads holds up the connection once its queue is full.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, ensure};
use bytes::{Bytes, BytesMut};
use futures::{Sink, SinkExt};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::frame::{self, Frame, Reset};
use super::headers::{EmptyPacker, Headers, Unpacker};

/// Streams open at a time: a client that opens more is refused.
const MOST_STREAMS: usize = 1024;
/// Pieces that wait for a stream's reader.
const QUEUE: usize = 8;
/// Frames that wait for the connection.
const OUTGOING: usize = 8;
/// The longest piece of data passed on at once.
const PIECE: usize = 32 * 1024;
/// How long a client may take to leave once all is said.
const GOODBYE: Duration = Duration::from_secs(5);

struct Open {
    /// Gone when the client has sent its last.
    data: Option<mpsc::Sender<Bytes>>,
    /// Our side is still open.
    writing: bool,
    gone: CancellationToken,
}

#[derive(Default)]
struct Streams(Mutex<HashMap<u32, Open>>);

impl Streams {
    fn lock(&self) -> MutexGuard<'_, HashMap<u32, Open>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets a stream that both sides have finished.
    fn tidy(streams: &mut HashMap<u32, Open>, id: u32) {
        if streams
            .get(&id)
            .is_some_and(|open| open.data.is_none() && !open.writing)
        {
            streams.remove(&id);
        }
    }
}

/// A stream as its server has it.
pub(in super::super) struct Stream {
    pub(in super::super) id: u32,
    pub(in super::super) headers: Headers,
    pub(in super::super) reader: Reader,
    pub(in super::super) writer: Writer,
}

/// What the client sends on a stream.
pub(in super::super) struct Reader {
    data: mpsc::Receiver<Bytes>,
}

impl Reader {
    /// The next piece; `None` at the end of the stream, however it came.
    pub(in super::super) async fn read(&mut self) -> Option<Bytes> {
        self.data.recv().await
    }
}

/// What goes to the client on a stream.
pub(in super::super) struct Writer {
    id: u32,
    out: mpsc::Sender<Bytes>,
    streams: Arc<Streams>,
    gone: CancellationToken,
    open: bool,
}

impl Writer {
    /// Sends; returns when there is room for more.
    pub(in super::super) async fn write(&self, data: &[u8]) -> anyhow::Result<()> {
        ensure!(
            !self.gone.is_cancelled(),
            "the client has closed the stream"
        );
        for piece in data.chunks(PIECE) {
            self.send(frame::data(self.id, false, piece)).await?;
        }
        Ok(())
    }

    /// Tells the client that no more will come.
    pub(in super::super) async fn finish(mut self) {
        if !self.gone.is_cancelled() {
            // Without a client there is nobody to tell.
            let _ = self.send(frame::data(self.id, true, &[])).await;
        }
        self.open = false;
    }

    /// Returns when the client has reset the stream or has left.
    pub(in super::super) fn gone(&self) -> CancellationToken {
        self.gone.clone()
    }

    async fn send(&self, frame: Bytes) -> anyhow::Result<()> {
        self.out.send(frame).await.context("the client has left")
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if self.open && !self.gone.is_cancelled() {
            let _ = self.out.try_send(frame::rst_stream(self.id, Reset::Cancel));
        }
        let mut streams = self.streams.lock();
        if let Some(open) = streams.get_mut(&self.id) {
            open.writing = false;
        }
        Streams::tidy(&mut streams, self.id);
    }
}

/// A connection; dropping it ends it.
pub(in super::super) struct Session {
    arrivals: mpsc::Receiver<Stream>,
    out: mpsc::Sender<Bytes>,
    gone: CancellationToken,
    task: JoinHandle<()>,
}

impl Session {
    /// Serves a connection of which both ways are given.
    pub(in super::super) fn serve<R, W>(reader: R, writer: W) -> Self
    where
        R: AsyncRead + Send + Unpin + 'static,
        W: Sink<Bytes> + Send + Unpin + 'static,
    {
        let (out, frames) = mpsc::channel(OUTGOING);
        let (arrived, arrivals) = mpsc::channel(QUEUE);
        let gone = CancellationToken::new();
        let mut connection = Connection {
            streams: Arc::default(),
            out: out.clone(),
            arrived,
            gone: gone.clone(),
            unpacker: Unpacker::new(),
            packer: EmptyPacker::default(),
            last: 0,
        };
        let over = Over(gone.clone(), connection.streams.clone());
        let task = tokio::spawn(async move {
            let _over = over;
            tokio::select! {
                read = connection.read(reader) => if let Err(err) = read {
                    tracing::debug!("a SPDY connection failed: {err:#}");
                },
                () = write(writer, frames) => {}
            }
        });
        Self {
            arrivals,
            out,
            gone,
            task,
        }
    }

    /// The next stream that the client opens; `None` when it has left.
    pub(in super::super) async fn accept(&mut self) -> Option<Stream> {
        self.arrivals.recv().await
    }

    /// Cancelled when the client has left.
    pub(in super::super) fn gone(&self) -> CancellationToken {
        self.gone.clone()
    }

    /// Ends the connection once the client has taken in all that was sent: it
    /// leaves by itself then, or is told to after a while.
    pub(in super::super) async fn close(mut self) {
        self.arrivals.close();
        if tokio::time::timeout(GOODBYE, &mut self.task).await.is_err() {
            let _ = self.out.try_send(frame::goaway(0));
            let _ = tokio::time::timeout(Duration::from_millis(100), &mut self.task).await;
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Ends all streams of a connection that has ended, however it did.
struct Over(CancellationToken, Arc<Streams>);

impl Drop for Over {
    fn drop(&mut self) {
        // In this order: who reads the end of a stream may ask why it came.
        self.0.cancel();
        self.1.lock().clear();
    }
}

/// Sends frames as they come; those that wait go together.
async fn write<W: Sink<Bytes> + Unpin>(mut writer: W, mut frames: mpsc::Receiver<Bytes>) {
    while let Some(mut next) = frames.recv().await {
        loop {
            if writer.feed(next).await.is_err() {
                return;
            }
            match frames.try_recv() {
                Ok(more) => next = more,
                Err(_) => break,
            }
        }
        if writer.flush().await.is_err() {
            return;
        }
    }
}

/// The reading side of a connection.
struct Connection {
    streams: Arc<Streams>,
    out: mpsc::Sender<Bytes>,
    arrived: mpsc::Sender<Stream>,
    gone: CancellationToken,
    unpacker: Unpacker,
    packer: EmptyPacker,
    last: u32,
}

impl Connection {
    async fn read(&mut self, reader: impl AsyncRead + Unpin) -> anyhow::Result<()> {
        let mut reader = tokio::io::BufReader::with_capacity(PIECE, reader);
        while let Some(frame) = frame::read(&mut reader).await? {
            match frame {
                Frame::Data { id, fin, len } => self.data(&mut reader, id, fin, len).await?,
                Frame::SynStream { id, fin, block } => self.open(id, fin, &block).await?,
                // All blocks of a connection are one compressed text.
                Frame::MoreHeaders { block } => drop(self.unpacker.unpack(&block)?),
                Frame::RstStream { id } => {
                    if let Some(open) = self.streams.lock().remove(&id) {
                        open.gone.cancel();
                    }
                }
                // Even ones would answer pings of ours.
                Frame::Ping { id } if id % 2 == 1 => self.send(frame::ping(id)).await?,
                Frame::Ping { .. } | Frame::GoAway | Frame::Other => {}
            }
        }
        Ok(())
    }

    async fn send(&self, frame: Bytes) -> anyhow::Result<()> {
        self.out.send(frame).await.context("the client has left")
    }

    async fn data(
        &self,
        reader: &mut (impl AsyncRead + Unpin),
        id: u32,
        fin: bool,
        mut len: usize,
    ) -> anyhow::Result<()> {
        let queue = self.streams.lock().get(&id).and_then(|s| s.data.clone());
        while len > 0 {
            let mut piece = BytesMut::with_capacity(len.min(PIECE));
            let read = reader
                .take(len.min(PIECE) as u64)
                .read_buf(&mut piece)
                .await?;
            ensure!(read > 0, "the connection ended within a frame");
            len -= read;
            if let Some(queue) = &queue {
                // Who is not interested in the rest has dropped the other end.
                let _ = queue.send(piece.freeze()).await;
            }
        }
        if fin {
            let mut streams = self.streams.lock();
            if let Some(open) = streams.get_mut(&id) {
                open.data = None;
            }
            Streams::tidy(&mut streams, id);
        }
        Ok(())
    }

    async fn open(&mut self, id: u32, fin: bool, block: &[u8]) -> anyhow::Result<()> {
        let headers = self.unpacker.unpack(block)?;
        if id.is_multiple_of(2) || id <= self.last {
            return self.send(frame::rst_stream(id, Reset::Protocol)).await;
        }
        self.last = id;
        if self.arrived.is_closed() || self.streams.lock().len() >= MOST_STREAMS {
            return self.send(frame::rst_stream(id, Reset::Refused)).await;
        }
        let (sender, data) = mpsc::channel(QUEUE);
        let gone = self.gone.child_token();
        let open = Open {
            data: (!fin).then_some(sender),
            writing: true,
            gone: gone.clone(),
        };
        self.streams.lock().insert(id, open);
        let reply = frame::syn_reply(id, &self.packer.pack());
        self.send(reply).await?;
        let stream = Stream {
            id,
            headers,
            reader: Reader { data },
            writer: Writer {
                id,
                out: self.out.clone(),
                streams: self.streams.clone(),
                gone,
                open: true,
            },
        };
        // A server that has seen enough has closed its end; the stream resets itself.
        let _ = self.arrived.send(stream).await;
        Ok(())
    }
}
