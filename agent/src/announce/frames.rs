//! The frames of announcing: questions of ARP and neighbour discovery, what answers them, and what is said unasked.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A hardware address.
pub(super) type Mac = [u8; 6];

const EVERYBODY: Mac = [0xff; 6];
/// All nodes of a link (RFC 4291) and their hardware address (RFC 2464).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];
const ARP: [u8; 2] = [0x08, 0x06];
const IPV6: [u8; 2] = [0x86, 0xdd];
/// Hardware is Ethernet, protocol is IPv4, with the lengths of their addresses.
const ARP_OF_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];
const ICMPV6: u8 = 58;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
/// Flags of an advertisement: it answers a question; it replaces what was known.
const SOLICITED: u8 = 0x40;
const OVERRIDE: u8 = 0x20;
/// Of more addresses the kernel lets all questions through.
const FILTERED: usize = 256;

/// What is said unasked of an address that is at `own` from now on.
pub(super) fn announcement(address: IpAddr, own: Mac) -> Vec<u8> {
    match address {
        // A request whose sender and target are the same (RFC 5227).
        IpAddr::V4(address) => arp(1, own, (EVERYBODY, [0; 6]), address, address),
        IpAddr::V6(address) => advertisement(OVERRIDE, own, ALL_NODES_MAC, address, ALL_NODES),
    }
}

/// The answer to a frame that asks for one of the addresses held.
pub(super) fn answer(frame: &[u8], own: Mac, held: &BTreeSet<IpAddr>) -> Option<Vec<u8>> {
    let kind: [u8; 2] = array(frame, 12)?;
    if kind == ARP {
        answer_arp(frame, own, held)
    } else if kind == IPV6 {
        answer_solicitation(frame, own, held)
    } else {
        None
    }
}

fn answer_arp(frame: &[u8], own: Mac, held: &BTreeSet<IpAddr>) -> Option<Vec<u8>> {
    let (kind, operation): ([u8; 6], [u8; 2]) = (array(frame, 14)?, array(frame, 20)?);
    let asker: Mac = array(frame, 22)?;
    let from = Ipv4Addr::from(array::<4>(frame, 28)?);
    let target = Ipv4Addr::from(array::<4>(frame, 38)?);
    let asked = kind == ARP_OF_IPV4 && operation == [0, 1] && held.contains(&target.into());
    // Who says that the address is theirs asks nothing.
    (asked && from != target && is_one(asker)).then(|| arp(2, own, (asker, asker), target, from))
}

fn answer_solicitation(frame: &[u8], own: Mac, held: &BTreeSet<IpAddr>) -> Option<Vec<u8>> {
    let length = usize::from(u16::from_be_bytes(array(frame, 18)?));
    let [next, hops]: [u8; 2] = array(frame, 20)?;
    let from = Ipv6Addr::from(array::<16>(frame, 22)?);
    let to = Ipv6Addr::from(array::<16>(frame, 38)?);
    let message = frame.get(54..54 + length)?;
    let target = Ipv6Addr::from(array::<16>(message, 8)?);
    let asked = frame.get(14)? >> 4 == 6
        && next == ICMPV6
        // A router would have lowered it.
        && hops == 255
        && message.starts_with(&[SOLICITATION, 0])
        && checksum(from, to, message) == 0
        && held.contains(&target.into());
    if !asked {
        return None;
    }
    let mut asker: Mac = array(frame, 6)?;
    let mut options = message.get(24..)?;
    while let [kind, words, rest @ ..] = options {
        let length = usize::from(*words) * 8;
        if length == 0 || length > options.len() {
            return None;
        }
        // The asker's own word for where it is.
        if *kind == 1 && length == 8 {
            asker = array(rest, 0)?;
        }
        options = options.get(length..)?;
    }
    if from.is_unspecified() {
        // Somebody wants to take the address: all are told whose it is.
        return Some(advertisement(
            OVERRIDE,
            own,
            ALL_NODES_MAC,
            target,
            ALL_NODES,
        ));
    }
    let flags = SOLICITED | OVERRIDE;
    is_one(asker).then(|| advertisement(flags, own, asker, target, from))
}

/// Neither a group nor nobody.
fn is_one(mac: Mac) -> bool {
    mac[0] & 1 == 0 && mac != [0; 6]
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

/// `to` is the receiver of the frame, and the one named within.
fn arp(operation: u8, own: Mac, to: (Mac, Mac), sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let mut frame = [&to.0[..], &own, &ARP, &ARP_OF_IPV4, &[0, operation]].concat();
    frame.extend(own);
    frame.extend(sender.octets());
    frame.extend(to.1);
    frame.extend(target.octets());
    frame
}

fn advertisement(flags: u8, own: Mac, mac: Mac, target: Ipv6Addr, to: Ipv6Addr) -> Vec<u8> {
    let mut message = vec![ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    message.extend(target.octets());
    // The target's hardware address.
    message.extend([2, 1]);
    message.extend(own);
    let sum = checksum(target, to, &message).to_be_bytes();
    message[2..4].copy_from_slice(&sum);
    let length = (message.len() as u16).to_be_bytes();
    let mut frame = [
        &mac[..],
        &own,
        &IPV6,
        &[0x60, 0, 0, 0],
        &length,
        &[ICMPV6, 255],
    ]
    .concat();
    frame.extend(target.octets());
    frame.extend(to.octets());
    frame.extend(message);
    frame
}

/// Of a message of ICMPv6 and its pseudo-header; 0 where the message has its checksum and it is right.
fn checksum(from: Ipv6Addr, to: Ipv6Addr, message: &[u8]) -> u16 {
    let words = |bytes: &[u8]| -> u32 {
        let pairs = bytes.chunks(2);
        pairs
            .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low)))
            .sum()
    };
    let mut sum = words(&from.octets()) + words(&to.octets()) + words(message);
    sum += message.len() as u32 + u32::from(ICMPV6);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The group in which questions for an address are asked (RFC 4291), and its hardware address.
pub(super) fn group(address: Ipv6Addr) -> (Ipv6Addr, Mac) {
    let [.., a, b, c] = address.octets();
    let (high, low) = (0xff00 | u16::from(a), u16::from_be_bytes([b, c]));
    let group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, high, low);
    (group, [0x33, 0x33, 0xff, a, b, c])
}

/// A filter for a socket of ARP or of IPv6, which passes questions for these addresses; of IPv6 addresses it looks
/// at the end alone. Frames for others are none of ours, nor are those of other networks that share the device
/// (VLANs), which the kernel marks as such.
pub(super) fn filter(v4: bool, addresses: &BTreeSet<IpAddr>) -> Vec<libc::sock_filter> {
    let load = |size: u32, at: u32| step(libc::BPF_LD | size | libc::BPF_ABS, at, 0, 0);
    let is = |value: u32| step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, value, 1, 0);
    let (pass, drop) = (
        step(libc::BPF_RET, 0x4_0000, 0, 0),
        step(libc::BPF_RET, 0, 0, 0),
    );
    let kind = (libc::SKF_AD_OFF + libc::SKF_AD_PKTTYPE) as u32;
    let others = step(
        libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K,
        libc::PACKET_OTHERHOST.into(),
        0,
        1,
    );
    let mut steps = vec![load(libc::BPF_B, kind), others, drop];
    let ends: BTreeSet<u32> = addresses
        .iter()
        .filter(|address| address.is_ipv4() == v4)
        .map(|address| match address {
            IpAddr::V4(address) => address.to_bits(),
            IpAddr::V6(address) => address.to_bits() as u32,
        })
        .collect();
    let target = if v4 {
        steps.extend([load(libc::BPF_H, 20), is(1), drop]);
        38
    } else {
        steps.extend([load(libc::BPF_B, 20), is(ICMPV6.into()), drop]);
        steps.extend([load(libc::BPF_B, 54), is(SOLICITATION.into()), drop]);
        74
    };
    if ends.len() > FILTERED {
        steps.push(pass);
        return steps;
    }
    steps.push(load(libc::BPF_W, target));
    for end in ends {
        steps.extend([
            step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, end, 0, 1),
            pass,
        ]);
    }
    steps.push(drop);
    steps
}

fn step(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    }
}

#[cfg(test)]
mod tests {
    use etherparse::{ArpHardwareId, ArpOperation, NetSlice, SlicedPacket, TransportSlice};

    use super::*;

    const OWN: Mac = [2, 0, 0, 0, 0, 1];
    const ASKER: Mac = [2, 0, 0, 0, 0, 2];
    const V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 100);
    const CLIENT4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);

    fn v6() -> Ipv6Addr {
        "2001:db8::c0a8:64".parse().unwrap()
    }

    fn client6() -> Ipv6Addr {
        "fe80::7".parse().unwrap()
    }

    fn held() -> BTreeSet<IpAddr> {
        [V4.into(), v6().into()].into()
    }

    /// Receiver, operation, sender and target of a frame of ARP, as another parser reads it.
    fn read_arp(frame: &[u8]) -> (Vec<u8>, ArpOperation, [Vec<u8>; 4]) {
        let packet = SlicedPacket::from_ethernet(frame).unwrap();
        let Some(NetSlice::Arp(arp)) = packet.net else {
            panic!("no ARP");
        };
        assert_eq!(arp.hw_addr_type(), ArpHardwareId::ETHERNET);
        (
            frame[..6].to_vec(),
            arp.operation(),
            [
                arp.sender_hw_addr().to_vec(),
                arp.sender_protocol_addr().to_vec(),
                arp.target_hw_addr().to_vec(),
                arp.target_protocol_addr().to_vec(),
            ],
        )
    }

    #[test]
    fn arp_is_announced_and_answered() {
        let (to, operation, [mac, sender, _, target]) = read_arp(&announcement(V4.into(), OWN));
        assert_eq!((to, operation), (vec![0xff; 6], ArpOperation::REQUEST));
        assert_eq!(
            (mac, sender, target),
            (OWN.to_vec(), V4.octets().to_vec(), V4.octets().to_vec())
        );
        let request = arp(1, ASKER, (EVERYBODY, [0; 6]), CLIENT4, V4);
        let (to, operation, [mac, sender, asker, target]) =
            read_arp(&answer(&request, OWN, &held()).unwrap());
        assert_eq!((to, operation), (ASKER.to_vec(), ArpOperation::REPLY));
        assert_eq!((mac, sender), (OWN.to_vec(), V4.octets().to_vec()));
        assert_eq!((asker, target), (ASKER.to_vec(), CLIENT4.octets().to_vec()));
        // Padded to the least length of a frame, and as a probe.
        let mut padded = arp(1, ASKER, (OWN, [0; 6]), Ipv4Addr::UNSPECIFIED, V4);
        padded.resize(60, 0);
        assert!(answer(&padded, OWN, &held()).is_some());
    }

    #[test]
    fn what_is_no_question_for_an_address_of_ours_is_not_answered() {
        let silent = |frame: &[u8]| assert_eq!(answer(frame, OWN, &held()), None, "{frame:?}");
        let other = Ipv4Addr::new(192, 0, 2, 101);
        silent(&arp(1, ASKER, (EVERYBODY, [0; 6]), CLIENT4, other));
        silent(&arp(2, ASKER, (OWN, OWN), CLIENT4, V4));
        silent(&announcement(V4.into(), ASKER));
        silent(&arp(1, EVERYBODY, (EVERYBODY, [0; 6]), CLIENT4, V4));
        silent(&announcement(v6().into(), ASKER));
        let whole = [
            arp(1, ASKER, (EVERYBODY, [0; 6]), CLIENT4, V4),
            solicitation(client6(), true),
        ];
        for frame in whole {
            assert!(answer(&frame, OWN, &held()).is_some());
            for end in 0..frame.len() {
                silent(&frame[..end]);
            }
        }
        for (at, value) in [(14, 0x40), (20, 17), (21, 254), (54, 136), (55, 1), (56, 9)] {
            let mut broken = solicitation(client6(), true);
            broken[at] = value;
            silent(&broken);
        }
        // An option that has no length, and one that is longer than the message.
        for length in [0, 2] {
            let mut frame = solicitation(client6(), true);
            frame[79] = length;
            renew_checksum(&mut frame);
            silent(&frame);
        }
    }

    /// What asks for the IPv6 address, to its group.
    fn solicitation(from: Ipv6Addr, option: bool) -> Vec<u8> {
        let (group, mac) = group(v6());
        let mut message = vec![SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
        message.extend(v6().octets());
        if option {
            message.extend([1, 1]);
            message.extend(ASKER);
        }
        let length = (message.len() as u16).to_be_bytes();
        let mut frame = [
            &mac[..],
            &[2, 0, 0, 0, 0, 3],
            &IPV6,
            &[0x60, 0, 0, 0],
            &length,
            &[ICMPV6, 255],
        ]
        .concat();
        frame.extend(from.octets());
        frame.extend(group.octets());
        frame.extend(message);
        renew_checksum(&mut frame);
        frame
    }

    fn renew_checksum(frame: &mut [u8]) {
        frame[56..58].fill(0);
        let (from, to) = (
            array::<16>(frame, 22).unwrap(),
            array::<16>(frame, 38).unwrap(),
        );
        let sum = checksum(from.into(), to.into(), &frame[54..]);
        frame[56..58].copy_from_slice(&sum.to_be_bytes());
    }

    /// Receivers, flags and hardware address of an advertisement, whose checksum another parser finds right.
    fn read_advertisement(frame: &[u8]) -> (Vec<u8>, Ipv6Addr, u8, Vec<u8>) {
        let packet = SlicedPacket::from_ethernet(frame).unwrap();
        let (Some(NetSlice::Ipv6(ip)), Some(TransportSlice::Icmpv6(icmp))) =
            (packet.net, packet.transport)
        else {
            panic!("no ICMPv6");
        };
        let ip = ip.header();
        assert!(icmp.is_checksum_valid(ip.source(), ip.destination()));
        assert_eq!((ip.hop_limit(), ip.source_addr()), (255, v6()));
        assert_eq!(icmp.slice()[..2], [ADVERTISEMENT, 0]);
        assert_eq!(icmp.slice()[8..24], v6().octets());
        assert_eq!(icmp.slice()[24..26], [2, 1]);
        let to = frame[..6].to_vec();
        (
            to,
            ip.destination_addr(),
            icmp.slice()[4],
            icmp.slice()[26..].to_vec(),
        )
    }

    #[test]
    fn neighbours_are_advertised_unasked_and_asked() {
        let own = OWN.to_vec();
        let all = ALL_NODES_MAC.to_vec();
        let unasked = announcement(v6().into(), OWN);
        assert_eq!(
            read_advertisement(&unasked),
            (all.clone(), ALL_NODES, 0x20, own.clone())
        );
        let answered = |from, option| {
            let frame = answer(&solicitation(from, option), OWN, &held()).unwrap();
            read_advertisement(&frame)
        };
        let to = ASKER.to_vec();
        assert_eq!(
            answered(client6(), true),
            (to, client6(), 0x60, own.clone())
        );
        let to = vec![2, 0, 0, 0, 0, 3];
        assert_eq!(
            answered(client6(), false),
            (to, client6(), 0x60, own.clone())
        );
        let everybody = answered(Ipv6Addr::UNSPECIFIED, false);
        assert_eq!(everybody, (all, ALL_NODES, 0x20, own));
    }

    #[test]
    fn the_group_of_an_address() {
        let (group, mac) = group("2001:db8::12:3456".parse().unwrap());
        assert_eq!(group.to_string(), "ff02::1:ff12:3456");
        assert_eq!(mac, [0x33, 0x33, 0xff, 0x12, 0x34, 0x56]);
    }

    #[test]
    fn filters_stay_short() {
        let many: BTreeSet<IpAddr> = (0..1000_u32)
            .map(|n| Ipv4Addr::from_bits(n).into())
            .collect();
        assert_eq!(filter(true, &many).len(), 7);
        assert_eq!(filter(true, &held()).len(), 10);
        assert_eq!(filter(false, &held()).len(), 13);
    }
}
