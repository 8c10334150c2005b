//! A small SPDY/3.1 client, written apart from the server that it tests.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use xebec_cri::streaming::spdy::dictionary;
use zlib_rs::{Deflate, DeflateFlush, Inflate, InflateFlush};

/// What a server sends.
#[derive(Debug, Eq, PartialEq)]
pub enum Heard {
    Reply(u32),
    Data(u32, Vec<u8>, bool),
    Reset(u32),
    Ping(u32),
    GoAway,
    End,
}

/// A client's connection.
pub struct Spdy<T> {
    io: T,
    deflate: Deflate,
    inflate: Inflate,
    next: u32,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Spdy<T> {
    pub fn new(io: T) -> Self {
        let mut deflate = Deflate::new(6, true, 15);
        deflate.set_dictionary(&dictionary::bytes()).unwrap();
        Self {
            io,
            deflate,
            inflate: Inflate::new(true, 15),
            next: 1,
        }
    }

    async fn control(&mut self, kind: u8, body: &[u8]) {
        let mut frame = vec![0x80, 3, 0, kind, 0];
        frame.extend_from_slice(&(body.len() as u32).to_be_bytes()[1..]);
        frame.extend_from_slice(body);
        self.io.write_all(&frame).await.unwrap();
        self.io.flush().await.unwrap();
    }

    /// Opens a stream; its id.
    pub async fn open(&mut self, headers: &[(&str, &str)]) -> u32 {
        let mut block = (headers.len() as u32).to_be_bytes().to_vec();
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            block.extend_from_slice(&(text.len() as u32).to_be_bytes());
            block.extend_from_slice(text.as_bytes());
        }
        let mut packed = vec![0; 4096];
        let before = self.deflate.total_out();
        self.deflate
            .compress(&block, &mut packed, DeflateFlush::SyncFlush)
            .unwrap();
        packed.truncate((self.deflate.total_out() - before) as usize);
        let id = self.next;
        self.next += 2;
        let mut body = id.to_be_bytes().to_vec();
        body.extend_from_slice(&[0; 6]);
        body.extend_from_slice(&packed);
        self.control(1, &body).await;
        id
    }

    pub async fn data(&mut self, id: u32, data: &[u8], fin: bool) {
        let mut frame = id.to_be_bytes().to_vec();
        frame.push(u8::from(fin));
        frame.extend_from_slice(&(data.len() as u32).to_be_bytes()[1..]);
        frame.extend_from_slice(data);
        self.io.write_all(&frame).await.unwrap();
        self.io.flush().await.unwrap();
    }

    pub async fn reset(&mut self, id: u32) {
        let mut body = id.to_be_bytes().to_vec();
        body.extend_from_slice(&5u32.to_be_bytes());
        self.control(3, &body).await;
    }

    pub async fn ping(&mut self, id: u32) {
        self.control(6, &id.to_be_bytes()).await;
    }

    /// The next frame.
    pub async fn hear(&mut self) -> Heard {
        let mut head = [0; 8];
        if self.io.read_exact(&mut head).await.is_err() {
            return Heard::End;
        }
        let len = u32::from_be_bytes([0, head[5], head[6], head[7]]) as usize;
        let mut body = vec![0; len];
        self.io.read_exact(&mut body).await.unwrap();
        if head[0] & 0x80 == 0 {
            let id = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
            return Heard::Data(id, body, head[4] & 1 != 0);
        }
        assert_eq!(head[..2], [0x80, 3]);
        let id = u32::from_be_bytes([body[0], body[1], body[2], body[3]]);
        match head[3] {
            2 => {
                assert_eq!(self.unpack(&body[4..]), [0; 4], "a reply has no headers");
                Heard::Reply(id)
            }
            3 => Heard::Reset(id),
            6 => Heard::Ping(id),
            7 => Heard::GoAway,
            other => panic!("the server sent a frame of type {other}"),
        }
    }

    fn unpack(&mut self, packed: &[u8]) -> Vec<u8> {
        let mut block = vec![0; 4096];
        let (took, gave) = (self.inflate.total_in(), self.inflate.total_out());
        let flush = InflateFlush::SyncFlush;
        if self.inflate.decompress(packed, &mut block, flush).is_err() {
            // Only the first block asks for the dictionary.
            self.inflate.set_dictionary(&dictionary::bytes()).unwrap();
            let rest = &packed[(self.inflate.total_in() - took) as usize..];
            self.inflate.decompress(rest, &mut block, flush).unwrap();
        }
        assert_eq!(self.inflate.total_in() - took, packed.len() as u64);
        block.truncate((self.inflate.total_out() - gave) as usize);
        block
    }
}
