//! A small eBPF program around a measured one: it writes the frame anew and then jumps into the other (a tail call),
//! so that the kernel's own loop can run the other again and again on the frame as it came.
//!
//! It is put together here, instruction by instruction: no compiler is needed, and nothing of it is in the measured
//! program. The number of the flow goes into the sender's address and port; words that nobody reads (IP's number, TCP's
//! sequence and acknowledgement, a datagram's first words) take the complement, so that checksums stay right.

use anyhow::{Context, Result};

use super::kernel::{Kind, Map, Program};

/// Which flow a run is of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pick {
    /// Number 0.
    First,
    /// Any below a power of two.
    Below(u32),
    /// The next one, from this number on.
    Next(u64),
    /// Any below a power of two, or the next one.
    Half(u32, u64),
}

/// Where a flow's number goes.
#[derive(Clone, Copy, Debug)]
pub struct Vary {
    /// Whether the frame is of IPv6.
    pub six: bool,
    /// How many of its low bits go into the last two bytes of the sender's address, the lowest eight into the first of
    /// them; the others go into a port.
    pub address_bits: u8,
    /// Whether that is the receiver's port, not the sender's.
    pub receiver: bool,
    /// The port of flow 0.
    pub port: u16,
    /// Where in the segment two words are that take the complements of address and port.
    pub spare: [i16; 2],
}

impl Vary {
    /// Where the last two bytes of the sender's address are.
    fn sender(self) -> i16 {
        if self.six { 36 } else { 28 }
    }

    /// Where the segment begins.
    fn segment(self) -> i16 {
        if self.six { 54 } else { 34 }
    }

    /// Where the port is that takes a part of the number.
    fn port_place(self) -> i16 {
        self.segment() + if self.receiver { 2 } else { 0 }
    }

    fn spare(self, which: usize) -> i16 {
        self.segment() + self.spare[which]
    }

    /// Whether the byte at this place is written for each flow, or is a checksum's.
    pub fn writes(self, place: usize) -> bool {
        let number = if self.six { self.sender() } else { NUMBER };
        let ports = [self.port_place(), self.spare(0), self.spare(1)];
        let mut words = [self.sender(), number].into_iter().chain(ports);
        words.any(|word| place == word as usize || place == word as usize + 1)
    }
}

/// Where IPv4's number is.
const NUMBER: i16 = 18;

const MAP_LOOKUP: i32 = 1;
const PRANDOM: i32 = 7;
const TAIL_CALL: i32 = 12;

/// An instruction, as in linux/bpf.h.
fn op(code: u8, to: u8, from: u8, offset: i16, value: i32) -> u64 {
    u64::from(code)
        | u64::from(to) << 8
        | u64::from(from) << 12
        | u64::from(offset as u16) << 16
        | u64::from(value as u32) << 32
}

/// The address of a map.
fn map(to: u8, map: &Map) -> [u64; 2] {
    [op(0x18, to, 1, 0, map.fd()), 0]
}

/// The wrapper, with what it needs.
pub struct Wrapped {
    /// What is run.
    pub program: Program,
    _targets: Map,
    _counter: Map,
}

/// Wraps `target` for this frame.
pub fn wrap(
    target: &Program,
    kind: Kind,
    frame: &[u8],
    pick: Pick,
    vary: Option<Vary>,
) -> Result<Wrapped> {
    let first = match pick {
        Pick::Next(first) | Pick::Half(_, first) => first,
        Pick::First | Pick::Below(_) => 0,
    };
    let counter = Map::array(8)?;
    counter.set(&first.to_ne_bytes())?;
    // The kernel compares the kinds of programs that are in a table with the one that jumps.
    let mut refused = None;
    for attach_type in kind.attach_types() {
        let targets = Map::programs()?;
        let code = instructions(kind, frame, pick, vary, &targets, &counter);
        let program = Program::load(kind, &code, *attach_type)?;
        match targets.set(&target.fd().to_ne_bytes()) {
            Ok(()) => {
                return Ok(Wrapped {
                    program,
                    _targets: targets,
                    _counter: counter,
                });
            }
            Err(error) => refused = Some(error),
        }
    }
    match refused {
        Some(error) => Err(error).context("the program can't be jumped into"),
        None => anyhow::bail!("this kind of program can't be wrapped"),
    }
}

fn instructions(
    kind: Kind,
    frame: &[u8],
    pick: Pick,
    vary: Option<Vary>,
    targets: &Map,
    counter: &Map,
) -> Vec<u64> {
    let mut code = vec![op(0xbf, 6, 1, 0, 0), op(0xb7, 7, 0, 0, 0)];
    if matches!(pick, Pick::Next(_) | Pick::Half(..)) {
        code.extend([
            op(0x62, 10, 0, -4, 0),
            op(0xbf, 2, 10, 0, 0),
            op(0x07, 2, 0, 0, -4),
        ]);
        code.extend(map(1, counter));
        code.extend([
            op(0x85, 0, 0, 0, MAP_LOOKUP),
            // There is an entry 0, but the kernel wants to see that it was looked at.
            op(0x55, 0, 0, 2, 0),
            op(0xb7, 0, 0, 0, 0),
            op(0x95, 0, 0, 0, 0),
            op(0x79, 7, 0, 0, 0),
            op(0xbf, 1, 7, 0, 0),
            op(0x07, 1, 0, 0, 1),
            op(0x7b, 0, 1, 0, 0),
        ]);
    }
    match pick {
        Pick::Below(end) => code.extend([
            op(0x85, 0, 0, 0, PRANDOM),
            op(0xbf, 7, 0, 0, 0),
            op(0x57, 7, 0, 0, end as i32 - 1),
        ]),
        Pick::Half(end, _) => code.extend([
            op(0x85, 0, 0, 0, PRANDOM),
            // One bit decides, others are the number.
            op(0x45, 0, 0, 2, 1 << 30),
            op(0xbf, 7, 0, 0, 0),
            op(0x57, 7, 0, 0, end as i32 - 1),
        ]),
        Pick::First | Pick::Next(_) => {}
    }
    let (data, end) = match kind {
        Kind::Xdp => (0, 4),
        Kind::Classifier => (76, 80),
    };
    code.extend([
        op(0x61, 2, 6, data, 0),
        op(0x61, 3, 6, end, 0),
        op(0xbf, 4, 2, 0, 0),
        op(0x07, 4, 0, 0, frame.len() as i32),
        // A frame that has become shorter is not measured.
        op(0xbd, 4, 3, 2, 0),
        op(0xb7, 0, 0, 0, 0),
        op(0x95, 0, 0, 0, 0),
    ]);
    for (place, bytes) in frame.chunks(4).enumerate() {
        let at = place as i16 * 4;
        if let Ok(word) = <[u8; 4]>::try_from(bytes) {
            code.push(op(0x62, 2, 0, at, i32::from_le_bytes(word)));
        } else {
            code.extend(
                (at..)
                    .zip(bytes)
                    .map(|(at, byte)| op(0x72, 2, 0, at, i32::from(*byte))),
            );
        }
    }
    if let Some(vary) = vary {
        let shift = i32::from(vary.address_bits.min(16));
        if shift > 0 {
            code.extend([
                op(0xbf, 5, 7, 0, 0),
                op(0x57, 5, 0, 0, (1 << shift) - 1),
                op(0x6b, 2, 5, vary.sender(), 0),
                op(0xa7, 5, 0, 0, 0xffff),
                op(0x6b, 2, 5, vary.spare(0), 0),
            ]);
            if !vary.six {
                code.push(op(0x6b, 2, 5, NUMBER, 0));
            }
        }
        code.extend([
            op(0xbf, 5, 7, 0, 0),
            op(0x77, 5, 0, 0, shift),
            op(0x07, 5, 0, 0, i32::from(vary.port)),
            op(0x57, 5, 0, 0, 0xffff),
            op(0xdc, 5, 0, 0, 16),
            op(0x6b, 2, 5, vary.port_place(), 0),
            op(0xa7, 5, 0, 0, 0xffff),
            op(0x6b, 2, 5, vary.spare(1), 0),
        ]);
    }
    code.push(op(0xbf, 1, 6, 0, 0));
    code.extend(map(2, targets));
    code.extend([
        op(0xb7, 3, 0, 0, 0),
        op(0x85, 0, 0, 0, TAIL_CALL),
        op(0xb7, 0, 0, 0, 0),
        op(0x95, 0, 0, 0, 0),
    ]);
    code
}
