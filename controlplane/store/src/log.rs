//! The on-disk format: a magic number, then records that each hold what one durable write holds.
//!
//! A record is `length: u32, crc32: u32, payload`, little endian. One record is one group commit, so a torn
//! write can only spoil the last record of the last file, and nothing in it was acknowledged.

use std::io;
use std::path::Path;

use bytes::{BufMut, Bytes, BytesMut};

use crate::{Error, Op, Revision};

const MAGIC: &[u8; 8] = b"xebec\0\x00\x01";
/// A longer record can't come from us: the API server refuses larger objects, and batches are bounded.
const LONGEST_RECORD: usize = 256 << 20;
const HEADER: usize = 8;

/// One committed transaction as the log holds it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    pub revision: Revision,
    pub ops: Vec<LoggedOp>,
}

/// A write with all that a reader needs; snapshots carry the revisions of keys, the log derives them.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum LoggedOp {
    Put {
        key: Bytes,
        value: Bytes,
    },
    Delete {
        key: Bytes,
    },
    /// In snapshots only: a key as it stands.
    State {
        key: Bytes,
        value: Bytes,
        create_revision: Revision,
        mod_revision: Revision,
    },
}

impl LoggedOp {
    /// The key that it is about.
    pub(crate) fn key(&self) -> &Bytes {
        match self {
            Self::Put { key, .. } | Self::Delete { key } | Self::State { key, .. } => key,
        }
    }
}

impl From<Op> for LoggedOp {
    fn from(op: Op) -> Self {
        match op {
            Op::Put { key, value } => Self::Put { key, value },
            Op::Delete { key } => Self::Delete { key },
        }
    }
}

/// The first bytes of every file.
pub(crate) fn header() -> &'static [u8] {
    MAGIC
}

/// Appends one record that holds these entries.
pub(crate) fn encode(entries: &[Entry], out: &mut BytesMut) {
    let start = out.len();
    out.put_bytes(0, HEADER);
    for entry in entries {
        out.put_u64_le(entry.revision);
        out.put_u32_le(entry.ops.len() as u32);
        for op in &entry.ops {
            match op {
                LoggedOp::Put { key, value } => {
                    out.put_u8(1);
                    put_bytes(out, key);
                    put_bytes(out, value);
                }
                LoggedOp::Delete { key } => {
                    out.put_u8(2);
                    put_bytes(out, key);
                }
                LoggedOp::State {
                    key,
                    value,
                    create_revision,
                    mod_revision,
                } => {
                    out.put_u8(3);
                    put_bytes(out, key);
                    put_bytes(out, value);
                    out.put_u64_le(*create_revision);
                    out.put_u64_le(*mod_revision);
                }
            }
        }
    }
    let payload = &out[start + HEADER..];
    let (length, crc) = (payload.len() as u32, crc32fast::hash(payload));
    out[start..start + 4].copy_from_slice(&length.to_le_bytes());
    out[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
}

fn put_bytes(out: &mut BytesMut, bytes: &[u8]) {
    out.put_u32_le(bytes.len() as u32);
    out.extend_from_slice(bytes);
}

/// What reading a file found.
pub(crate) struct Contents {
    pub entries: Vec<Entry>,
    /// Length of the part that can be trusted.
    pub valid: u64,
    /// There is something after it: the rest of a write that was cut off.
    pub torn: bool,
}

/// Reads a whole file. `last`: the file may end in a torn record, which was never acknowledged.
pub(crate) fn read(path: &Path, last: bool) -> Result<Contents, Error> {
    let io = |error: io::Error| Error::Io(format!("could not read {}: {error}", path.display()));
    let data = Bytes::from(std::fs::read(path).map_err(io)?);
    let damaged = |what: &str| {
        Error::Corrupt(format!(
            "{}: {what}; restore the folder from a backup",
            path.display()
        ))
    };
    if data.len() < MAGIC.len() {
        // Cut off while it was made: nothing was ever written to it.
        return if last && MAGIC.starts_with(&data) {
            Ok(Contents {
                entries: Vec::new(),
                valid: 0,
                torn: !data.is_empty(),
            })
        } else {
            Err(damaged("it has no header"))
        };
    }
    if data[..MAGIC.len()] != MAGIC[..] {
        return Err(damaged("it is no store file of this version"));
    }
    let mut at = MAGIC.len();
    let mut entries = Vec::new();
    while at < data.len() {
        match record(&data, at) {
            Some(payload) => {
                let end = at + HEADER + payload.len();
                decode(payload, &mut entries)
                    .ok_or_else(|| damaged("a record with a good checksum can't be read"))?;
                at = end;
            }
            // Records are written one at a time, each after the one before is durable: a good record
            // after a bad one means that something that was acknowledged is lost.
            None if !last => return Err(damaged("a record in its middle is damaged")),
            None if follows(&data, at + 1) => {
                return Err(damaged("a record in its middle is damaged"));
            }
            None => {
                return Ok(Contents {
                    entries,
                    valid: at as u64,
                    torn: true,
                });
            }
        }
    }
    Ok(Contents {
        entries,
        valid: at as u64,
        torn: false,
    })
}

/// The payload of the record at this offset, if it is whole and its checksum right.
fn record(data: &Bytes, at: usize) -> Option<Bytes> {
    let word = |at: usize| -> Option<u32> {
        Some(u32::from_le_bytes(data.get(at..at + 4)?.try_into().ok()?))
    };
    let (length, crc) = (word(at)? as usize, word(at + 4)?);
    // An empty payload would make runs of zeros, as a torn write may leave, look like records.
    if length == 0 || length > LONGEST_RECORD {
        return None;
    }
    let payload = data.get(at + HEADER..at + HEADER + length)?;
    (crc32fast::hash(payload) == crc).then(|| data.slice(at + HEADER..at + HEADER + length))
}

/// Whether a whole record begins anywhere from here on.
fn follows(data: &Bytes, from: usize) -> bool {
    (from..data.len().saturating_sub(HEADER)).any(|at| record(data, at).is_some())
}

fn decode(payload: Bytes, entries: &mut Vec<Entry>) -> Option<()> {
    let mut reader = Reader {
        data: payload,
        at: 0,
    };
    while reader.at < reader.data.len() {
        let revision = reader.u64()?;
        let count = reader.u32()?;
        let mut ops = Vec::new();
        for _ in 0..count {
            ops.push(match reader.u8()? {
                1 => LoggedOp::Put {
                    key: reader.bytes()?,
                    value: reader.bytes()?,
                },
                2 => LoggedOp::Delete {
                    key: reader.bytes()?,
                },
                3 => LoggedOp::State {
                    key: reader.bytes()?,
                    value: reader.bytes()?,
                    create_revision: reader.u64()?,
                    mod_revision: reader.u64()?,
                },
                _ => return None,
            });
        }
        entries.push(Entry { revision, ops });
    }
    Some(())
}

struct Reader {
    data: Bytes,
    at: usize,
}

impl Reader {
    fn take(&mut self, length: usize) -> Option<Bytes> {
        let end = self
            .at
            .checked_add(length)
            .filter(|end| *end <= self.data.len())?;
        let slice = self.data.slice(self.at..end);
        self.at = end;
        Some(slice)
    }
    fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }
    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.as_ref().try_into().ok()?))
    }
    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.as_ref().try_into().ok()?))
    }
    fn bytes(&mut self) -> Option<Bytes> {
        let length = self.u32()? as usize;
        // A copy, so that a small value does not keep a whole file in memory.
        self.take(length)
            .map(|slice| Bytes::copy_from_slice(&slice))
    }
}
