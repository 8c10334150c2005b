//! Frames that were held: where their payload is, and their checksums.

use std::ops::Range;

use etherparse::checksum::Sum16BitWords;
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use xebec_dataplane_common::{TCP, UDP};

/// Where in a transport's header its checksum is.
const UDP_CHECKSUM: usize = 6;
const TCP_CHECKSUM: usize = 16;

/// The protocol of a frame and where its payload is; none where it is neither UDP nor TCP. A checksum that was left for a
/// device to complete (the kernel's `CHECKSUM_PARTIAL`) is completed: whoever sends bytes has no such device.
pub(super) fn finish(frame: &mut [u8]) -> Option<(u8, Range<usize>)> {
    let found = look(frame)?;
    if let Some((place, checksum)) = found.completed {
        frame.get_mut(place..place + 2)?.copy_from_slice(&checksum);
    }
    Some((found.protocol, found.payload))
}

struct Found {
    protocol: u8,
    payload: Range<usize>,
    /// Where a checksum is to be completed, and how.
    completed: Option<(usize, [u8; 2])>,
}

fn look(frame: &[u8]) -> Option<Found> {
    let start = frame.as_ptr() as usize;
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    let (protocol, header, behind, place) = match packet.transport.as_ref()? {
        TransportSlice::Udp(udp) => (UDP, udp.slice(), udp.payload(), UDP_CHECKSUM),
        TransportSlice::Tcp(tcp) => (TCP, tcp.slice(), tcp.payload(), TCP_CHECKSUM),
        _ => return None,
    };
    let length = u32::try_from(header.len()).ok()?.to_be_bytes();
    let sum = Sum16BitWords::new().add_2bytes([0, protocol]);
    let sum = sum.add_slice(&length);
    let sum = match packet.net.as_ref()? {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            sum.add_slice(&header.source())
                .add_slice(&header.destination())
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header();
            sum.add_slice(&header.source())
                .add_slice(&header.destination())
        }
        _ => return None,
    };
    // What the kernel leaves there is the sum of the addresses and the like; the sums of this crate are inverted, and in
    // this machine's order.
    let partial = (!sum.ones_complement()).to_ne_bytes();
    let field = header.get(place..place + 2)?;
    let whole = (field == partial).then(|| {
        let (before, after) = header.split_at(place);
        let sum = sum.add_slice(before).add_slice(&after[2..]);
        // In UDP over IPv4, 0 is no checksum at all (RFC 768).
        sum.to_ones_complement_with_no_zero()
    });
    let transport = header.as_ptr() as usize - start;
    let payload = behind.as_ptr() as usize - start;
    Some(Found {
        protocol,
        payload: payload..payload + behind.len(),
        completed: whole.map(|sum| (transport + place, sum.to_ne_bytes())),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::PacketBuilder;

    /// A frame of each kind, with an odd payload.
    fn frames() -> Vec<(u8, Vec<u8>)> {
        let of = || PacketBuilder::ethernet2([2; 6], [4; 6]);
        let payload = b"answer.";
        let mut all = Vec::new();
        let mut write = |protocol: u8, v6: bool| {
            let mut frame = Vec::new();
            let ip = match v6 {
                true => of().ipv6([7; 16], [9; 16], 64),
                false => of().ipv4([192, 0, 2, 1], [10, 1, 0, 9], 64),
            };
            match protocol {
                UDP => ip.udp(53, 4000).write(&mut frame, payload).unwrap(),
                _ => ip.tcp(53, 4000, 1, 100).write(&mut frame, payload).unwrap(),
            }
            all.push((protocol, frame));
        };
        for protocol in [UDP, TCP] {
            write(protocol, false);
            write(protocol, true);
        }
        all
    }

    fn place(protocol: u8, frame: &[u8]) -> usize {
        let ip = if frame[12] == 8 { 20 } else { 40 };
        let within = if protocol == UDP {
            UDP_CHECKSUM
        } else {
            TCP_CHECKSUM
        };
        14 + ip + within
    }

    #[test]
    fn what_was_left_for_a_device_is_completed() {
        for (protocol, whole) in frames() {
            let mut frame = whole.clone();
            let (found, range) = finish(&mut frame).unwrap();
            assert_eq!((found, &frame[range]), (protocol, &b"answer."[..]));
            assert_eq!(frame, whole, "what is complete stays");
            // The sum of addresses, length and protocol alone, as RFC 1071 says: the sum of all less that of the header
            // and the payload.
            let at = place(protocol, &whole);
            let transport = if frame[12] == 8 { 34 } else { 54 };
            let words = |bytes: &[u8]| {
                let mut sum: u32 = 0;
                for pair in bytes.chunks(2) {
                    sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
                }
                sum
            };
            let addresses = if frame[12] == 8 { 26..34 } else { 22..54 };
            let length = (frame.len() - transport) as u32;
            let mut sum = words(&frame[addresses]) + length + u32::from(protocol);
            while sum > 0xffff {
                sum = (sum & 0xffff) + (sum >> 16);
            }
            frame[at..at + 2].copy_from_slice(&(sum as u16).to_be_bytes());
            assert_ne!(frame, whole);
            assert!(finish(&mut frame).is_some());
            assert_eq!(frame, whole);
            // What was broken on its way stays so.
            frame[at] ^= 0x55;
            let broken = frame.clone();
            assert!(finish(&mut frame).is_some());
            assert_eq!(frame, broken);
        }
    }

    #[test]
    fn what_is_cut_short_is_nothing() {
        for (_, whole) in frames() {
            for length in 0..whole.len() - 7 {
                let mut frame = whole[..length].to_vec();
                assert!(finish(&mut frame).is_none(), "{length}");
            }
        }
    }
}
