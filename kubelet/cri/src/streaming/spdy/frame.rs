//! SPDY/3.1 frames: what goes over the connection, byte by byte.

use anyhow::{bail, ensure};
use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

/// The longest control frame: it is in memory at once.
const LONGEST_CONTROL: usize = 64 * 1024;
const VERSION: u16 = 3;

/// The sender sends no more on a stream.
pub(super) const FIN: u8 = 1;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;

/// Why a stream is reset.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub(super) enum Reset {
    Protocol = 1,
    Refused = 3,
    Cancel = 5,
}

/// What a peer sends. The bytes of a data frame are still to be read.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Frame {
    Data {
        id: u32,
        fin: bool,
        len: usize,
    },
    SynStream {
        id: u32,
        fin: bool,
        block: Bytes,
    },
    /// Headers of a stream that is there already: a reply, or more of them.
    MoreHeaders {
        block: Bytes,
    },
    RstStream {
        id: u32,
    },
    Ping {
        id: u32,
    },
    GoAway,
    /// Settings and flow control, which clients of Kubernetes don't heed.
    Other,
}

/// Reads a frame; `None` at the connection's end.
pub(super) async fn read(from: &mut (impl AsyncRead + Unpin)) -> anyhow::Result<Option<Frame>> {
    let mut head = [0; 8];
    match from.read_exact(&mut head).await {
        Ok(_) => {}
        Err(err) if err.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(err) => return Err(err.into()),
    }
    let [a, b, c, d, flags, ..] = head;
    let len = u32::from_be_bytes([0, head[5], head[6], head[7]]) as usize;
    let fin = flags & FIN != 0;
    if a & 0x80 == 0 {
        let id = u32::from_be_bytes([a, b, c, d]);
        return Ok(Some(Frame::Data { id, fin, len }));
    }
    let version = u16::from_be_bytes([a & 0x7f, b]);
    ensure!(
        version == VERSION,
        "a client speaks version {version} of SPDY"
    );
    ensure!(len <= LONGEST_CONTROL, "a control frame is too long");
    let mut body = vec![0; len];
    from.read_exact(&mut body).await?;
    let body = Bytes::from(body);
    let number = |at: usize| match body.get(at..at + 4) {
        Some(&[a, b, c, d]) => Ok(u32::from_be_bytes([a, b, c, d])),
        _ => bail!("a control frame is too short"),
    };
    let id = |at| Ok::<_, anyhow::Error>(number(at)? & 0x7fff_ffff);
    let block = |at: usize| {
        ensure!(body.len() >= at, "a control frame is too short");
        Ok(body.slice(at..))
    };
    Ok(Some(match u16::from_be_bytes([c, d]) {
        // Id, the stream that it belongs to, priority, slot.
        SYN_STREAM => Frame::SynStream {
            id: id(0)?,
            fin,
            block: block(10)?,
        },
        SYN_REPLY | HEADERS => Frame::MoreHeaders { block: block(4)? },
        RST_STREAM => Frame::RstStream { id: id(0)? },
        PING => Frame::Ping { id: number(0)? },
        GOAWAY => Frame::GoAway,
        _ => Frame::Other,
    }))
}

fn control(kind: u16, numbers: &[u32], block: &[u8]) -> Bytes {
    let len = numbers.len() * 4 + block.len();
    let mut out = BytesMut::with_capacity(8 + len);
    out.put_u16(0x8000 | VERSION);
    out.put_u16(kind);
    out.put_u32(len as u32);
    for number in numbers {
        out.put_u32(*number);
    }
    out.put_slice(block);
    out.freeze()
}

/// The answer to a client's new stream.
pub(super) fn syn_reply(id: u32, block: &[u8]) -> Bytes {
    control(SYN_REPLY, &[id], block)
}

/// Ends a stream at once.
pub(super) fn rst_stream(id: u32, why: Reset) -> Bytes {
    control(RST_STREAM, &[id, why as u32], &[])
}

/// The answer to a client's ping.
pub(super) fn ping(id: u32) -> Bytes {
    control(PING, &[id], &[])
}

/// No more streams are taken; all is well.
pub(super) fn goaway(last: u32) -> Bytes {
    control(GOAWAY, &[last, 0], &[])
}

/// Bytes of a stream.
pub(super) fn data(id: u32, fin: bool, bytes: &[u8]) -> Bytes {
    debug_assert!(bytes.len() < 1 << 24, "a frame's length has 24 bits");
    let mut out = BytesMut::with_capacity(8 + bytes.len());
    out.put_u32(id & 0x7fff_ffff);
    let flags = if fin { u32::from(FIN) << 24 } else { 0 };
    out.put_u32(flags | bytes.len() as u32);
    out.put_slice(bytes);
    out.freeze()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    async fn one(mut bytes: &[u8]) -> anyhow::Result<Option<Frame>> {
        read(&mut bytes).await
    }

    #[tokio::test]
    async fn frames_are_read_as_they_are_written() {
        assert_eq!(
            one(&data(5, true, b"abc")).await.unwrap(),
            Some(Frame::Data {
                id: 5,
                fin: true,
                len: 3
            })
        );
        assert_eq!(one(&ping(7)).await.unwrap(), Some(Frame::Ping { id: 7 }));
        assert_eq!(
            one(&rst_stream(9, Reset::Cancel)).await.unwrap(),
            Some(Frame::RstStream { id: 9 })
        );
        assert_eq!(one(&goaway(9)).await.unwrap(), Some(Frame::GoAway));
        assert_eq!(
            one(&syn_reply(9, b"xy")).await.unwrap(),
            Some(Frame::MoreHeaders {
                block: Bytes::from_static(b"xy")
            })
        );
        assert_eq!(one(b"").await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_new_stream_is_read() {
        // Version 3, type 1, FIN, 12 bytes: id 3, none associated, priority, slot, block.
        let wire = b"\x80\x03\x00\x01\x01\x00\x00\x0c\x00\x00\x00\x03\0\0\0\0\0\0xy";
        assert_eq!(
            one(wire).await.unwrap(),
            Some(Frame::SynStream {
                id: 3,
                fin: true,
                block: Bytes::from_static(b"xy")
            })
        );
    }

    #[tokio::test]
    async fn broken_frames_are_refused() {
        // Another version, a body that is cut off, one too short, one too long.
        for wire in [
            &b"\x80\x02\x00\x06\x00\x00\x00\x04\x00\x00\x00\x01"[..],
            b"\x80\x03\x00\x06\x00\x00\x00\x04\x00\x00",
            b"\x80\x03\x00\x06\x00\x00\x00\x02\x00\x00",
            b"\x80\x03\x00\x01\x00\x00\x00\x04\x00\x00\x00\x01",
            b"\x80\x03\x00\x01\x00\xff\xff\xff",
        ] {
            one(wire).await.unwrap_err();
        }
    }
}
