//! SCTP by raw sockets, for kernels that have none of its own: whole packets with one chunk (RFC 9260), built and read
//! here, the checksum included.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::libc;
use nix::sys::socket::{SockaddrStorage, bind};

use crate::place::{PATIENCE, Place};

#[path = "../../agent/tests/packets/crc.rs"]
mod crc;

/// The common header: two ports, a tag, a checksum.
const HEADER: usize = 12;

/// A chunk that ends an association (RFC 9260, 3.3.7).
pub const ABORT: [u8; 4] = [6, 0, 0, 4];

/// A chunk that begins an association, whose packets to who sends it bear this tag (RFC 9260, 3.3.2).
pub fn init(tag: u32) -> Vec<u8> {
    beginning(1, tag, &[])
}

/// The answer to it, with a cookie (RFC 9260, 3.3.3).
pub fn init_ack(tag: u32) -> Vec<u8> {
    let mut cookie = vec![0, 7, 0, 24];
    cookie.extend((0..20).map(|byte| byte * 11));
    beginning(2, tag, &cookie)
}

fn beginning(kind: u8, tag: u32, parameters: &[u8]) -> Vec<u8> {
    const WINDOW: u32 = 106_496;
    const STREAMS: u16 = 10;
    let mut chunk = vec![kind, 0, 0, 20 + parameters.len() as u8];
    chunk.extend(tag.to_be_bytes());
    chunk.extend(WINDOW.to_be_bytes());
    chunk.extend([STREAMS.to_be_bytes(); 2].as_flattened());
    // The first number may be any.
    chunk.extend((!tag).to_be_bytes());
    chunk.extend(parameters);
    chunk
}

/// A packet with one chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// The sender's port.
    pub source_port: u16,
    /// The receiver's port.
    pub destination_port: u16,
    /// What the receiver has asked for in its first chunk; 0 in the first packet of all.
    pub tag: u32,
    /// The chunk.
    pub chunk: Vec<u8>,
}

impl Packet {
    /// As it is sent, with its checksum.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.source_port.to_be_bytes().to_vec();
        bytes.extend(self.destination_port.to_be_bytes());
        bytes.extend(self.tag.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(&self.chunk);
        let checksum = crc::crc32c(&bytes);
        bytes[8..HEADER].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads what a raw socket of a family got.
    pub fn received(bytes: &[u8], v4: bool) -> Result<Self> {
        // Of IPv4 the kernel gives the network header, too.
        let before = match bytes.first() {
            Some(first) if v4 => usize::from(first & 15) * 4,
            _ => 0,
        };
        Self::read(bytes.get(before..).context("a cut packet")?)
    }

    /// Reads one; a wrong checksum is an error.
    fn read(bytes: &[u8]) -> Result<Self> {
        let header = bytes.first_chunk::<HEADER>().context("no SCTP packet")?;
        let [a, b, c, d, tag @ .., _, _, _, _] = *header;
        let packet = Self {
            source_port: u16::from_be_bytes([a, b]),
            destination_port: u16::from_be_bytes([c, d]),
            tag: u32::from_be_bytes(tag),
            chunk: bytes[HEADER..].to_vec(),
        };
        let wanted = packet.bytes();
        ensure!(
            bytes == wanted,
            "the checksum of {packet:?} is {:x?}, not {:x?}",
            &bytes[8..HEADER],
            &wanted[8..HEADER]
        );
        Ok(packet)
    }
}

/// Opens a raw socket at an address where the caller is. It sends and receives as one for datagrams does, and gets all
/// SCTP packets to the address.
pub fn raw(at: IpAddr) -> nix::Result<UdpSocket> {
    let family = if at.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: the call takes numbers alone.
    let socket = unsafe { libc::socket(family, kind, libc::IPPROTO_SCTP) };
    let socket = nix::errno::Errno::result(socket)?;
    // SAFETY: the descriptor was opened just above, and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let at = SockaddrStorage::from(SocketAddr::new(at, 0));
    bind(socket.as_raw_fd(), &at)?;
    Ok(socket.into())
}

/// One end of associations: it gets all SCTP packets to an address of a place, whatever their port.
pub struct End {
    /// Its address.
    pub at: IpAddr,
    name: String,
    socket: UdpSocket,
}

impl End {
    /// Opens one at an address of this place.
    pub fn open(place: &Place, at: IpAddr) -> Result<Self> {
        let opened = place.run(|| raw(at))?;
        let socket = opened.with_context(|| format!("{}: no raw socket at {at}", place.name))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Self {
            at,
            name: place.name.clone(),
            socket,
        })
    }

    /// Sends a packet that is answered by an error, and gives its kind; `None` if a packet answers. What is dropped
    /// is waited for this long.
    pub fn refusal(
        &self,
        to: IpAddr,
        packet: &Packet,
        patience: Duration,
    ) -> Result<Option<ErrorKind>> {
        // A socket that is connected hears of errors.
        self.socket
            .connect((to, 0))
            .with_context(|| format!("{}: could not connect to {to}", self.name))?;
        self.socket.set_read_timeout(Some(patience))?;
        self.send(to, packet)?;
        let outcome = self.socket.recv(&mut [0; 2048]);
        Ok(outcome.err().map(|error| error.kind()))
    }

    /// Sends a packet.
    pub fn send(&self, to: IpAddr, packet: &Packet) -> Result<()> {
        let sent = self.socket.send_to(&packet.bytes(), (to, 0));
        sent.with_context(|| format!("{}: could not send to {to}", self.name))?;
        Ok(())
    }

    /// The next packet, and the address that it comes from.
    pub fn receive(&self) -> Result<(IpAddr, Packet)> {
        let mut buffer = [0; 2048];
        let received = self.socket.recv_from(&mut buffer);
        let (length, from) =
            received.with_context(|| format!("{}: no SCTP packet came", self.name))?;
        let packet = Packet::received(&buffer[..length], self.at.is_ipv4());
        let packet = packet.with_context(|| self.name.clone())?;
        Ok((from.ip(), packet))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_changed_on_the_way_is_noticed() {
        let packet = Packet {
            source_port: 4000,
            destination_port: 80,
            tag: 7,
            chunk: init_ack(9),
        };
        let bytes = packet.bytes();
        assert_eq!(Packet::read(&bytes).unwrap(), packet);
        assert_eq!(usize::from(packet.chunk[3]), packet.chunk.len());
        for at in 0..bytes.len() {
            let mut other = bytes.clone();
            other[at] ^= 0x10;
            assert!(Packet::read(&other).is_err(), "byte {at}");
        }
        assert!(Packet::read(&bytes[..11]).is_err());
    }
}
