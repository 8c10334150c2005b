//! Flows of the node that were there before its own rules: they are entered as if they had been judged by rules of before,
//! so that the next packet of either end is judged by those of today, an answer by what it answers.

use anyhow::Result;
use bytemuck::Zeroable;
use xebec_dataplane_common::TCP;
use xebec_dataplane_common::flow::{Flow, FlowKey, ticks};
use xebec_dataplane_common::nat::Tuple;

use super::flow_table::FlowTable;
use super::usage::clock;
use crate::sockets::{Connection, connections};

/// A generation that no rules have but the first of all, on which nothing was judged.
const BEFORE: u32 = 1;
/// Both ends were told of.
const TOLD: [u8; 2] = [2, 2];

fn entry(connection: &Connection, now: u32) -> (FlowKey, Flow) {
    let (from, to) = (connection.from, connection.to);
    let tuple = Tuple {
        source: from.ip().into(),
        destination: to.ip().into(),
        source_port: from.port().to_be(),
        destination_port: to.port().to_be(),
        protocol: TCP,
        pad: [0; 3],
    };
    let (key, up) = FlowKey::new(&tuple);
    let flow = Flow {
        seen: now,
        generation: BEFORE,
        from_low: u8::from(up),
        told: TOLD,
        ..Flow::zeroed()
    };
    (key, flow)
}

/// Enters the connections of the node's processes that no flow is known of.
pub(super) fn note() -> Result<()> {
    let all = connections()?;
    let now = ticks(clock()?);
    let table = FlowTable::open()?;
    for (key, flow) in all.iter().map(|one| entry(one, now)) {
        // Where a set is full, the connection is taken for a new one.
        if table.get(&key).is_none() {
            table.set(&key, flow);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_says_who_began() {
        let [low, high] = ["192.0.2.1:22", "192.0.2.2:4000"].map(|one| one.parse().unwrap());
        for (from, to, up) in [(low, high, 1), (high, low, 0)] {
            let (key, flow) = entry(&Connection { from, to }, 7);
            assert_eq!((u16::from_be(key.low_port), flow.from_low), (22, up));
            assert!(!flow.is_replaceable(TCP, 7));
        }
    }
}
