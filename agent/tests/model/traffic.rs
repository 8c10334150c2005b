//! Random packets on their ways through the hooks, judged at each.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr};

use rand::Rng;
use xebec_dataplane_common::flow::{
    CLOSED_BACK, CLOSED_FORTH, Flow, FlowKey, TURN_BACK, TURN_DIRECT, TURN_FORTH, TURN_KEPT,
    TURN_LATE, TURN_STAYS, ticks,
};
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::nat::{MARK_DONE, Tuple};
use xebec_dataplane_common::service::AffinityKey;

use super::rules::{End, Ends, Entry, Fate, How, Made, Seen, Turn, Verdict, changed};
use super::world::{PODS, World, far_pod, frontends, pod_address};
use crate::packets::direct::{outer_port, wrapped};
use crate::packets::packet::{INIT, Transport, refusal, tcp_flags, told_by};
use crate::packets::{
    ACK, FAMILIES, FIN, Family, Kernel, OK, PASS, POD_MAC, Packet, REDIRECT, RST, SHOT, SYN, WHYS,
    Why, client, echo, error, far_node, node, router, sctp, tcp, udp,
};

/// The device that leads outside.
const OUTSIDE: u32 = 1;
/// The hardware address of all devices.
const DEVICE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// What is under way.
#[derive(Clone, Debug)]
enum Body {
    Plain(Packet),
    /// A later fragment of the datagram that is named second.
    Later(Packet, Packet),
    /// What it quotes, and how much of it.
    Error(Packet, Why, Packet, usize),
}

impl Body {
    fn packet(&self) -> &Packet {
        match self {
            Self::Plain(packet) | Self::Later(packet, _) | Self::Error(packet, ..) => packet,
        }
    }

    fn packet_mut(&mut self) -> &mut Packet {
        match self {
            Self::Plain(packet) | Self::Later(packet, _) | Self::Error(packet, ..) => packet,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Plain(packet) => packet.bytes(),
            Self::Later(packet, original) => packet.bytes_as_of(original),
            Self::Error(packet, why, about, length) => {
                let whole = error(packet.source, packet.destination, *why, about, *length);
                Packet {
                    transport: whole.transport,
                    ..packet.clone()
                }
                .bytes()
            }
        }
    }

    /// What it becomes with other ends.
    fn with(&self, seen: &Seen, ends: Ends) -> Self {
        match self {
            Self::Plain(packet) => Self::Plain(changed(packet, ends)),
            Self::Later(packet, original) => Self::Later(changed(packet, ends), original.clone()),
            Self::Error(packet, why, about, length) => {
                let mut packet = packet.clone();
                // Who must not see the far end must not see the way to it.
                if ends.from.0 != seen.ends.from.0 {
                    packet.source = ends.from.0;
                }
                packet.destination = ends.to.0;
                let mut new = changed(about, ends.back());
                if let Transport::Sctp(_) = about.transport {
                    // What is quoted is not whole: its checksum stays.
                    new.crc = Some(about.crc());
                }
                Self::Error(packet, *why, new, *length)
            }
        }
    }
}

fn ends(packet: &Packet) -> Ends {
    Ends {
        from: (packet.source, packet.source_port),
        to: (packet.destination, packet.destination_port),
        protocol: packet.protocol(),
    }
}

/// Where a packet comes from or arrives.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    /// By its number among a node's pods of a family.
    Pod(usize),
    Node,
    Network,
}

/// How many packets met each fate.
#[derive(Debug, Default)]
pub struct Counts {
    dropped: u64,
    passed: u64,
    sent: u64,
    answered: u64,
    exceeded: u64,
    changed: u64,
    errors_changed: u64,
    early: u64,
    fragments_changed: u64,
    /// To their backends' nodes as they came, and from another node.
    direct: u64,
    carried: u64,
    changes: u64,
    entries: u64,
}

impl Counts {
    pub fn is_of_all_kinds(&self) -> bool {
        let all = [
            self.dropped,
            self.passed,
            self.sent,
            self.answered,
            self.exceeded,
            self.changed,
            self.errors_changed,
            self.early,
            self.fragments_changed,
            self.direct,
            self.carried,
            self.changes,
            self.entries,
        ];
        all.iter().all(|count| *count > 1000)
    }
}

pub struct Run<'a> {
    kernel: &'a mut Kernel,
    world: World,
    devices: [u32; PODS],
    seed: u64,
    /// Ports of first fragments.
    fragments: HashMap<(IpAddr, IpAddr, u32), (u16, u16)>,
    /// What was sent and what arrived lately.
    sent: VecDeque<(Place, Packet)>,
    arrived: VecDeque<(Place, Packet)>,
    log: VecDeque<(&'static str, Body, u32)>,
    done: u64,
    /// The clock ticked while a program ran: what it saw is not known.
    blurred: bool,
}

/// The clock of the programs.
fn now() -> u32 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the structure is ours.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut time) };
    ticks(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

impl<'a> Run<'a> {
    pub fn new(kernel: &'a mut Kernel, devices: [u32; PODS], seed: u64) -> Self {
        Self {
            world: World::new(kernel, devices, seed),
            kernel,
            devices,
            seed,
            fragments: HashMap::new(),
            sent: VecDeque::new(),
            arrived: VecDeque::new(),
            log: VecDeque::new(),
            done: 0,
            blurred: false,
        }
    }

    /// Sends until so many packets went through a hook, and gives how many did.
    pub fn go(&mut self, wanted: u64, counts: &mut Counts) -> u64 {
        while self.done < wanted && !self.blurred {
            if self.world.random.random_range(0..60) == 0 {
                self.world.change(self.kernel);
                counts.changes += 1;
            }
            let (place, body) = self.any();
            self.send(place, body, counts);
        }
        if !self.blurred {
            self.compare_all(counts);
        }
        self.done
    }

    /// A packet and who sends it.
    fn any(&mut self) -> (Place, Body) {
        let kind = self.world.random.random_range(0..100);
        let known = !self.arrived.is_empty();
        match kind {
            // Answers, what goes on, and errors.
            0..30 if known => {
                let (place, packet) = self.world.any(self.arrived.iter().cloned());
                let flags = self
                    .world
                    .any([ACK, ACK, ACK | SYN, ACK | SYN, ACK | FIN, RST, SYN]);
                let mut answer = packet.back(flags);
                answer.ttl = 64;
                (place, Body::Plain(answer))
            }
            30..50 if known => {
                let (place, packet) = self.world.any(self.sent.iter().cloned());
                let flags = self.world.any([ACK, ACK, ACK, SYN, ACK | FIN, RST]);
                (place, Body::Plain(packet.flags_if_tcp(flags)))
            }
            50..56 if known => {
                let (place, about) = self.world.any(self.arrived.iter().cloned());
                let family = FAMILIES[usize::from(about.source.is_ipv6())];
                let mut from = about.destination;
                if place == Place::Network && self.world.random.random_bool(0.3) {
                    from = router(family);
                }
                let why = self.world.any(WHYS);
                let least = about.transport_at() - 14 + 8;
                let length = self.world.any([500, least]);
                let mut packet = error(from, about.source, why, &about, length);
                packet.ttl = 64;
                (place, Body::Error(packet, why, about, length))
            }
            56..59 if known => {
                // The rest of a datagram of which a part was sent, or of none.
                let mut parts = self
                    .sent
                    .iter()
                    .filter(|(_, packet)| packet.fragment.is_some());
                let Some((place, original)) = parts.next_back().cloned() else {
                    return self.first();
                };
                let mut packet = original.clone();
                let id = match self.world.random.random_range(0..20) {
                    0 => 1_000,
                    _ => packet.fragment.map_or(0, |(id, _, _)| id),
                };
                packet.fragment = Some((id, 64, false));
                (place, Body::Later(packet, original))
            }
            _ => self.first(),
        }
    }

    /// A packet that may begin something.
    fn first(&mut self) -> (Place, Body) {
        let family = self.world.any(FAMILIES);
        let v6 = usize::from(family == Family::V6);
        let place = match self.world.random.random_range(0..10) {
            0..6 => Place::Pod(v6 * PODS + self.world.random.random_range(0..PODS)),
            6..9 => Place::Network,
            _ => Place::Node,
        };
        let from = match place {
            Place::Pod(index) => match self.world.random.random_range(0..40) {
                // A forger.
                0 => self.world.any([
                    node(family),
                    client(family),
                    pod_address((index + 1) % (2 * PODS)),
                ]),
                _ => pod_address(index),
            },
            Place::Node => node(family),
            Place::Network => self.world.any([
                client(family),
                client(family),
                router(family),
                far_pod(family, 1),
                far_node(family),
            ]),
        };
        let (to, port) = self.receiver(family);
        // Families are not mixed.
        if from.is_ipv4() != to.is_ipv4() || from == to && place != Place::Network {
            return self.first();
        }
        let own = 4_000 + self.world.random.random_range(0..12);
        let flags = self.world.any(["S", "S", "S", "A", "SA", "FA", "R"]);
        let mut packet = match self.world.random.random_range(0..20) {
            0..8 => tcp(from, to, own, port, flags),
            8..15 => udp(from, to, own, port),
            15..18 => sctp(from, to, own, port, INIT).flags_if_tcp(tcp_flags(flags)),
            18 => echo(from, to, own),
            _ => {
                let mut first = udp(from, to, own, port);
                first.fragment = Some((self.world.random.random_range(1..50), 0, true));
                first
            }
        };
        if self.world.random.random_bool(0.05) {
            packet = packet.with_options();
        }
        if self.world.random.random_bool(0.02) {
            // Overheard.
            packet.mac_destination = [2, 0, 0, 0, 0, 3];
        }
        packet.no_checksum = self.world.random.random_bool(0.1);
        let seldom = if place == Place::Network { 0.15 } else { 0.02 };
        // Overheard it would be dropped after its flow was entered, and the choice could not be seen.
        let here = packet.mac_destination == DEVICE_MAC;
        if place != Place::Node && here && self.world.random.random_bool(seldom) {
            packet.ttl = self.world.random.random_range(0..3);
        }
        (place, Body::Plain(packet))
    }

    fn receiver(&mut self, family: Family) -> End {
        let v6 = usize::from(family == Family::V6);
        match self.world.random.random_range(0..20) {
            0..12 => {
                let (address, port, _) = self.world.any(frontends(family));
                let nodes = [node(family), node(family), far_node(family)];
                (address.unwrap_or(self.world.any(nodes)), port)
            }
            12..15 => (
                pod_address(v6 * PODS + self.world.random.random_range(0..PODS)),
                8080,
            ),
            15 => (far_pod(family, self.world.random.random_range(0..5)), 8080),
            16 => (node(family), self.world.any([8080, 61_000])),
            _ => {
                let whom = [client(family), router(family)];
                (self.world.any(whom), self.world.any([53, 80]))
            }
        }
    }

    /// Sends a packet on its way.
    fn send(&mut self, place: Place, body: Body, counts: &mut Counts) {
        if let Body::Plain(packet) = &body {
            remember(&mut self.sent, (place, packet.clone()));
        }
        let outcome = match place {
            Place::Pod(index) => self.hook(Hook::FromPod(index), body, counts),
            Place::Network if let Some(backend) = self.carried(&body) => {
                counts.carried += 1;
                self.hook(Hook::Carried(backend), body, counts)
            }
            Place::Network => {
                let body = match self.world.random.random_bool(0.5) {
                    true => self.early(body, counts),
                    false => body,
                };
                self.hook(Hook::FromNetwork, body, counts)
            }
            Place::Node => Some((Verdict::Pass, body)),
        };
        let Some((verdict, body)) = outcome else {
            return;
        };
        let mark = self.kernel.mark();
        let packet = body.packet();
        let (to, ttl) = (packet.destination, packet.ttl);
        let pod = pod_of(to);
        let family = FAMILIES[usize::from(to.is_ipv6())];
        let (arrives, body) = match (place, verdict, pod) {
            (Place::Pod(_), Verdict::Send, Some(pod)) => (Place::Pod(pod), Some(body)),
            (Place::Network, Verdict::Send, Some(pod)) => (Place::Pod(pod), Some(body)),
            // The stack answers for what has no hop left.
            (Place::Pod(_), _, _) if ttl <= 1 => return,
            (_, _, Some(pod)) => {
                let received = if place == Place::Node { 0 } else { OUTSIDE };
                let outcome = self.hook(Hook::ToPod(pod, received), body, counts);
                (Place::Pod(pod), outcome.map(|(_, body)| body))
            }
            (Place::Pod(_) | Place::Network, Verdict::Pass, _) if to == node(family) => {
                (Place::Node, Some(body))
            }
            // It is not the node's to forward.
            (Place::Network, Verdict::Pass, _) => return,
            _ => {
                let mark = if place == Place::Node { 0 } else { mark };
                let outcome = self.hook(Hook::ToNetwork(mark), body, counts);
                (Place::Network, outcome.map(|(_, body)| body))
            }
        };
        if let Some(Body::Plain(packet)) = body {
            remember(&mut self.arrived, (arrives, packet));
        }
    }

    /// The backend with which another node would send on what came to it from outside; none for what comes by itself.
    fn carried(&mut self, body: &Body) -> Option<End> {
        let model = &self.world.model;
        let (source, to) = (body.packet().source, body.packet().destination);
        let protocol = match body {
            Body::Error(_, _, about, _) => about.protocol(),
            _ => body.packet().protocol(),
        };
        if !model.direct.contains(&protocol)
            || model.native.contains(&source)
            || pod_of(to).is_some()
        {
            return None;
        }
        let family = FAMILIES[usize::from(to.is_ipv6())];
        // To the node itself it comes by itself.
        if to == node(family) || self.world.random.random_bool(0.1) {
            return None;
        }
        let v6 = usize::from(family == Family::V6);
        let kind = match self.world.random.random_range(0..40) {
            0 => 8,
            1..4 => self.world.random.random_range(0..8),
            // A flow keeps its own.
            _ => body.packet().source_port % 8,
        };
        let address = match kind {
            0..6 => pod_address(v6 * PODS + usize::from(kind) % PODS),
            6..8 => node(family),
            _ => far_node(family),
        };
        Some((address, 8080))
    }

    /// XDP before tc: it leaves a packet untouched, or makes of it what tc would.
    fn early(&mut self, body: Body, counts: &mut Counts) -> Body {
        let frame = body.bytes();
        let before = now();
        let (verdict, out) = self.kernel.run_early(0, &frame);
        if now() != before {
            self.blurred = true;
        }
        if verdict != PASS {
            self.fail(&body, &format!("XDP's verdict is {verdict}"));
        }
        // What it only looked at is not another to tc.
        if out == frame || self.blurred {
            return body;
        }
        self.world.model.now = before;
        self.done += 1;
        remember(&mut self.log, ("xebec_express", body.clone(), verdict));
        let Some(seen) = self.seen(&body) else {
            self.fail(&body, "XDP translated a fragment");
        };
        let made = self.made(Hook::FromNetwork, &seen, &body, OK, &out);
        let fate = self.world.model.comes_in(&seen, &made);
        let (Verdict::Pass, Some(ends)) = (fate.verdict, fate.becomes) else {
            self.fail(&body, &format!("XDP translated it, expected {fate:?}"));
        };
        self.compare(seen.ends, &body);
        self.compare(ends, &body);
        let expected = body.with(&seen, ends);
        if expected.bytes() != out {
            self.fail(
                &body,
                &format!("expected {expected:?}, XDP made of it {out:02x?}"),
            );
        }
        counts.early += 1;
        expected
    }

    /// Runs one hook's program, and the model; both must agree. What it became, unless it was dropped.
    fn hook(&mut self, hook: Hook, body: Body, counts: &mut Counts) -> Option<(Verdict, Body)> {
        if self.blurred {
            return None;
        }
        let (name, device, received, mark) = match hook {
            Hook::FromPod(index) => ("xebec_from_pod", self.devices[index % PODS], 0, 0),
            Hook::ToPod(index, received) => {
                ("xebec_to_pod", self.devices[index % PODS], received, 0)
            }
            Hook::FromNetwork | Hook::Carried(_) => ("xebec_from_network", OUTSIDE, 0, 0),
            Hook::ToNetwork(mark) => ("xebec_to_network", OUTSIDE, 0, mark),
        };
        let mut frame = body.bytes();
        if let Hook::Carried(backend) = hook {
            let family = FAMILIES[usize::from(backend.0.is_ipv6())];
            frame = wrapped(&frame, [far_node(family), node(family)], 50_000, backend);
        }
        let before = now();
        let (verdict, out) = self.kernel.run_marked(name, device, received, mark, &frame);
        if now() != before {
            self.blurred = true;
            return None;
        }
        self.world.model.now = before;
        self.done += 1;
        remember(&mut self.log, (name, body.clone(), verdict));
        let seen = match hook {
            // With which all is done, nobody looks at.
            Hook::ToNetwork(MARK_DONE) => None,
            _ => self.seen(&body),
        };
        let fate = match &seen {
            // A fragment without its first can't be judged.
            None => Fate {
                verdict: match hook {
                    Hook::FromPod(_) => Verdict::Drop,
                    Hook::ToPod(index, _) if self.world.model.pods[index].ingress != 0 => {
                        Verdict::Drop
                    }
                    Hook::Carried(_) => Verdict::Drop,
                    _ => Verdict::Pass,
                },
                becomes: None,
                done: false,
                direct: None,
            },
            Some(seen) => {
                let made = self.made(hook, seen, &body, verdict, &out);
                let model = &mut self.world.model;
                let judged =
                    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| match hook {
                        Hook::FromPod(index) => model.leaves_pod(index, seen, &made),
                        Hook::ToPod(index, received) => {
                            model.enters_pod(index, received == 0, seen)
                        }
                        Hook::FromNetwork => model.comes_around(seen, &made, None),
                        Hook::Carried(backend) => model.comes_around(seen, &made, Some(backend)),
                        Hook::ToNetwork(_) => model.goes_out(seen, &made),
                    }));
                match judged {
                    Ok(fate) => fate,
                    Err(_) => self.fail(&body, "the model does not allow what the program chose"),
                }
            }
        };
        let found = match verdict {
            SHOT => Verdict::Drop,
            OK => Verdict::Pass,
            REDIRECT if matches!(fate.verdict, Verdict::Answer | Verdict::Exceeded) => fate.verdict,
            REDIRECT => Verdict::Send,
            _ => self.fail(&body, "an unknown verdict"),
        };
        if found != fate.verdict {
            self.fail(&body, &format!("expected {fate:?}, found {found:?}"));
        }
        if let Some(seen) = &seen {
            self.compare(seen.ends, &body);
            if let Some(ends) = fate.becomes {
                self.compare(ends, &body);
            }
        }
        if found == Verdict::Drop {
            counts.dropped += 1;
            return None;
        }
        if (self.kernel.mark() == MARK_DONE) != fate.done {
            self.fail(
                &body,
                &format!("expected {fate:?}, its mark is {:x}", self.kernel.mark()),
            );
        }
        if matches!(found, Verdict::Answer | Verdict::Exceeded) {
            counts.answered += 1;
            let packet = body.packet();
            let answer = match found {
                Verdict::Exceeded => {
                    counts.exceeded += 1;
                    let family = FAMILIES[usize::from(packet.source.is_ipv6())];
                    told_by(node(family), packet, Why::TimeExceeded)
                }
                _ => refusal(packet),
            };
            let to = match hook {
                Hook::FromPod(_) => POD_MAC,
                _ => packet.mac_source,
            };
            let expected = answer.between(packet.mac_destination, to);
            if expected.bytes() != out {
                self.fail(&body, &format!("expected {expected:?}, found {out:02x?}"));
            }
            return None;
        }
        if let Some(backend) = fate.direct {
            counts.direct += 1;
            let family = FAMILIES[usize::from(backend.0.is_ipv6())];
            let mut inner = body.clone();
            inner.packet_mut().ttl -= 1;
            let nodes = [node(family), far_node(family)];
            let expected = wrapped(&inner.bytes(), nodes, outer_port(&out, family), backend);
            if expected != out {
                self.fail(
                    &body,
                    &format!("expected {expected:02x?}, found {out:02x?}"),
                );
            }
            // The client gets the answer by another way.
            if let Body::Plain(packet) = &body {
                remember(&mut self.arrived, (Place::Network, packet.back(SYN | ACK)));
            }
            return None;
        }
        let mut expected = match (&seen, fate.becomes) {
            (Some(seen), Some(ends)) => body.with(seen, ends),
            _ => body.clone(),
        };
        if fate.becomes.is_some() {
            counts.changed += 1;
            match &body {
                Body::Error(..) => counts.errors_changed += 1,
                Body::Later(..) => counts.fragments_changed += 1,
                Body::Plain(_) => {}
            }
        }
        match found {
            Verdict::Send => {
                let packet = expected.packet_mut();
                packet.ttl -= 1;
                if pod_of(packet.destination).is_some() {
                    (packet.mac_source, packet.mac_destination) = (packet.mac_destination, POD_MAC);
                }
                counts.sent += 1;
            }
            _ => counts.passed += 1,
        }
        let bytes = expected.bytes();
        if bytes != out {
            self.fail(
                &body,
                &format!("expected {expected:?}\n{bytes:02x?}\nfound\n{out:02x?}"),
            );
        }
        let packet = expected.packet_mut();
        // As the next router would address it.
        (packet.mac_source, packet.mac_destination) = ([2, 0, 0, 0, 0, 1], DEVICE_MAC);
        Some((found, expected))
    }

    /// A packet as a hook sees it; none for a fragment whose first was not seen.
    fn seen(&mut self, body: &Body) -> Option<Seen> {
        let packet = body.packet();
        let flags = match body {
            Body::Plain(packet) => packet.tcp_flags(),
            _ => 0,
        };
        let mut seen = Seen {
            ends: ends(packet),
            flags,
            ttl: packet.ttl,
            carrier: None,
            later: false,
            here: packet.mac_destination == DEVICE_MAC,
        };
        match body {
            Body::Error(packet, _, about, _) => {
                seen.ends = ends(about).back();
                seen.carrier = Some((packet.source, packet.destination));
            }
            Body::Later(..) => {
                seen.later = true;
                let (id, _, _) = packet.fragment?;
                let ports = self
                    .fragments
                    .get(&(packet.source, packet.destination, id))?;
                (seen.ends.from.1, seen.ends.to.1) = *ports;
            }
            Body::Plain(_) => {
                if let Some((id, _, _)) = packet.fragment {
                    let ports = (packet.source_port, packet.destination_port);
                    let key = (packet.source, packet.destination, id);
                    self.fragments.insert(key, ports);
                }
            }
        }
        Some(seen)
    }

    /// What chance decided.
    fn made(&self, hook: Hook, seen: &Seen, body: &Body, verdict: u32, out: &[u8]) -> Made {
        let packet = body.packet();
        let at = packet.transport_at();
        // An answer may be shorter.
        let port = |at: usize| match out.get(at..at + 2) {
            Some(bytes) => u16::from_be_bytes([bytes[0], bytes[1]]),
            None => 0,
        };
        let icmp = matches!(packet.protocol(), 1 | 58);
        let (from_port, to_port) = match icmp {
            // A later fragment bears no ports.
            _ if seen.later => {
                let flow = self.kernel.tables().flows.get(&flow_key(seen.ends));
                let port = flow.map_or(0, |flow| u16::from_be(flow.to.source_port));
                (port, 0)
            }
            true => (port(at + 4), port(at + 4)),
            false => (port(at), port(at + 2)),
        };
        let address: IpAddr = if packet.source.is_ipv4() {
            <[u8; 4]>::try_from(&out[30..34]).unwrap().into()
        } else {
            <[u8; 16]>::try_from(&out[38..54]).unwrap().into()
        };
        let (mut from_port, mut to) = (from_port, (address, to_port));
        if let Some(backend) = carried_by(out, packet.source.is_ipv6()) {
            (from_port, to) = (packet.source_port, backend);
        }
        if seen.ttl <= 1 && verdict == REDIRECT {
            // What is answered shows nothing of the choice.
            if let Some(flow) = self.kernel.tables().flows.get(&flow_key(seen.ends)) {
                from_port = u16::from_be(flow.to.source_port);
                to = (
                    flow.to.destination.into(),
                    u16::from_be(flow.to.destination_port),
                );
            }
        }
        // What the pod's rules drop has begun its flow by then.
        let flow = self.kernel.tables().flows.get(&flow_key(seen.ends));
        let flow = flow.filter(|flow| flow.turn & TURN_FORTH != 0);
        let mut dropped = verdict == SHOT;
        let comes = matches!(hook, Hook::FromNetwork | Hook::Carried(_));
        if let (true, true, Some(flow)) = (self.world.model.around, comes, flow) {
            if dropped && pod_of(flow.to.destination.into()).is_some() {
                dropped = false;
                from_port = u16::from_be(flow.to.source_port);
                to = (
                    flow.to.destination.into(),
                    u16::from_be(flow.to.destination_port),
                );
            }
        }
        let service = self.world.model.has_affinity(seen.ends);
        let remembered = service.and_then(|service| {
            let key = AffinityKey {
                client: seen.ends.from.0.into(),
                service,
                namespace: 0,
            };
            Some(self.kernel.tables().affinities.get(&key)?.backend)
        });
        Made {
            dropped,
            sent: verdict == REDIRECT,
            from_port,
            to,
            remembered,
        }
    }

    /// The entry of some ends must be the model's.
    fn compare(&self, ends: Ends, body: &Body) {
        let found = self.kernel.tables().flows.get(&flow_key(ends));
        let expected = self.world.model.flows.get(&ends.key());
        let found = found.map(|flow| entry(&flow_key(ends), &flow));
        if !same(found.as_ref(), expected) {
            self.fail(
                body,
                &format!("the entry of {ends:?}: expected {expected:#?}, found {found:#?}"),
            );
        }
    }

    /// All entries must be the model's.
    fn compare_all(&self, counts: &mut Counts) {
        let found = self.kernel.tables().flows.entries();
        assert_eq!(
            found.len(),
            self.world.model.flows.len(),
            "seed {}",
            self.seed
        );
        counts.entries += found.len() as u64;
        for (key, flow) in found {
            let ends = Ends {
                from: (key.low.into(), u16::from_be(key.low_port)),
                to: (key.high.into(), u16::from_be(key.high_port)),
                protocol: key.protocol,
            };
            let expected = self.world.model.flows.get(&ends.key());
            let found = entry(&key, &flow);
            assert!(
                same(Some(&found), expected),
                "seed {}: {ends:?}: expected {expected:#?}, found {found:#?}",
                self.seed
            );
        }
    }

    /// Tells what went before.
    fn fail(&self, body: &Body, why: &str) -> ! {
        let addresses = [body.packet().source, body.packet().destination];
        for (hook, body, verdict) in &self.log {
            let packet = body.packet();
            if addresses.contains(&packet.source) || addresses.contains(&packet.destination) {
                eprintln!(
                    "{hook} {verdict} {:?} flags {:?} {}",
                    ends(packet),
                    packet.transport,
                    matches!(body, Body::Error(..))
                );
            }
        }
        panic!(
            "seed {} after {} packets: {why}\nof {body:?}",
            self.seed, self.done
        );
    }
}

/// The hooks, with the pod's number and the device by which a packet came, or its mark.
#[derive(Clone, Copy)]
enum Hook {
    FromPod(usize),
    ToPod(usize, u32),
    FromNetwork,
    /// From another node that sent it on as it came, with its backend.
    Carried(End),
    ToNetwork(u32),
}

/// The backend that a Geneve packet bears in its option, if it is one.
fn carried_by(frame: &[u8], v6: bool) -> Option<End> {
    let at = 14 + if v6 { 40 } else { 20 };
    let protocol = *frame.get(if v6 { 20 } else { 23 })?;
    let port = frame.get(at + 2..at + 4)?;
    if protocol != 17 || port != 6081_u16.to_be_bytes() {
        return None;
    }
    let option = frame.get(at + 20..at + 38)?;
    let address = Ipv6Addr::from(<[u8; 16]>::try_from(&option[..16]).ok()?);
    let port = u16::from_be_bytes([option[16], option[17]]);
    Some((address.to_canonical(), port))
}

/// The number of the pod that has an address.
fn pod_of(address: IpAddr) -> Option<usize> {
    (0..2 * PODS).find(|index| pod_address(*index) == address)
}

fn remember<T>(ring: &mut VecDeque<T>, item: T) {
    if ring.len() == 100 {
        ring.pop_front();
    }
    ring.push_back(item);
}

/// The key of a flow's entry.
pub fn flow_key(ends: Ends) -> FlowKey {
    let tuple = Tuple {
        source: ends.from.0.into(),
        destination: ends.to.0.into(),
        source_port: ends.from.1.to_be(),
        destination_port: ends.to.1.to_be(),
        protocol: ends.protocol,
        pad: [0; 3],
    };
    FlowKey::new(&tuple).0
}

fn how(turn: u8) -> How {
    How {
        late: turn & TURN_LATE != 0,
        stays: turn & TURN_STAYS != 0,
        direct: turn & TURN_DIRECT != 0,
    }
}

/// The kernel's entry in the model's words.
fn entry(key: &FlowKey, flow: &Flow) -> Entry {
    let end = |address: Ip, port: u16| (IpAddr::from(address), u16::from_be(port));
    let to = &flow.to;
    let becomes = Ends {
        from: end(to.source, to.source_port),
        to: end(to.destination, to.destination_port),
        protocol: to.protocol,
    };
    let turn = (flow.turn & (TURN_FORTH | TURN_BACK) != 0).then_some(Turn {
        forth: flow.turn & TURN_FORTH != 0,
        how: how(flow.turn),
        becomes,
        other: how(flow.other),
    });
    Entry {
        beginner: match flow.from_low {
            0 => end(key.high, key.high_port),
            _ => end(key.low, key.low_port),
        },
        judged: flow.generation,
        rule: flow.rule,
        service: flow.service,
        backend: (flow.backend != 0).then_some((flow.backend, flow.backend_generation)),
        turn,
        kept: (flow.turn == TURN_KEPT).then_some(becomes),
        told: flow.told,
        closed: [CLOSED_FORTH, CLOSED_BACK].map(|end| flow.closed & end != 0),
        paired: flow.paired,
        exempt: flow.exempt != 0,
    }
}

fn same(found: Option<&Entry>, expected: Option<&Entry>) -> bool {
    match (found, expected) {
        (Some(found), Some(expected)) => {
            *found
                == Entry {
                    paired: found.paired,
                    ..*expected
                }
        }
        (found, expected) => found.is_none() && expected.is_none(),
    }
}
