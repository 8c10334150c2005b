//! Looking up what is known of a packet's flow: all hooks ask here.

use xebec_dataplane_common::flow::FlowKey;

use crate::flow::{self, begins};
use crate::nat::{self, Turn};
use crate::scratch::{Scratch, scratch, settle};
use crate::table::{self, Which};

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum At {
    /// Where a packet leaves by a device that leads to other nodes and the outside; how its flow was judged stands in
    /// `judged`.
    ToNetwork,
    /// Where it comes in by one, by the device in `device`: nothing can have been translated but by XDP.
    FromNetwork,
    /// The same, at XDP.
    Early,
    /// Where it came in within another packet, as another node had got it: one that begins a connection anew is another's.
    Unwrapped,
    /// Where a packet is about to enter its pod.
    ToPod,
    /// Where it leaves its pod: nothing can have been translated.
    FromPod,
}

/// What the table says of a packet.
#[derive(Clone, Copy)]
pub struct Found {
    /// Whether the packet goes from the lower to the higher end.
    pub up: bool,
    /// How it is translated.
    pub turn: Turn,
}

/// Looks for the packet's flow. What it becomes stands in `to`, whether there is an entry in `listed`, whether it is an
/// answer in `answers`; for pods' hooks, what is known of the flow in `known`.
#[inline(always)]
pub fn look_up(at: At) -> Found {
    let found = xebec_look_up(at as u32);
    settle();
    Found {
        up: found & UP != 0,
        turn: match found & !UP {
            ENTRY => Turn::Entry,
            EXIT => Turn::Exit,
            DIRECT => Turn::Direct,
            _ => Turn::None,
        },
    }
}

const ENTRY: u32 = 1;
const EXIT: u32 = 2;
const DIRECT: u32 = 3;
const UP: u32 = 4;

/// The same; checked by itself and once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_look_up(at: u32) -> u32 {
    match scratch() {
        Some(all) => find(all, at),
        None => 0,
    }
}

#[inline(always)]
fn find(all: &mut Scratch, at: u32) -> u32 {
    let up = FlowKey::write(&all.packet.tuple, &mut all.key);
    let mut flow = table::find(Which::Key);
    let first = at == At::FromPod as u32 || at == At::Early as u32;
    let may_be = at == At::FromNetwork as u32;
    if (first || may_be) && nat::gives_way(flow, all, up, first) {
        flow = core::ptr::null_mut();
    }
    all.listed = u8::from(!flow.is_null());
    all.answers = u8::from(flow::answers(flow, up));
    if at >= At::ToPod as u32 {
        flow::find(flow, &all.packet, up, all.generation, &mut all.known);
    } else {
        flow::judged(flow, &mut all.judged);
    }
    let up_too = if up { UP } else { 0 };
    if at == At::Unwrapped as u32 && begins(&all.packet) && flow::has_begun(flow) {
        return up_too;
    }
    let turn = match nat::find(flow, all, up) {
        Turn::None => 0,
        Turn::Entry => ENTRY,
        Turn::Exit => EXIT,
        Turn::Direct => DIRECT,
    };
    turn | up_too
}
