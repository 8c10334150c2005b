//! What becomes of a packet from the network: answers to translated flows, and new flows to Services. Both hooks of a
//! device that leads there ask here.

use aya_ebpf::maps::lpm_trie::Key;
use xebec_dataplane_common::flow::{Flow, TURN_BACK, TURN_FORTH, TURN_LATE, TURN_STAYS};
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::{TCP, UDP};

use crate::balance::{self, CHOSEN, Client};
use crate::direct;
use crate::flow::{self, RST, begins};
use crate::lookup::{At, look_up};
use crate::maps::{ENDPOINTS, NATIVE};
use crate::nat::{self, Turn};
use crate::packet::Packet;
use crate::scratch::{Scratch, scratch};

/// What is to be done with a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// It is not translated.
    Leave,
    /// Its translation is known.
    Known,
    /// It goes to its backend's node as it is.
    Direct,
    /// The same, and begins a flow.
    BeginsDirect,
    /// It begins a flow to a backend that was chosen: [`begin`] enters the translation, and nothing before it.
    Begins,
    /// There is no backend: its sender is told.
    Refuse,
    /// It must not be let in.
    Drop,
}

/// Looks for a packet's translation: what it becomes stands in `to`, and in `stays` whether its way ends here; of one that begins, all but the port. A hook may still leave the packet to the other one then: that finds the translation again, or chooses a backend itself.
#[inline(always)]
pub fn plan(all: &mut Scratch, at: At) -> Plan {
    match look_up(at).turn {
        Turn::Entry => return Plan::Known,
        Turn::Direct => return Plan::Direct,
        Turn::None | Turn::Exit => {}
    }
    if !may_begin(&all.packet) {
        // The stack itself resets what comes to the node's own addresses.
        let stray =
            all.listed == 0 && goes_on(&all.packet) && !is_node(&all.packet.tuple.destination);
        if stray && balance::refuses(&all.packet.tuple, false, &mut all.choice) {
            return Plan::Refuse;
        }
        return Plan::Leave;
    }
    // What answers a flow begins none.
    if !begins(&all.packet) && all.answers != 0 {
        return Plan::Leave;
    }
    let client = Client {
        address: all.packet.tuple.source,
        namespace: false,
        unseen: false,
        inside: false,
    };
    match balance::choose(&all.packet.tuple, &client, &mut all.choice) {
        CHOSEN => {
            all.to.set(&all.packet.tuple);
            all.to.destination = all.choice.address;
            all.to.destination_port = all.choice.port;
            // Who answers from this node sees the client itself; the answers leave through here anyway.
            all.stays = u8::from(stays(&all.to.destination));
            if all.stays == 0 {
                if direct::is_meant(all) {
                    return Plan::BeginsDirect;
                }
                all.to.source = nat::settings().node(&all.to.destination);
            }
            Plan::Begins
        }
        balance::REFUSE => Plan::Refuse,
        balance::DROP => Plan::Drop,
        _ => Plan::Leave,
    }
}

/// Whether a packet may begin a flow to a Service.
#[inline(always)]
pub fn may_begin(packet: &Packet) -> bool {
    begins(packet) || packet.tuple.protocol == UDP && !packet.is_later() && !packet.is_error()
}

/// Whether a packet may be of a TCP connection that has begun.
#[inline(always)]
pub fn goes_on(packet: &Packet) -> bool {
    packet.tuple.protocol == TCP
        && packet.tcp_flags & RST == 0
        && packet.fragment == 0
        && !packet.is_error()
}

/// Enters the translation of a flow from outside to the backend that was chosen; `to` then has the rest. False if
/// there is no port for it.
#[inline(never)]
pub fn begin(all: &mut Scratch) -> bool {
    all.begun = Flow {
        backend: all.choice.backend,
        backend_generation: all.choice.generation,
        service: all.choice.service,
        turn: TURN_FORTH,
        other: TURN_BACK,
        ..flow::plain()
    };
    if all.stays != 0 {
        all.begun.turn = TURN_FORTH | TURN_STAYS;
        all.begun.other = TURN_BACK | TURN_LATE;
    }
    let listed = all.listed != 0;
    nat::enter_with_port(all, listed)
}

/// Whether the packet's way ends on this node; otherwise it goes to another node, or back to a client.
#[inline(always)]
fn stays(to: &Ip) -> bool {
    is_node(to) || is_endpoint(to)
}

/// Whether an address is the node's own.
#[inline(always)]
pub fn is_node(address: &Ip) -> bool {
    let settings = nat::settings();
    *address == settings.node4 || *address == settings.node6 && address.is_some()
}

/// Whether an address is a pod's of this node.
#[inline(always)]
pub fn is_endpoint(address: &Ip) -> bool {
    // SAFETY: only whether it is there counts.
    unsafe { ENDPOINTS.get(address) }.is_some()
}

/// Whether an address knows the way to pods.
#[inline(always)]
pub fn is_native(address: &Ip) -> bool {
    NATIVE.get(&Key::new(128, *address)).is_some()
}

/// Whether whom the packet is to reach (`to`) knows the way to pods.
#[inline(always)]
pub fn is_to_native() -> bool {
    xebec_is_to_native() != 0
}

/// The same; checked by itself and once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn xebec_is_to_native() -> u32 {
    scratch().map_or(0, |all| u32::from(is_native(&all.to.destination)))
}
