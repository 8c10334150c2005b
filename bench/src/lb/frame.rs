//! Frames of `xdp-lb`.

use std::net::{IpAddr, SocketAddr};

/// TCP's flags.
pub const SYN: u8 = 0x02;
/// As above.
pub const RST: u8 = 0x04;
/// As above.
pub const ACK: u8 = 0x10;

/// What the frame is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content {
    /// TCP with these flags.
    Tcp(u8),
    /// A datagram.
    Udp,
    /// An echo request.
    Echo,
    /// The second fragment of a datagram.
    Fragment,
    /// TCP after options of IP.
    Options,
    /// ARP.
    Arp,
}

/// A frame before it is written down.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// Hardware addresses: to, from.
    pub hardware: [[u8; 6]; 2],
    /// Who sends.
    pub source: SocketAddr,
    /// To whom, in the same family.
    pub destination: SocketAddr,
    /// What it is.
    pub content: Content,
}

const TCP: u8 = 6;
const UDP: u8 = 17;

fn sum(words: &[u8], mut sum: u32) -> u32 {
    for pair in words.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
    }
    sum
}

fn folded(mut sum: u32) -> [u8; 2] {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

impl Frame {
    /// Its bytes, with checksums.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.hardware.concat();
        match self.content {
            Content::Arp => {
                bytes.extend([0x08, 0x06]);
                bytes.extend([0; 46]);
            }
            _ if self.source.is_ipv6() => {
                bytes.extend([0x86, 0xdd]);
                self.write_ipv6(&mut bytes);
            }
            _ => {
                bytes.extend([0x08, 0x00]);
                self.write_ipv4(&mut bytes);
            }
        }
        bytes
    }

    fn addresses(&self) -> Vec<u8> {
        let both = [self.source.ip(), self.destination.ip()];
        let bytes = both.map(|address| match address {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        });
        bytes.concat()
    }

    fn transport(&self, pseudo: u32) -> (u8, Vec<u8>) {
        let ports = [
            self.source.port().to_be_bytes(),
            self.destination.port().to_be_bytes(),
        ]
        .concat();
        // Words that nobody reads are 0: `wrap` may put complements there.
        let payload = [0; 8];
        let (protocol, mut segment, place) = match self.content {
            Content::Udp | Content::Fragment => {
                let length = (8 + payload.len() as u16).to_be_bytes();
                (UDP, [&ports[..], &length, &[0, 0]].concat(), 6)
            }
            Content::Echo => (1, vec![8, 0, 0, 0, 0, 1, 0, 1], 2),
            content => {
                let flags = match content {
                    Content::Tcp(flags) => flags,
                    _ => ACK,
                };
                let mut header = ports;
                header.extend([0, 0, 0, 0, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
                (TCP, header, 16)
            }
        };
        segment.extend(payload);
        let pseudo = match protocol {
            1 => 0,
            _ => pseudo + u32::from(protocol) + segment.len() as u32,
        };
        let check = folded(sum(&segment, pseudo));
        segment[place..place + 2].copy_from_slice(&check);
        (protocol, segment)
    }

    fn write_ipv4(&self, bytes: &mut Vec<u8>) {
        let addresses = self.addresses();
        let (protocol, segment) = self.transport(sum(&addresses, 0));
        // One option: no operation, four times.
        let options: &[u8] = match self.content {
            Content::Options => &[1; 4],
            _ => &[],
        };
        let words = 5 + options.len() / 4;
        let length = (words * 4 + segment.len()) as u16;
        // Don't fragment, or the place of a second fragment.
        let place: u16 = match self.content {
            Content::Fragment => 185,
            _ => 0x4000,
        };
        let mut header = vec![0x40 | words as u8, 0];
        header.extend(length.to_be_bytes());
        header.extend([0, 0]);
        header.extend(place.to_be_bytes());
        header.extend([64, protocol, 0, 0]);
        header.extend(addresses);
        header.extend(options);
        let check = folded(sum(&header, 0));
        header[10..12].copy_from_slice(&check);
        bytes.extend(header);
        bytes.extend(segment);
    }

    fn write_ipv6(&self, bytes: &mut Vec<u8>) {
        let addresses = self.addresses();
        let (protocol, segment) = self.transport(sum(&addresses, 0));
        // The header of a fragment: what follows it, its place, its number.
        let fragment = [protocol, 0, 0x05, 0xc8, 0, 0, 0, 1];
        let (next, extra): (u8, &[u8]) = match self.content {
            Content::Fragment => (44, &fragment),
            _ => (protocol, &[]),
        };
        bytes.extend([0x60, 0, 0, 0]);
        bytes.extend(((extra.len() + segment.len()) as u16).to_be_bytes());
        bytes.extend([next, 64]);
        bytes.extend(addresses);
        bytes.extend(extra);
        bytes.extend(segment);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_right() {
        for (source, destination) in [
            ("192.0.2.2:40000", "10.200.0.1:30080"),
            ("[2001:db8::2]:40000", "[fd00:200::1]:30080"),
        ] {
            for content in [Content::Tcp(SYN), Content::Udp, Content::Options] {
                let (Ok(source), Ok(destination)) = (source.parse(), destination.parse()) else {
                    panic!("{source} or {destination} is no address");
                };
                let frame = Frame {
                    hardware: [[2; 6]; 2],
                    source,
                    destination,
                    content,
                };
                let bytes = frame.bytes();
                let (next, addresses, header) = match source {
                    SocketAddr::V4(_) => (23, 26..34, usize::from(bytes[14] & 15) * 4),
                    SocketAddr::V6(_) => (20, 22..54, 40),
                };
                // A right sum over everything with its checksum has every bit set.
                if source.is_ipv4() {
                    assert_eq!(folded(sum(&bytes[14..14 + header], 0)), [0, 0]);
                }
                let segment = &bytes[14 + header..];
                let pseudo = u32::from(bytes[next]) + segment.len() as u32;
                let pseudo = sum(&bytes[addresses], pseudo);
                assert_eq!(folded(sum(segment, pseudo)), [0, 0], "{content:?}");
            }
        }
    }
}
