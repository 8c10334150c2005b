//! The rules of the dataplane in plain Rust: what becomes of a packet at each hook, and what is remembered of it.
//!
//! What chance decides (a backend, a port) is taken over from the programs, and checked to be allowed.

use std::collections::HashMap;
use std::net::IpAddr;

use crate::packets::{ACK, FIN, Packet, RST, SYN};

/// An end of a flow.
pub type End = (IpAddr, u16);

/// The ends that a packet names, in its direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ends {
    pub from: End,
    pub to: End,
    pub protocol: u8,
}

impl Ends {
    pub fn back(self) -> Self {
        Self {
            from: self.to,
            to: self.from,
            protocol: self.protocol,
        }
    }

    /// The same for both directions.
    pub fn key(self) -> (End, End, u8) {
        let (low, high) = (self.from.min(self.to), self.from.max(self.to));
        (low, high, self.protocol)
    }
}

/// What the packets of one direction become.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Turn {
    /// The beginner's packets; otherwise the answers.
    pub forth: bool,
    pub how: How,
    pub becomes: Ends,
    /// That of the other entry's packets.
    pub other: How,
}

/// Where packets are translated, and what way they take then.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct How {
    /// Where they leave; otherwise where they come in.
    pub late: bool,
    /// Known to end on this node.
    pub stays: bool,
    /// They go to the backend's node as they came.
    pub direct: bool,
}

/// Where they come in, and go on.
const THROUGH: How = How {
    late: false,
    stays: false,
    direct: false,
};
/// As they came.
const DIRECT: How = How {
    direct: true,
    ..THROUGH
};
/// Where they come in, and stay.
const IN: How = How {
    stays: true,
    ..THROUGH
};
/// Where they leave.
const OUT: How = How {
    late: true,
    ..THROUGH
};

/// What is remembered of a flow under one pair of ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Entry {
    pub beginner: End,
    /// The generation of rules by which it was judged; 0 for none.
    pub judged: u32,
    pub rule: u32,
    pub service: u32,
    /// Number and generation.
    pub backend: Option<(u32, u32)>,
    pub turn: Option<Turn>,
    /// What the packets became of the connection that had this port; it keeps others out.
    pub kept: Option<Ends>,
    /// Flags of TCP that were seen from the beginner and the other end, as far as they are told of.
    pub told: [u8; 2],
    pub closed: Closed,
    /// When its other entry was last seen to be there.
    pub paired: u32,
    /// Whether a process of the node began it, which rules do not bind.
    pub exempt: bool,
}

/// What holds for a packet of a flow.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It was allowed.
    Allowed,
    /// It was allowed by rules of another generation, and this is an answer.
    Again,
    /// It is to be judged.
    New,
}

/// Which ends have closed a connection: the beginner, and the other.
pub type Closed = [bool; 2];
const OPEN: Closed = [false; 2];
const OVER: Closed = [true; 2];

/// Adds the end that closes with a packet; with a reset, both have.
fn close(closed: &mut Closed, flags: u8, forth: bool) {
    if flags & RST != 0 {
        *closed = OVER;
    } else {
        closed[usize::from(!forth)] = true;
    }
}

/// The other end answered.
const ANSWERED: u8 = 0x80;

#[derive(Clone, Debug)]
pub struct Pod {
    pub address: IpAddr,
    pub identity: u32,
    pub ingress: u32,
    pub egress: u32,
}

#[derive(Clone, Copy, Debug)]
pub struct Backend {
    pub end: End,
    pub generation: u32,
    pub ending: bool,
}

#[derive(Clone, Debug, Default)]
pub struct Frontend {
    pub service: u32,
    pub affinity: bool,
    pub external: bool,
    pub drop_inside: bool,
    pub drop_outside: bool,
    pub inside: Vec<u32>,
    pub outside: Vec<u32>,
}

/// A packet as a hook sees it.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    pub ends: Ends,
    /// Flags of TCP.
    pub flags: u8,
    pub ttl: u8,
    /// Of an error, who sent it to whom; the ends are those of the flow that it is about, from its side.
    pub carrier: Option<(IpAddr, IpAddr)>,
    pub later: bool,
    /// Whether the frame is addressed to the device.
    pub here: bool,
}

impl Seen {
    fn begins(&self) -> bool {
        self.is_told() && self.carrier.is_none() && self.flags & (SYN | ACK) == SYN
    }

    /// Whether the protocol's flows say when they begin and end.
    fn is_told(&self) -> bool {
        matches!(self.ends.protocol, 6 | 132)
    }

    /// Whether it may be of a TCP connection that has begun.
    fn goes_on(&self) -> bool {
        self.ends.protocol == 6 && self.carrier.is_none() && self.flags & RST == 0
    }

    fn may_begin(&self) -> bool {
        self.begins() || self.ends.protocol == 17 && !self.later && self.carrier.is_none()
    }

    /// Without a hop left: its sender is told, but not of errors and of parts of datagrams.
    fn exceeded(&self) -> Fate {
        match self.here && !self.later && self.carrier.is_none() {
            true => EXCEEDED,
            false => DROP,
        }
    }

    fn sender(&self) -> IpAddr {
        self.carrier.map_or(self.ends.from.0, |carrier| carrier.0)
    }

    fn receiver(&self) -> IpAddr {
        self.carrier.map_or(self.ends.to.0, |carrier| carrier.1)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Drop,
    Pass,
    /// To a pod of this node, or another way than the stack's.
    Send,
    /// For a Service without endpoints, to whom it came from.
    Answer,
    /// To whom it came from: it has no hop left.
    Exceeded,
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fate {
    pub verdict: Verdict,
    /// What its ends become.
    pub becomes: Option<Ends>,
    /// Nothing is left to be done with it where it leaves.
    pub done: bool,
    /// The backend to whose node it goes as it came.
    pub direct: Option<End>,
}

const DROP: Fate = Fate {
    verdict: Verdict::Drop,
    becomes: None,
    done: false,
    direct: None,
};

const ANSWER: Fate = Fate {
    verdict: Verdict::Answer,
    ..DROP
};

const EXCEEDED: Fate = Fate {
    verdict: Verdict::Exceeded,
    ..DROP
};

const PASS: Fate = Fate {
    verdict: Verdict::Pass,
    ..DROP
};

/// What a frontend offers to a client.
enum Offer {
    NoService,
    Refused,
    Dropped,
    /// Its service, and the backends of which one is chosen.
    Any(u32, Vec<u32>),
}

/// What the programs made of the packet, where chance decides.
#[derive(Clone, Copy, Debug)]
pub struct Made {
    pub dropped: bool,
    pub sent: bool,
    pub from_port: u16,
    pub to: End,
    /// The backend that the programs remember for the client and Service by now.
    pub remembered: Option<u32>,
}

pub struct Model {
    /// In ticks.
    pub now: u32,
    pub flows: HashMap<(End, End, u8), Entry>,
    pub pods: Vec<Pod>,
    /// Node addresses, and whether they are this node's.
    pub nodes: HashMap<IpAddr, bool>,
    pub identities: HashMap<IpAddr, u32>,
    /// Sets: peer (0 for any), protocol, port.
    pub sets: HashMap<u32, Vec<(u32, u8, u16)>>,
    pub generation: u32,
    pub backends: HashMap<u32, Backend>,
    /// By address; none for node ports.
    pub frontends: HashMap<(Option<IpAddr>, bool, u16, u8), Frontend>,
    pub affinities: HashMap<(IpAddr, u32), (u32, u32)>,
    pub native: Vec<IpAddr>,
    /// Pods' packets go around the stack.
    pub around: bool,
    /// Protocols of which backends answer directly.
    pub direct: Vec<u8>,
    pub ports: std::ops::RangeInclusive<u16>,
}

impl Model {
    fn pod(&self, address: IpAddr) -> Option<&Pod> {
        self.pods.iter().find(|pod| pod.address == address)
    }

    /// The node's address of the same family.
    fn node(&self, like: IpAddr) -> IpAddr {
        let mut own = self.nodes.iter().filter(|(_, own)| **own);
        *own.find(|(address, _)| address.is_ipv4() == like.is_ipv4())
            .unwrap()
            .0
    }

    fn is_own(&self, address: IpAddr) -> bool {
        self.nodes.get(&address) == Some(&true)
    }

    /// Whether a packet's way ends on this node.
    fn is_here(&self, address: IpAddr) -> bool {
        self.is_own(address) || self.pod(address).is_some()
    }

    fn identity(&self, address: IpAddr) -> u32 {
        self.identities.get(&address).copied().unwrap_or(2)
    }

    fn allows(&self, set: u32, peer: u32, ends: Ends) -> bool {
        set == 0
            || self.sets.get(&set).is_some_and(|set| {
                set.iter().any(|(who, protocol, port)| {
                    (*who == 0 || *who == peer) && *protocol == ends.protocol && *port == ends.to.1
                })
            })
    }

    fn has_backend(&self, entry: &Entry) -> bool {
        entry.backend.is_none_or(|(number, generation)| {
            self.backends[&number].generation == generation && generation % 2 == 1
        })
    }

    /// Whether the flow was allowed and that holds; and what is known of it: whether this is an answer, its Service.
    fn known(&mut self, seen: &Seen) -> (Standing, bool, u32) {
        let generation = self.generation;
        let Some(entry) = self.flows.get_mut(&seen.ends.key()) else {
            return (Standing::New, false, 0);
        };
        let reply = entry.beginner != seen.ends.from;
        if seen.carrier.is_some() {
            let standing = match entry.judged {
                0 => Standing::New,
                _ => Standing::Allowed,
            };
            return (standing, true, entry.service);
        }
        if seen.begins() || entry.judged == 0 {
            return (Standing::New, reply, entry.service);
        }
        if entry.judged != generation && !(reply && entry.exempt) {
            let standing = match reply {
                true => Standing::Again,
                false => Standing::New,
            };
            return (standing, reply, entry.service);
        }
        // Each end's first flags are told of, and the first answer of what has none.
        let news = match seen.is_told() {
            true => seen.flags & (SYN | FIN | RST),
            false => u8::from(reply),
        };
        let told = &mut entry.told[usize::from(reply)];
        if news & !*told != 0 {
            if reply && *told == 0 {
                entry.paired = 0;
            }
            *told |= news;
            if seen.is_told() && news & (FIN | RST) != 0 {
                close(&mut entry.closed, seen.flags, !reply);
            }
        }
        (Standing::Allowed, reply, entry.service)
    }

    /// Judges an answer by the rules for what it answers: the rule that lets it through, 0 where none is needed.
    fn judge_answer(&self, asked: &[(u32, IpAddr)], seen: &Seen) -> Option<u32> {
        let back = seen.ends.back();
        let mut rule = 0;
        for (set, peer) in asked {
            if !self.allows(*set, self.identity(*peer), back) {
                return None;
            }
            if *set != 0 {
                rule = 42;
            }
        }
        Some(rule)
    }

    /// Notes that a flow is allowed by the rules of today, too.
    fn renew(&mut self, seen: &Seen, rule: u32) {
        if let Some(entry) = self.flows.get_mut(&seen.ends.key()) {
            (entry.judged, entry.rule) = (self.generation, rule);
        }
    }

    /// What the packet becomes by what is remembered of its flow, and how that is done.
    fn translation(&mut self, seen: &Seen) -> Option<(Ends, How)> {
        let key = seen.ends.key();
        let mut entry = *self.flows.get(&key)?;
        let turn = entry.turn?;
        let forth = entry.beginner == seen.ends.from;
        if turn.forth != forth {
            return None;
        }
        if seen.carrier.is_some() {
            return Some((turn.becomes, turn.how));
        }
        let (connection, answered) = (seen.is_told(), entry.told[1] != 0);
        if forth && entry.backend.is_some() {
            // A connection that is sent again before it was answered is the same; later it is another.
            if seen.begins() && (answered || entry.closed != OPEN) {
                return None;
            }
            // All but an open connection leave a backend that is gone.
            let open = connection && answered;
            if !open && !self.has_backend(&entry) {
                return None;
            }
        }
        if !forth && !answered {
            entry.told[1] |= ANSWERED;
            entry.paired = 0;
        }
        let ends = connection && seen.flags & (FIN | RST) != 0;
        if seen.begins() {
            entry.closed = OPEN;
        }
        if ends {
            close(&mut entry.closed, seen.flags, forth);
        }
        if turn.how.direct {
            // The client's own words tell that there was an answer.
            if connection && seen.flags & (SYN | ACK) == ACK {
                entry.told[1] = ANSWERED;
            }
        } else if ends || entry.paired != self.now {
            entry.paired = self.now;
            if !self.pair(&entry, turn, seen.ends) {
                self.flows.remove(&key);
                return None;
            }
        }
        self.flows.insert(key, entry);
        Some((turn.becomes, turn.how))
    }

    /// Tells the other entry, or makes it again; false if its place is another flow's.
    fn pair(&mut self, entry: &Entry, turn: Turn, ends: Ends) -> bool {
        let back = Turn {
            forth: !turn.forth,
            how: turn.other,
            becomes: ends.back(),
            other: turn.how,
        };
        if let Some(other) = self.flows.get_mut(&turn.becomes.key()) {
            let same = other.turn.is_some_and(|found| {
                (found.forth, found.how, found.becomes) == (back.forth, back.how, back.becomes)
            });
            if same {
                other.closed = entry.closed;
                other.told[1] |= entry.told[1];
            }
            return same;
        }
        let other = Entry {
            beginner: if turn.forth {
                turn.becomes.from
            } else {
                turn.becomes.to
            },
            turn: Some(back),
            ..*entry
        };
        self.flows.insert(turn.becomes.key(), other);
        true
    }

    /// Whether an entry keeps its place: a connection that ended and was not translated leaves it, and so does what
    /// is left of a flow whose other half is gone.
    fn is_held(&self, entry: &Entry) -> bool {
        if entry.kept.is_some() {
            return true;
        }
        let Some(turn) = entry.turn else {
            return entry.closed == OPEN;
        };
        let half = self.flows.get(&turn.becomes.key());
        let half = half.and_then(|half| half.turn);
        half.is_some_and(|half| (half.forth, half.how) == (!turn.forth, turn.other))
    }

    /// Remembers a flow that is translated; false if the place of its other entry is taken.
    fn enter_pair(
        &mut self,
        new: Entry,
        ends: Ends,
        becomes: Ends,
        (how, other): (How, How),
    ) -> bool {
        let back = Turn {
            forth: false,
            how: other,
            becomes: ends.back(),
            other: how,
        };
        if let Some(old) = self.flows.get(&becomes.key()) {
            let same = old.turn.is_some_and(|found| {
                (found.forth, found.how, found.becomes) == (back.forth, back.how, back.becomes)
            });
            if !same && old.kept != Some(back.becomes) && self.is_held(old) {
                return false;
            }
        }
        let new = Entry {
            paired: self.now,
            ..new
        };
        let (there, here) = (
            Entry {
                beginner: becomes.from,
                turn: Some(back),
                ..new
            },
            Entry {
                beginner: ends.from,
                turn: Some(Turn {
                    forth: true,
                    how,
                    becomes,
                    other,
                }),
                ..new
            },
        );
        self.flows.insert(becomes.key(), there);
        self.flows.insert(ends.key(), here);
        true
    }

    /// The same with a source port: its own if the source stays whose it was and the place is free, the one that it
    /// had before, otherwise one of the node's. None if there is none.
    fn enter_with_port(
        &mut self,
        new: Entry,
        ends: Ends,
        mut becomes: Ends,
        hows: (How, How),
        former: Option<u16>,
        made: &Made,
    ) -> Option<Ends> {
        let fixed = !matches!(ends.protocol, 1 | 6 | 17 | 58 | 132);
        if let Some(port) = former {
            becomes.from.1 = port;
        }
        if (fixed || becomes.from.0 == ends.from.0 || former.is_some())
            && self.enter_pair(new, ends, becomes, hows)
        {
            return Some(becomes);
        }
        if fixed {
            return None;
        }
        if made.dropped {
            // Only where none is left.
            for port in self.ports.clone() {
                becomes.from.1 = port;
                if matches!(ends.protocol, 1 | 58) {
                    becomes.to.1 = port;
                }
                let taken = self.flows.get(&becomes.key());
                assert!(
                    taken.is_some_and(|entry| self.is_held(entry)),
                    "the port {port} is free"
                );
            }
            return None;
        }
        assert!(
            self.ports.contains(&made.from_port),
            "the port {}",
            made.from_port
        );
        becomes.from.1 = made.from_port;
        if matches!(ends.protocol, 1 | 58) {
            becomes.to.1 = made.from_port;
        }
        assert!(
            self.enter_pair(new, ends, becomes, hows),
            "the port {} is another flow's",
            made.from_port
        );
        Some(becomes)
    }

    /// Remembers a flow that is not translated here.
    fn enter(&mut self, seen: &Seen, rule: u32, exempt: bool) {
        let told = [seen.flags & (SYN | FIN | RST), 0];
        if let Some(old) = self.flows.get_mut(&seen.ends.key()) {
            let over = old.closed != OPEN && seen.begins();
            // What was translated elsewhere on its way here stays translated.
            if old.beginner == seen.ends.from && !over {
                (old.judged, old.rule) = (self.generation, rule);
                old.exempt = exempt;
                // Judged anew it is still the same: who answered has answered.
                match seen.begins() {
                    true => old.told = told,
                    false => old.told[0] |= told[0],
                }
                return;
            }
        }
        let new = Entry {
            judged: self.generation,
            rule,
            told,
            exempt,
            ..self.plain(seen.ends.from)
        };
        self.flows.insert(seen.ends.key(), new);
    }

    fn plain(&self, beginner: End) -> Entry {
        Entry {
            beginner,
            judged: 0,
            rule: 0,
            service: 0,
            backend: None,
            turn: None,
            kept: None,
            told: [0; 2],
            closed: OPEN,
            paired: 0,
            exempt: false,
        }
    }

    fn front(&self, ends: Ends, inside: bool) -> Option<&Frontend> {
        let (address, port) = ends.to;
        let found = self
            .frontends
            .get(&(Some(address), address.is_ipv4(), port, ends.protocol));
        if found.is_none() && self.nodes.get(&address).is_some_and(|own| inside || *own) {
            return self
                .frontends
                .get(&(None, address.is_ipv4(), port, ends.protocol));
        }
        found
    }

    /// Whether a flow from outside to a backend goes to its node as it is.
    fn is_direct(&self, ends: Ends, backend: IpAddr) -> bool {
        self.direct.contains(&ends.protocol)
            && self.front(ends, false).is_some_and(|front| front.external)
            && self.native.contains(&backend)
            && !self.native.contains(&ends.from.0)
    }

    fn offer(&self, ends: Ends, inside: bool) -> Offer {
        let Some(front) = self.front(ends, inside) else {
            return Offer::NoService;
        };
        let (run, drops) = if inside || !front.external {
            (&front.inside, front.drop_inside)
        } else {
            (&front.outside, front.drop_outside)
        };
        if run.is_empty() {
            return if drops {
                Offer::Dropped
            } else {
                Offer::Refused
            };
        }
        if front.affinity {
            if let Some((number, generation)) = self.affinities.get(&(ends.from.0, front.service)) {
                let backend = &self.backends[number];
                if backend.generation == *generation && generation % 2 == 1 && !backend.ending {
                    return Offer::Any(front.service, vec![*number]);
                }
            }
        }
        Offer::Any(front.service, run.clone())
    }

    /// Whether the ends' Service has no endpoints, and says so.
    fn refuses(&self, ends: Ends, inside: bool) -> bool {
        matches!(self.offer(ends, inside), Offer::Refused)
    }

    /// The backend that the programs chose of those that are offered; none where that can't be seen.
    fn chosen(&mut self, ends: Ends, service: u32, offered: &[u32], made: &Made) -> Option<u32> {
        let chosen = if made.dropped {
            made.remembered
        } else {
            let found = offered.iter().copied();
            // Several may have one address.
            let mut found = found.filter(|number| self.backends[number].end == made.to);
            let first = found.next();
            assert!(
                first.is_some(),
                "{:?} is none of the backends {offered:?}",
                made.to
            );
            made.remembered.or(first)
        };
        self.remember(ends, service, offered, made);
        chosen
    }

    /// Takes over which backend a client has.
    fn remember(&mut self, ends: Ends, service: u32, offered: &[u32], made: &Made) -> Option<u32> {
        let number = made.remembered?;
        assert!(offered.contains(&number), "{number} is none of {offered:?}");
        let generation = self.backends[&number].generation;
        self.affinities
            .insert((ends.from.0, service), (number, generation));
        Some(number)
    }

    pub fn has_affinity(&self, ends: Ends) -> Option<u32> {
        let (address, port) = ends.to;
        let v4 = address.is_ipv4();
        let own = self
            .frontends
            .get(&(Some(address), v4, port, ends.protocol));
        let node = self
            .nodes
            .contains_key(&address)
            .then_some((None, v4, port, ends.protocol));
        let front = own.or_else(|| self.frontends.get(&node?))?;
        front.affinity.then_some(front.service)
    }

    /// Out of a pod.
    pub fn leaves_pod(&mut self, pod: usize, seen: &Seen, made: &Made) -> Fate {
        let pod = self.pods[pod].clone();
        if seen.sender() != pod.address || seen.ends.from.0 != pod.address {
            return DROP;
        }
        self.give_way(seen);
        let (mut standing, mut reply, mut service) = self.known(seen);
        let (mut becomes, mut late) = (None, None);
        match self.translation(seen) {
            // Towards pods of this node there is no other hook.
            Some((ends, how)) if how.late && self.pod(ends.to.0).is_none() => late = Some(ends),
            Some((ends, _)) => becomes = Some(ends),
            None => {}
        }
        let mut answers = self.answers(seen);
        if standing == Standing::Again {
            let other = seen.ends.to.0;
            let mut asked = Vec::new();
            // An agent of before did not note what the node began.
            if self.identity(other) != 1 {
                asked.push((pod.ingress, other));
            }
            let beginner = becomes.map_or(other, |ends: Ends| ends.to.0);
            if let Some(beginner) = self.pod(beginner) {
                asked.push((beginner.egress, seen.ends.from.0));
            }
            let Some(rule) = self.judge_answer(&asked, seen) else {
                return DROP;
            };
            self.renew(seen, rule);
            (standing, reply, service) = self.known(seen);
        }
        let yes = standing == Standing::Allowed;
        let mut looked_again = false;
        if !(yes && (becomes.is_some() || reply || service == 0)) {
            // Where it leaves it is looked for again.
            looked_again = late.take().is_some();
            answers = false;
            let offer = match becomes.is_none() {
                true if seen.may_begin() => self.offer(seen.ends, true),
                true if seen.goes_on() && self.refuses(seen.ends, true) => Offer::Refused,
                _ => Offer::NoService,
            };
            match offer {
                Offer::Refused if seen.here => return ANSWER,
                Offer::Refused | Offer::Dropped => return DROP,
                Offer::NoService => {
                    let ends = becomes.unwrap_or(seen.ends);
                    let Some(rule) = self.judged(&pod, seen, ends) else {
                        return DROP;
                    };
                    if seen.carrier.is_none() {
                        self.enter(seen, rule, false);
                    }
                }
                Offer::Any(service, offered) => {
                    let number = self.chosen(seen.ends, service, &offered, made);
                    let to = |number: &u32| Ends {
                        to: self.backends[number].end,
                        ..seen.ends
                    };
                    if made.dropped {
                        // One that may not be asked, or whose place is taken and can't be changed.
                        let mut offered = number.map_or(offered, |number| vec![number]);
                        let all = offered.len();
                        offered.retain(|number| self.judged(&pod, seen, to(number)).is_some());
                        let refused = offered.len() < all;
                        assert!(
                            refused || offered.is_empty(),
                            "all of {offered:?} may be asked"
                        );
                        return DROP;
                    }
                    let number = number.unwrap();
                    let mut ends = to(&number);
                    let Some(rule) = self.judged(&pod, seen, ends) else {
                        return DROP;
                    };
                    // Whom the backend must take for the node: the pod itself, or one that has no way to pods.
                    let as_node = ends.to.0 == ends.from.0 || !self.native.contains(&ends.to.0);
                    if as_node {
                        ends.from.0 = self.node(ends.to.0);
                    }
                    let new = Entry {
                        judged: self.generation,
                        rule,
                        service,
                        backend: Some((number, self.backends[&number].generation)),
                        told: [seen.flags & SYN, 0],
                        ..self.plain(seen.ends.from)
                    };
                    let former = self.part(seen.ends, ends);
                    let hows = (THROUGH, if as_node { IN } else { OUT });
                    becomes = self.enter_with_port(new, seen.ends, ends, hows, former, made);
                    if becomes.is_none() {
                        return DROP;
                    }
                }
            }
        }
        let receiver = becomes.map_or(seen.receiver(), |ends| ends.to.0);
        let as_node = becomes.is_some_and(|becomes| becomes.from.0 != seen.ends.from.0);
        if as_node && self.pod(receiver).is_none() {
            return match seen.ttl {
                0 | 1 => seen.exceeded(),
                _ => Fate {
                    verdict: Verdict::Send,
                    becomes,
                    done: true,
                    direct: None,
                },
            };
        }
        let here = self.pod(receiver).is_some();
        let around = self.around && seen.here && seen.carrier.is_none();
        let sent = (here || around) && seen.ttl > 1;
        let leaves = sent && !here;
        let done = late.is_some() || answers || self.native.contains(&receiver) && !looked_again;
        if leaves {
            becomes = becomes.or(late);
        }
        Fate {
            verdict: if sent { Verdict::Send } else { Verdict::Pass },
            becomes,
            done: leaves && done,
            direct: None,
        }
    }

    /// Forgets the flow of datagrams that were translated to the very ends that a pod's datagram has by itself.
    fn give_way(&mut self, seen: &Seen) {
        let key = seen.ends.key();
        let Some(entry) = self.flows.get(&key) else {
            return;
        };
        let Some(turn) = entry.turn.filter(|turn| !turn.forth) else {
            return;
        };
        if seen.ends.protocol == 17 && seen.carrier.is_none() && entry.beginner == seen.ends.from {
            self.flows.remove(&turn.becomes.key());
            self.flows.remove(&key);
        }
    }

    /// The rule that lets a pod's packet go to these ends, 0 where none is needed; none if it may not.
    fn judged(&self, pod: &Pod, seen: &Seen, ends: Ends) -> Option<u32> {
        if !self.allows(pod.egress, self.identity(ends.to.0), ends) {
            return None;
        }
        let mut rule = if pod.egress != 0 { 42 } else { 0 };
        if let Some(to) = self.pod(ends.to.0) {
            if !self.allows(to.ingress, self.identity(seen.ends.from.0), ends) {
                return None;
            }
            if to.ingress != 0 {
                rule = 42;
            }
        }
        Some(rule)
    }

    /// Parts from the translation of a flow that is about to begin anew: the port that it had, if it becomes the same
    /// again but for that. If not, a connection's port is kept from others.
    fn part(&mut self, ends: Ends, becomes: Ends) -> Option<u16> {
        let turn = self.flows.get(&ends.key())?.turn?;
        if turn.how.direct {
            return None;
        }
        let changed = turn.becomes.from.0 != ends.from.0;
        let same = (turn.becomes.from.0, turn.becomes.to) == (becomes.from.0, becomes.to);
        if changed && turn.forth && same {
            return Some(turn.becomes.from.1);
        }
        let key = turn.becomes.key();
        let other = self.flows.get_mut(&key)?;
        let theirs = other.turn?;
        if (theirs.forth, theirs.how, theirs.becomes) != (!turn.forth, turn.other, ends.back()) {
            return None;
        }
        if changed && matches!(ends.protocol, 6 | 132) {
            other.turn = None;
            other.kept = Some(theirs.becomes);
            other.closed = OVER;
        } else {
            self.flows.remove(&key);
        }
        None
    }

    /// Into a pod, from the stack; `own` is what a process of the node sent.
    pub fn enters_pod(&mut self, pod: usize, own: bool, seen: &Seen) -> Fate {
        let pod = self.pods[pod].clone();
        if seen.receiver() != pod.address || seen.ends.to.0 != pod.address {
            return DROP;
        }
        let (mut standing, _, _) = self.known(seen);
        let becomes = self
            .translation(seen)
            .and_then(|(ends, how)| how.late.then_some(ends));
        if standing == Standing::Again {
            let asked = [(pod.egress, seen.ends.from.0)];
            let Some(rule) = self.judge_answer(&asked, seen) else {
                return DROP;
            };
            self.renew(seen, rule);
            self.known(seen);
            standing = Standing::Allowed;
        }
        if standing != Standing::Allowed {
            let asked = pod.ingress != 0 && !own;
            if asked && !self.allows(pod.ingress, self.identity(seen.ends.from.0), seen.ends) {
                return DROP;
            }
            if seen.carrier.is_none() {
                self.enter(seen, if asked { 42 } else { 0 }, own);
            }
        }
        Fate { becomes, ..PASS }
    }

    /// In from the network, and at once into the pod that it is for.
    pub fn comes_around(&mut self, seen: &Seen, made: &Made, carried: Option<End>) -> Fate {
        let first = match carried {
            Some(backend) => self.comes_carried(seen, made, backend),
            None => self.comes_in(seen, made),
        };
        let ends = first.becomes.unwrap_or(seen.ends);
        let pod = self.pods.iter().position(|pod| pod.address == ends.to.0);
        let (Verdict::Pass, Some(pod)) = (first.verdict, pod) else {
            return first;
        };
        if !self.around || !seen.here || seen.ttl <= 1 || seen.carrier.is_some() {
            return first;
        }
        // Who claims to be a pod of this node is left to the stack.
        if self.pod(ends.from.0).is_some() {
            return first;
        }
        let second = self.enters_pod(pod, false, &Seen { ends, ..*seen });
        Fate {
            verdict: match second.verdict {
                Verdict::Pass => Verdict::Send,
                other => other,
            },
            becomes: second.becomes.or(first.becomes),
            done: false,
            direct: None,
        }
    }

    /// In from the network.
    pub fn comes_in(&mut self, seen: &Seen, made: &Made) -> Fate {
        self.give_way(seen);
        let known = match self.translation(seen) {
            Some((ends, DIRECT)) => return self.directly(seen, ends.to),
            Some((ends, how)) => (!how.late).then_some(ends),
            None => None,
        };
        let unknown = !self.flows.contains_key(&seen.ends.key());
        let answers = self.answers(seen);
        let becomes = match known {
            Some(ends) => ends,
            None => {
                if !seen.may_begin() {
                    let stray = unknown && seen.goes_on() && !self.is_own(seen.ends.to.0);
                    return match stray && seen.here && self.refuses(seen.ends, false) {
                        true => ANSWER,
                        false => PASS,
                    };
                }
                if !seen.begins() && answers {
                    return PASS;
                }
                let (service, offered) = match self.offer(seen.ends, false) {
                    Offer::Refused if seen.here => return ANSWER,
                    Offer::NoService | Offer::Refused => return PASS,
                    Offer::Dropped => return DROP,
                    Offer::Any(service, offered) => (service, offered),
                };
                if seen.ttl <= 1 && (made.dropped || made.sent) {
                    // Which one it would have been can't be seen, but not one that is here.
                    let number = self.remember(seen.ends, service, &offered, made);
                    let chosen = number.map_or(offered, |number| vec![number]);
                    assert!(
                        chosen
                            .iter()
                            .any(|one| !self.is_here(self.backends[one].end.0)),
                        "one of {chosen:?} is here"
                    );
                    return seen.exceeded();
                }
                assert!(
                    !made.dropped,
                    "a new flow to the Service {service} was dropped"
                );
                let number = self.chosen(seen.ends, service, &offered, made).unwrap();
                let mut ends = Ends {
                    to: self.backends[&number].end,
                    ..seen.ends
                };
                let stays = self.is_here(ends.to.0);
                let direct = !stays && self.is_direct(seen.ends, ends.to.0);
                if !stays && !direct {
                    ends.from.0 = self.node(ends.to.0);
                }
                let new = Entry {
                    service,
                    backend: Some((number, self.backends[&number].generation)),
                    ..self.plain(seen.ends.from)
                };
                let former = self.part(seen.ends, ends);
                if direct {
                    self.enter_direct(new, seen.ends, ends);
                    return self.directly(seen, ends.to);
                }
                let hows = if stays { (IN, OUT) } else { (THROUGH, THROUGH) };
                match self.enter_with_port(new, seen.ends, ends, hows, former, made) {
                    Some(ends) => ends,
                    None => return DROP,
                }
            }
        };
        self.sent_on(seen, becomes)
    }

    /// What was translated where it came in stays, or is sent on.
    fn sent_on(&self, seen: &Seen, becomes: Ends) -> Fate {
        let verdict = match (self.is_here(becomes.to.0), seen.ttl) {
            (true, _) => Verdict::Pass,
            (false, 0 | 1) => return seen.exceeded(),
            (false, _) => Verdict::Send,
        };
        Fate {
            verdict,
            becomes: Some(becomes),
            done: verdict == Verdict::Send,
            direct: None,
        }
    }

    /// To the node of its backend as it came.
    fn directly(&self, seen: &Seen, backend: End) -> Fate {
        if seen.ttl <= 1 {
            return seen.exceeded();
        }
        Fate {
            verdict: Verdict::Send,
            becomes: None,
            done: true,
            direct: Some(backend),
        }
    }

    /// Remembers a flow whose packets go to the backend's node as they came.
    fn enter_direct(&mut self, new: Entry, ends: Ends, becomes: Ends) {
        let turn = Turn {
            forth: true,
            how: DIRECT,
            becomes,
            other: THROUGH,
        };
        let new = Entry {
            turn: Some(turn),
            ..new
        };
        self.flows.insert(ends.key(), new);
    }

    /// In from another node that sent it on as it came, with the backend that it chose.
    fn comes_carried(&mut self, seen: &Seen, made: &Made, backend: End) -> Fate {
        if !self.is_here(backend.0) {
            return DROP;
        }
        // A connection that begins anew is another.
        let begun = self
            .flows
            .get(&seen.ends.key())
            .is_some_and(|entry| entry.told[1] != 0 || entry.closed != OPEN);
        if !(seen.begins() && begun) {
            if let Some((ends, THROUGH | IN)) = self.translation(seen) {
                if ends.to == backend || seen.carrier.is_some() {
                    return self.sent_on(seen, ends);
                }
            }
        }
        if seen.carrier.is_some() || seen.later {
            return DROP;
        }
        let service = self.front(seen.ends, true).map_or(0, |front| front.service);
        let ends = Ends {
            to: backend,
            ..seen.ends
        };
        let new = Entry {
            service,
            ..self.plain(seen.ends.from)
        };
        let former = self.part(seen.ends, ends);
        match self.enter_with_port(new, seen.ends, ends, (IN, OUT), former, made) {
            Some(ends) => self.sent_on(seen, ends),
            None => DROP,
        }
    }

    /// Whether the packet answers a flow that the other end began.
    fn answers(&self, seen: &Seen) -> bool {
        let entry = self.flows.get(&seen.ends.key());
        entry.is_some_and(|entry| entry.beginner != seen.ends.from)
    }

    /// Out to the network.
    pub fn goes_out(&mut self, seen: &Seen, made: &Made) -> Fate {
        let pod = self.pod(seen.ends.from.0).is_some();
        if !pod && !self.is_own(seen.ends.from.0) {
            return PASS;
        }
        let before = self.flows.get(&seen.ends.key()).copied();
        if let Some((ends, OUT)) = self.translation(seen) {
            return Fate {
                becomes: Some(ends),
                ..PASS
            };
        }
        if !pod
            || seen.carrier.is_some()
            || self.answers(seen)
            || self.native.contains(&seen.ends.to.0)
        {
            return PASS;
        }
        let mut new = self.plain(seen.ends.from);
        if let Some(old) = before {
            (new.judged, new.rule, new.told) = (old.judged, old.rule, old.told);
        }
        let mut ends = seen.ends;
        ends.from.0 = self.node(ends.to.0);
        match self.enter_with_port(new, seen.ends, ends, (OUT, IN), None, made) {
            Some(ends) => Fate {
                becomes: Some(ends),
                ..PASS
            },
            None => DROP,
        }
    }
}

/// A packet with the ends that it becomes; an error's own sender and receiver, and what it quotes.
pub fn changed(packet: &Packet, ends: Ends) -> Packet {
    let mut new = packet.clone();
    (new.source, new.destination) = (ends.from.0, ends.to.0);
    new.destination_port = ends.to.1;
    match ends.protocol {
        1 | 58 => new.set_source_port(ends.from.1),
        _ => new.source_port = ends.from.1,
    }
    new
}
