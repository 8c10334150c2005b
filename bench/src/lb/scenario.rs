//! The scenarios of `xdp-lb`, under the names of the Linux kernel's `bench xdp-lb`.

use super::frame::{ACK, Content, RST, SYN};

/// Which flows the frames belong to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flows {
    /// Always the same.
    One,
    /// Any of so many.
    Many(u32),
    /// A new one each time.
    Fresh,
    /// Any of so many, or a new one.
    Half(u32),
}

impl Flows {
    /// How many there are before anything is measured.
    pub fn known(self) -> u32 {
        match self {
            Flows::One => 1,
            Flows::Many(flows) | Flows::Half(flows) => flows,
            Flows::Fresh => 0,
        }
    }
}

/// What shall become of the frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Becomes {
    /// They go to a backend.
    Sent,
    /// They are left as they are, or sent on by a router without another change.
    Same,
    /// They are left as they are, or dropped.
    SameOrDropped,
}

/// One scenario.
pub struct Scenario {
    /// Its name.
    pub name: &'static str,
    /// What the frames are.
    pub content: Content,
    /// Whose they are.
    pub flows: Flows,
    /// What begins the flows, before anything is measured.
    pub begins: Option<Content>,
    /// Whether they are of IPv6.
    pub six: bool,
    /// Whether they go to a Service.
    pub service: bool,
    /// What shall become of them.
    pub becomes: Becomes,
}

const fn hit(name: &'static str, content: Content, begins: Content, flows: Flows) -> Scenario {
    Scenario {
        name,
        content,
        flows,
        begins: Some(begins),
        six: false,
        service: true,
        becomes: Becomes::Sent,
    }
}

const fn other(name: &'static str, content: Content, service: bool, becomes: Becomes) -> Scenario {
    Scenario {
        name,
        content,
        flows: Flows::One,
        begins: None,
        six: false,
        service,
        becomes,
    }
}

const fn six(mut scenario: Scenario) -> Scenario {
    scenario.six = true;
    scenario
}

const KNOWN: Content = Content::Tcp(ACK);
const NEW: Content = Content::Tcp(SYN);

/// Those that are measured. `tcp-v4-lru-256k` is ours: the kernel's has no working set of this size.
pub const SCENARIOS: &[Scenario] = &[
    hit("tcp-v4-lru-hit", KNOWN, NEW, Flows::One),
    hit("udp-v4-lru-hit", Content::Udp, Content::Udp, Flows::One),
    six(hit("tcp-v6-lru-hit", KNOWN, NEW, Flows::One)),
    six(hit(
        "udp-v6-lru-hit",
        Content::Udp,
        Content::Udp,
        Flows::One,
    )),
    hit("tcp-v4-lru-diverse", KNOWN, NEW, Flows::Many(4_096)),
    hit(
        "udp-v4-lru-diverse",
        Content::Udp,
        Content::Udp,
        Flows::Many(4_096),
    ),
    six(hit("tcp-v6-lru-diverse", KNOWN, NEW, Flows::Many(4_096))),
    hit("tcp-v4-lru-256k", KNOWN, NEW, Flows::Many(262_144)),
    hit("tcp-v4-syn", NEW, NEW, Flows::One),
    Scenario {
        name: "tcp-v4-rst-miss",
        content: Content::Tcp(RST),
        flows: Flows::Fresh,
        begins: None,
        six: false,
        service: true,
        becomes: Becomes::SameOrDropped,
    },
    Scenario {
        name: "tcp-v4-lru-miss",
        content: NEW,
        flows: Flows::Fresh,
        begins: None,
        six: false,
        service: true,
        becomes: Becomes::Sent,
    },
    Scenario {
        name: "udp-v4-lru-miss",
        content: Content::Udp,
        flows: Flows::Fresh,
        begins: None,
        six: false,
        service: true,
        becomes: Becomes::Sent,
    },
    hit("tcp-v4-lru-warmup", NEW, NEW, Flows::Half(4_096)),
    other("pass-v4-no-vip", KNOWN, false, Becomes::Same),
    six(other("pass-v6-no-vip", KNOWN, false, Becomes::Same)),
    other("pass-v4-icmp", Content::Echo, true, Becomes::SameOrDropped),
    other("pass-non-ip", Content::Arp, false, Becomes::Same),
    other(
        "drop-v4-frag",
        Content::Fragment,
        true,
        Becomes::SameOrDropped,
    ),
    other(
        "drop-v4-options",
        Content::Options,
        true,
        Becomes::SameOrDropped,
    ),
    six(other(
        "drop-v6-frag",
        Content::Fragment,
        true,
        Becomes::SameOrDropped,
    )),
];

/// Those of the kernel's names that are not, and why.
pub const LEFT_OUT: &[(&str, &str)] = &[
    (
        "tcp-v4-ch, tcp-v4-ch-diverse, tcp-v6-ch, tcp-v6-ch-diverse",
        "a flow is always entered, so there is no choice of a backend without it: see tcp-v4-lru-miss",
    ),
    (
        "tcp-v4v6-lru-hit",
        "a frontend's backends are of its own family: nothing is encapsulated",
    ),
];

/// The place of a scenario among [`SCENARIOS`].
pub fn place(name: &str) -> Option<usize> {
    SCENARIOS.iter().position(|one| one.name == name)
}
