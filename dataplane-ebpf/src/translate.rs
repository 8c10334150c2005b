//! What becomes of a packet from the network: answers to translated flows, and connections to node ports. Both hooks
//! of a device that leads there ask here.

use aya_ebpf::helpers::bpf_get_prandom_u32;
use xebec_dataplane_common::nat::Tuple;
use xebec_dataplane_common::service::{BackendKey, FrontendKey};
use xebec_dataplane_common::{TCP, UDP};

use crate::flow::{ACK, SYN};
use crate::maps::{BACKENDS, COUNTERS, ENDPOINTS, FRONTENDS};
use crate::nat;
use crate::packet::Packet;

/// What is to be done with a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// It is not translated.
    Leave,
    /// Its translation is known.
    Known,
    /// It begins a flow to a backend that was chosen: [`begin`] enters the translation, and nothing before it.
    Begins,
}

/// Looks for a packet's translation. `to` is what it becomes; of one that begins, its destination alone. A hook may
/// still leave the packet to the other one then: that finds the translation again, or chooses a backend itself.
#[inline(always)]
pub fn plan(packet: &Packet, from: &Tuple, to: &mut Tuple) -> Plan {
    let settings = nat::settings();
    let begins = packet.protocol == TCP && packet.tcp_flags & (SYN | ACK) == SYN;
    // All that is translated here was sent to the node's address. So what one hook translated for a pod of this node
    // is not translated again by the next. Before the agent has told of the address, what is known holds on.
    if packet.error {
        return Plan::Leave;
    }
    if settings.node != 0 && from.destination != settings.node {
        if begins {
            nat::make_way(from);
        }
        return Plan::Leave;
    }
    // A connection that begins has its backend chosen anew, even from a port that was used before.
    if !begins && nat::find(from, packet.tcp_flags, to) {
        return Plan::Known;
    }
    if (begins || packet.protocol == UDP) && !packet.later && choose(from, to) {
        return Plan::Begins;
    }
    if begins && nat::find(from, packet.tcp_flags, to) {
        return Plan::Known;
    }
    Plan::Leave
}

/// Chooses a backend for a new connection to one of this node's ports.
#[inline(never)]
fn choose(from: &Tuple, to: &mut Tuple) -> bool {
    if nat::settings().node == 0 {
        return false;
    }
    let key = FrontendKey {
        address: from.destination,
        port: from.destination_port,
        protocol: from.protocol,
        pad: 0,
    };
    // SAFETY: values are replaced whole by userspace and read once here.
    let Some(frontend) = (unsafe { FRONTENDS.get(&key) }) else {
        return false;
    };
    let (set, count) = (frontend.set, frontend.count);
    if count == 0 {
        // Nobody listens on a node port: the stack refuses, as it should.
        return false;
    }
    // SAFETY: the helper has no arguments.
    let slot = unsafe { bpf_get_prandom_u32() } % count;
    // SAFETY: as above.
    let Some(backend) = (unsafe { BACKENDS.get(&BackendKey { set, slot }) }) else {
        return false;
    };
    to.destination = backend.address;
    to.destination_port = backend.port;
    true
}

/// Enters the translation of a flow to the backend that was chosen; `to` then has the rest. False if there is no port
/// for it.
#[inline(never)]
pub fn begin(from: &Tuple, to: &mut Tuple) -> bool {
    nat::forget(from);
    if stays(to) {
        // Who answers from this node sees the client itself; the answers leave through here anyway.
        nat::enter(from, to)
    } else {
        nat::enter_masqueraded(from, to)
    }
}

/// Whether the packet's way ends on this node; otherwise it goes to another node, or back to a client.
#[inline(always)]
pub fn stays(to: &Tuple) -> bool {
    to.destination == nat::settings().node || is_endpoint(to.destination)
}

#[inline(always)]
fn is_endpoint(address: u32) -> bool {
    // SAFETY: only whether it is there counts.
    unsafe { ENDPOINTS.get(&address) }.is_some()
}

/// Counts a packet that was translated.
#[inline(always)]
pub fn count(early: bool) {
    if let Some(counters) = COUNTERS.get_ptr_mut(0) {
        // SAFETY: the entry is this CPU's own, and programs of one CPU don't interrupt each other here.
        unsafe {
            if early {
                (*counters).translated_early += 1;
            } else {
                (*counters).translated += 1;
            }
        }
    }
}
