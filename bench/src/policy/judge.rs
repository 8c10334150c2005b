//! The part that runs the agent's program under rules: for packets that come from other nodes to a pod of this one.
//!
//! Each peer is a pod of its own with a label of its own, so it has an identity and, for each port, an entry of its own
//! in the kernel. There are two pods of this node: one that the rules are for, and one that none is for. The program is
//! run in the kernel's own loop as in `xdp-lb` (see [`wrap`]): the sender's address and the receiver's port are written
//! anew for each run. What begins a connection is judged each time, whether the flow is known or not.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::node::{DEVICE, Node};
use crate::lb::frame::{ACK, Content, Frame, SYN};
use crate::lb::kernel::{Kind, Program};
use crate::lb::wrap::{self, Pick, Vary, Wrapped};
use crate::row::median;
use crate::services::part;

/// The hook of what is about to enter a pod.
const PROGRAM: &str = "xebec_to_pod";
/// The first port that a rule lets through to.
const PORT: u16 = 8_000;
/// One that none does.
const NO_PORT: u16 = 9;
/// The label that tells peers apart.
const LABEL: &str = "peer";
/// The device that packets are said to have come by: they are none of the node's own.
const RECEIVED: u32 = 5;
/// `TC_ACT_SHOT`.
const SHOT: u32 = 2;
/// How many flows of one pod are entered before those of the other, a power of two.
const TURN: u32 = 1_024;
/// Entries of the table of flows, where a fourth as many rules, or fewer, are there.
const FLOWS: u32 = xebec_agent::loader::FLOWS;

#[derive(clap::Args)]
pub struct Args {
    /// Where a BPF filesystem is mounted
    #[arg(long)]
    dir: PathBuf,
    /// Peers with an identity of their own, a power of two
    #[arg(long)]
    peers: u32,
    /// Ports that each may speak to, a power of two
    #[arg(long)]
    ports: u32,
}

/// Which packets.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Packets {
    /// To nobody: an empty program.
    None,
    /// To the pod that no rule is for.
    Free,
    /// To the pod under rules.
    Judged,
}

/// What to run.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub struct Order {
    /// On which packets.
    pub packets: Packets,
    /// Whether they are of connections that are known, else they begin one.
    pub established: bool,
    /// Whether each is of another peer and port, in no order, else all are of one.
    pub random: bool,
    /// Loops that count.
    pub loops: u32,
    /// Runs in each.
    pub runs: u32,
}

struct Judge {
    program: Program,
    empty: Program,
    peers: u32,
    rules: u32,
    // The programs go with it.
    _node: Node,
}

/// Makes the rules, says how many there are, and obeys.
pub fn run(args: &Args) -> Result<()> {
    let began = Instant::now();
    let mut judge = match Judge::new(args) {
        Ok(judge) => judge,
        Err(error) => return part::say(&json!({"error": format!("{error:#}")})),
    };
    part::say(&json!({"rules": judge.rules, "seconds": began.elapsed().as_secs_f64()}))?;
    part::obey(|order: Order| Ok(json!(judge.run(order)?)))
}

/// The pods of this node.
fn pod(packets: Packets) -> Ipv4Addr {
    match packets {
        Packets::Judged => Ipv4Addr::new(10, 244, 1, 2),
        _ => Ipv4Addr::new(10, 244, 1, 3),
    }
}

/// The address of a peer, as [`wrap`] makes it of its number.
fn peer(number: u32) -> Ipv4Addr {
    let [high, low] = (number as u16).to_be_bytes();
    Ipv4Addr::new(10, 128, low, high)
}

impl Judge {
    fn new(args: &Args) -> Result<Self> {
        let (peers, ports) = (args.peers, args.ports);
        ensure!(
            peers.is_power_of_two() && ports.is_power_of_two() && peers <= 1 << 16,
            "{peers} peers and {ports} ports can't be chosen by bits"
        );
        let rules = peers * ports;
        // Each flow once to each pod, and room besides.
        let mut node = Node::new(&args.dir, FLOWS.max(rules * 4))?;
        for number in 0..peers {
            let label = number.to_string();
            let name = format!("p{number}");
            node.add_pod(&name, (LABEL, &label), peer(number).into(), false)?;
        }
        let ports: Vec<_> = (0..ports as u16)
            .map(|port| json!({"protocol": "TCP", "port": PORT + port}))
            .collect();
        node.add_policy(
            "all",
            &json!({
                "podSelector": {"matchLabels": {"app": "judged"}},
                "policyTypes": ["Ingress"],
                "ingress": [{
                    "from": [{"podSelector": {"matchExpressions": [{"key": LABEL, "operator": "Exists"}]}}],
                    "ports": ports,
                }],
            }),
        );
        for (app, packets) in [("judged", Packets::Judged), ("free", Packets::Free)] {
            node.add_pod(app, ("app", app), pod(packets).into(), true)?;
        }
        node.settle()?;
        let id = node
            .loaded
            .classifier(PROGRAM)?
            .info()
            .with_context(|| format!("could not ask for the number of {PROGRAM}"))?
            .id();
        let kind = Kind::Classifier;
        let mut judge = Self {
            program: Program::by_id(id, kind)?,
            empty: Program::empty(kind)?,
            peers,
            rules,
            _node: node,
        };
        judge.program.receive_by(RECEIVED);
        judge.prove()?;
        judge.enter_all()?;
        Ok(judge)
    }

    /// Enters the flows of both pods by turns: what is entered first is found first, and none of the two shall have that.
    fn enter_all(&self) -> Result<()> {
        let turn = TURN.min(self.rules);
        for first in (0..self.rules).step_by(turn as usize) {
            for packets in [Packets::Judged, Packets::Free] {
                let begins = Pick::Next(first.into());
                let (begins, frame) = self.wrapped(packets, Content::Tcp(SYN), begins)?;
                begins.program.run(&frame, DEVICE, turn, None)?;
            }
        }
        Ok(())
    }

    /// That the pod's rules let through what they say and drop what they don't, at their first entry and their last.
    fn prove(&self) -> Result<()> {
        let last = self.rules - 1;
        for (packets, flow, port, shall) in [
            (Packets::Judged, 0, None, 0),
            (Packets::Judged, last, None, 0),
            (Packets::Judged, 0, Some(NO_PORT), SHOT),
            (Packets::Judged, self.peers, Some(NO_PORT), SHOT),
            (Packets::Free, 0, Some(NO_PORT), 0),
        ] {
            let port = port.unwrap_or(PORT + (flow / self.peers) as u16);
            let source = IpAddr::from(peer(flow % self.peers));
            let frame = frame(Content::Tcp(SYN), source, (pod(packets), port));
            let ran = self.program.run(&frame, DEVICE, 1, None)?;
            ensure!(
                ran.verdict == shall,
                "a packet of {source} to port {port} ({packets:?}) got the verdict {}",
                ran.verdict
            );
        }
        Ok(())
    }

    /// A loop over what it is told; `pick` chooses the flow.
    fn wrapped(
        &self,
        packets: Packets,
        content: Content,
        pick: Pick,
    ) -> Result<(Wrapped, Vec<u8>)> {
        let frame = frame(content, peer(0).into(), (pod(packets), 0));
        let vary = Vary {
            six: false,
            address_bits: self.peers.trailing_zeros() as u8,
            receiver: true,
            port: PORT,
            spare: [6, 10],
        };
        let program = match packets {
            Packets::None => &self.empty,
            _ => &self.program,
        };
        let mut wrapped = wrap::wrap(program, Kind::Classifier, &frame, pick, Some(vary))?;
        wrapped.program.receive_by(RECEIVED);
        Ok((wrapped, frame))
    }

    /// Nanoseconds of a run, with what writes the frame anew: the median of the loops.
    fn run(&mut self, order: Order) -> Result<f64> {
        let flows = if order.random { self.rules } else { 1 };
        let (begins, frame) = self.wrapped(order.packets, Content::Tcp(SYN), Pick::Next(0))?;
        // All flows are known, so that none is entered anew while runs count: what begins one still asks the rules.
        begins.program.run(&frame, DEVICE, flows, None)?;
        let pick = match order.random {
            true => Pick::Below(self.rules),
            false => Pick::First,
        };
        let flags = if order.established { ACK } else { SYN };
        if order.established {
            // So that caches have what these packets need, and not what rules did.
            let (goes_on, frame) = self.wrapped(order.packets, Content::Tcp(ACK), Pick::Next(0))?;
            goes_on.program.run(&frame, DEVICE, flows, None)?;
        }
        let (wrapped, frame) = self.wrapped(order.packets, Content::Tcp(flags), pick)?;
        let mut nanos = Vec::new();
        for round in 0..=order.loops {
            let ran = wrapped.program.run(&frame, DEVICE, order.runs, None)?;
            if ran.verdict != 0 {
                bail!(
                    "a packet that rules let through got the verdict {}",
                    ran.verdict
                );
            }
            // The first one warms up.
            if round > 0 {
                nanos.push(f64::from(ran.nanos));
            }
        }
        Ok(median(&nanos))
    }
}

fn frame(content: Content, source: IpAddr, (receiver, port): (Ipv4Addr, u16)) -> Vec<u8> {
    Frame {
        hardware: [[2; 6]; 2],
        source: (source, 40_000).into(),
        destination: (receiver, port).into(),
        content,
    }
    .bytes()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn peers_have_the_addresses_that_the_loop_writes() {
        // A number's low byte is stored first.
        assert_eq!(peer(0x0102), Ipv4Addr::new(10, 128, 2, 1));
        let all: BTreeSet<Ipv4Addr> = (0..16_384).map(peer).collect();
        assert_eq!(all.len(), 16_384);
    }
}
