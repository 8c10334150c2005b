//! SPDY/3 header blocks: name and value pairs, compressed over a whole connection.

use anyhow::{bail, ensure};
use zlib_rs::{Inflate, InflateError, InflateFlush, Status};

use super::dictionary;

/// The longest block, unpacked: a few short names and values is what clients send.
const LONGEST_BLOCK: usize = 16 * 1024;
/// A window of 32 KiB, the largest that a client may use.
const WINDOW_BITS: u8 = 15;

/// A stream's headers; names are in lower case.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(in super::super) struct Headers(Vec<(String, String)>);

impl Headers {
    /// A header's value.
    pub(in super::super) fn get(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    }

    /// Reads an unpacked block.
    fn parse(mut block: &[u8]) -> anyhow::Result<Self> {
        let count = number(&mut block)?;
        let mut pairs = Vec::new();
        for _ in 0..count {
            let name = text(&mut block)?.to_ascii_lowercase();
            let value = text(&mut block)?;
            // Several values of one name are divided by NUL; one is all that is asked for.
            let value = value.split('\0').next().unwrap_or_default().to_owned();
            pairs.push((name, value));
        }
        ensure!(block.is_empty(), "a header block is longer than it says");
        Ok(Self(pairs))
    }
}

fn number(block: &mut &[u8]) -> anyhow::Result<u32> {
    let Some((number, rest)) = block.split_first_chunk::<4>() else {
        bail!("a header block is cut off");
    };
    *block = rest;
    Ok(u32::from_be_bytes(*number))
}

fn text(block: &mut &[u8]) -> anyhow::Result<String> {
    let len = number(block)? as usize;
    let Some((text, rest)) = block.split_at_checked(len) else {
        bail!("a header block is cut off");
    };
    *block = rest;
    Ok(String::from_utf8_lossy(text).into_owned())
}

/// Unpacks the header blocks of a peer, which build on each other.
pub(super) struct Unpacker(Inflate);

impl Unpacker {
    pub(super) fn new() -> Self {
        Self(Inflate::new(true, WINDOW_BITS))
    }

    /// The next block. After an error the connection is of no use.
    pub(super) fn unpack(&mut self, mut packed: &[u8]) -> anyhow::Result<Headers> {
        let mut block = Vec::new();
        let mut piece = [0; 2048];
        loop {
            let (took, gave) = (self.0.total_in(), self.0.total_out());
            let done = self
                .0
                .decompress(packed, &mut piece, InflateFlush::SyncFlush);
            packed = &packed[(self.0.total_in() - took) as usize..];
            block.extend_from_slice(&piece[..(self.0.total_out() - gave) as usize]);
            ensure!(block.len() <= LONGEST_BLOCK, "a header block is too long");
            match done {
                Ok(Status::StreamEnd) => bail!("a client ended its header compression"),
                // No input, or no use for more: a full piece may hide more output.
                Ok(_) if self.0.total_out() - gave < piece.len() as u64 => break,
                Ok(_) => {}
                Err(InflateError::NeedDict {
                    dict_id: dictionary::ID,
                }) => {
                    if self.0.set_dictionary(&dictionary::bytes()).is_err() {
                        bail!("the dictionary of header blocks is refused");
                    }
                }
                Err(err) => bail!("a header block can't be unpacked: {}", err.as_str()),
            }
        }
        ensure!(packed.is_empty(), "a header block can't be unpacked");
        Headers::parse(&block)
    }
}

/// A stored block of no bytes.
const FLUSH: [u8; 5] = [0, 0, 0, 0xff, 0xff];

/// Packs header blocks without headers: all that a server's replies need here.
#[derive(Default)]
pub(super) struct EmptyPacker {
    begun: bool,
}

impl EmptyPacker {
    /// The next block: stored, not compressed, which every decompressor takes.
    pub(super) fn pack(&mut self) -> Vec<u8> {
        let mut packed = Vec::new();
        if !self.begun {
            self.begun = true;
            // zlib's header: deflate with a window of 32 KiB, and a dictionary.
            packed.extend_from_slice(&[0x78, 0xbb]);
            packed.extend_from_slice(&dictionary::ID.to_be_bytes());
        }
        let block = 0u32.to_be_bytes();
        let len = block.len() as u16;
        packed.push(0);
        packed.extend_from_slice(&len.to_le_bytes());
        packed.extend_from_slice(&(!len).to_le_bytes());
        packed.extend_from_slice(&block);
        // An empty block is zlib's flush: decompressors that give out whole
        // windows, as Go's does, wait for it before they give this block out.
        packed.extend_from_slice(&FLUSH);
        packed
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use zlib_rs::{Deflate, DeflateFlush};

    use super::*;

    fn pack(deflate: &mut Deflate, pairs: &[(&str, &str)]) -> Vec<u8> {
        let mut block = (pairs.len() as u32).to_be_bytes().to_vec();
        for text in pairs.iter().flat_map(|(name, value)| [name, value]) {
            block.extend_from_slice(&(text.len() as u32).to_be_bytes());
            block.extend_from_slice(text.as_bytes());
        }
        let mut packed = vec![0; block.len() + 100];
        let before = deflate.total_out();
        deflate
            .compress(&block, &mut packed, DeflateFlush::SyncFlush)
            .unwrap();
        packed.truncate((deflate.total_out() - before) as usize);
        packed
    }

    fn deflate() -> Deflate {
        let mut deflate = Deflate::new(6, true, WINDOW_BITS);
        let id = deflate.set_dictionary(&dictionary::bytes()).unwrap();
        assert_eq!(id, dictionary::ID);
        deflate
    }

    #[test]
    fn blocks_build_on_each_other() {
        let (mut deflate, mut unpacker) = (deflate(), Unpacker::new());
        let long = "x".repeat(5000);
        for round in 0..50 {
            let id = round.to_string();
            let pairs = [
                ("streamtype", "stdout"),
                ("requestid", id.as_str()),
                ("long", long.as_str()),
            ];
            let headers = unpacker.unpack(&pack(&mut deflate, &pairs)).unwrap();
            assert_eq!(headers.get("streamtype"), Some("stdout"));
            assert_eq!(headers.get("requestid"), Some(id.as_str()));
            assert_eq!(headers.get("long"), Some(long.as_str()));
            assert_eq!(headers.get("port"), None);
        }
    }

    #[test]
    fn the_first_of_several_values_counts_and_names_have_no_case() {
        let packed = pack(&mut deflate(), &[("StreamType", "data\0error")]);
        let headers = Unpacker::new().unpack(&packed).unwrap();
        assert_eq!(headers.get("streamtype"), Some("data"));
    }

    #[test]
    fn bombs_and_garbage_are_refused() {
        let bomb = "x".repeat(LONGEST_BLOCK);
        let mut packed = pack(&mut deflate(), &[("bomb", &bomb)]);
        assert!(packed.len() < 1000);
        let err = Unpacker::new().unpack(&packed).unwrap_err();
        assert!(err.to_string().contains("too long"), "{err}");

        packed = pack(&mut deflate(), &[("a", "b")]);
        for at in 0..packed.len() {
            let mut broken = packed.clone();
            broken[at] ^= 0x55;
            // Whatever is made of it, it is not taken for something else in silence.
            if let Ok(headers) = Unpacker::new().unpack(&broken) {
                assert_ne!(headers.get("a"), Some("b"), "byte {at}");
            }
        }
        for cut in 0..packed.len() - 5 {
            Unpacker::new().unpack(&packed[..cut]).unwrap_err();
        }
    }

    #[test]
    fn a_decompressor_takes_our_blocks() {
        let (mut packer, mut unpacker) = (EmptyPacker::default(), Unpacker::new());
        for _ in 0..3 {
            let packed = packer.pack();
            // As a compressor's own flush ends a block, which clients wait for.
            assert!(packed.ends_with(&FLUSH), "{packed:x?}");
            assert_eq!(unpacker.unpack(&packed).unwrap(), Headers::default());
        }
        assert!(pack(&mut deflate(), &[]).ends_with(&FLUSH));
    }
}
