//! Memory of a CPU in which a program works on a packet.
//!
//! It is no more than the stack would hold, but what is read back from it is anything to the verifier: the many ways
//! to read a packet meet again behind [`settle`], where each would otherwise be followed to the program's end.

use core::sync::atomic::{Ordering, compiler_fence};

use aya_ebpf::macros::map;
use aya_ebpf::maps::PerCpuArray;
use xebec_dataplane_common::flow::{Flow, FlowKey};
use xebec_dataplane_common::nat::Tuple;

use crate::balance::Choice;
use crate::direct::Outer;
use crate::flow::{Judged, Known};
use crate::message::Payload;
use crate::packet::Packet;
use crate::policy::{Met, Question};
use crate::route::Way;
use crate::table::Sought;
use crate::tell::Told;

/// What is known of a packet.
pub struct Scratch {
    /// Its headers.
    pub packet: Packet,
    /// Its flow.
    pub key: FlowKey,
    /// What it becomes.
    pub to: Tuple,
    /// The key of its flow's other entry.
    pub other: FlowKey,
    /// What packets of the other entry become.
    pub back: Tuple,
    /// The backend that was chosen for it.
    pub choice: Choice,
    /// The flow that it begins.
    pub begun: Flow,
    /// Where a key stands in the table of flows.
    pub sought: Sought,
    /// What the table knew of its flow.
    pub known: Known,
    /// How its flow was judged before.
    pub judged: Judged,
    /// The pod of this node that the hook is of.
    pub pod: Met,
    /// The pod of this node at the other end, where there is one.
    pub peer: Met,
    /// The rules' generation when the packet came, before anything of them was asked.
    pub generation: u32,
    /// What the rules are asked.
    pub question: Question,
    /// What is told of it.
    pub told: Told,
    /// The device that it came in by, for tc's hook of the network alone.
    pub device: u32,
    /// 1 where the table has an entry under its key.
    pub listed: u8,
    /// 1 where it answers a flow that the other end began.
    pub answers: u8,
    /// 1 where its way ends on this node once it is translated.
    pub stays: u8,
    /// What it becomes where it leaves.
    pub late: Tuple,
    /// Whether it becomes that: `LEAVES_NOT` and the others.
    pub leaves: u8,
    /// 1 where the hook that it leaves by has nothing left to do.
    pub done: u8,
    /// Where its frame goes.
    pub goes: u8,
    /// 1 where it becomes `to`.
    pub turned: u8,
    /// 1 where a process of this node sent it, which rules do not bind.
    pub exempt: u8,
    /// Where the search for a free port starts.
    pub start: u32,
    /// 1 where the packet's own port, or the one that it had before, is tried first.
    pub own: u8,
    /// After how many tries the port of a flow that yields will do.
    pub free: u16,
    /// 1 once its translation is entered.
    pub entered: u8,
    /// What it carries.
    pub payload: Payload,
    /// 1 where the message in it was told of.
    pub copied: u8,
    /// 1 where it is for a Service without endpoints, and its sender is to be told.
    pub refused: u8,
    /// The way that it takes.
    pub way: Way,
    /// The packet that it is put into.
    pub outer: Outer,
}

#[map]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

/// This CPU's. Programs of tc and XDP never interrupt one another on a CPU, and none keeps it beyond its end.
#[inline(always)]
pub fn scratch() -> Option<&'static mut Scratch> {
    let scratch = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: see above; of its fields, all bytes are a value.
    Some(unsafe { &mut *scratch })
}

/// What was written before is read again from memory behind this.
#[inline(always)]
pub fn settle() {
    compiler_fence(Ordering::SeqCst);
}
