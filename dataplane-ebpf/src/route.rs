//! Asking the routing table, and remembering for a moment what it said: packets come in runs, and the question costs more
//! than all else that is done with one.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_NOT_FWDED, BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup, bpf_redir_neigh,
};
use aya_ebpf::helpers::generated::bpf_fib_lookup as ask_kernel;
use aya_ebpf::macros::map;
use aya_ebpf::maps::PerCpuArray;
use xebec_dataplane_common::ip::Ip;

use crate::frame::Frame;
use crate::maps::DEVICES;
use crate::packet::{ETHERNET, Packet};
use crate::scratch::Scratch;
use crate::translate;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// A way that the routing table knows.
pub struct Way {
    /// The kernel's words for the question, and the answer over it.
    question: bpf_fib_lookup,
    /// The device that it leaves by.
    pub device: u32,
    /// The next hop; without a family, the packet's own destination.
    pub hop: bpf_redir_neigh,
    /// The next hop's hardware address, then the device's own; only where the neighbour is known.
    pub hardware: [u32; 3],
    /// Bytes that the way takes, where a packet has more.
    pub mtu: u32,
    /// How the device sends back frames that it received; 0 for one that has none of the hooks.
    pub back: u8,
    /// 1 where the destination knows the way to pods.
    pub native: u8,
}

/// What is asked: all that makes the answer another.
#[derive(Clone, Copy)]
struct Question {
    source: Ip,
    destination: Ip,
    /// The device that the packet came by.
    device: u32,
    /// Type of service, or traffic class, as it stands in the packet.
    class: u32,
    /// When it was asked.
    moment: u32,
}

/// A question and its answer.
struct Known {
    question: Question,
    /// 0 where the packet is not to be sent on.
    device: u32,
    mtu: u32,
    family: u32,
    hop: [u32; 4],
    hardware: [u32; 3],
    back: u8,
    native: u8,
}

/// How many answers each CPU remembers: a power of two.
const PLACES: u32 = 1 << PLACES_BITS;
const PLACES_BITS: u32 = 10;

/// Answers of the routing table, at places that the questions' hashes tell.
#[map]
static WAYS: PerCpuArray<Known> = PerCpuArray::with_max_entries(PLACES, 0);

/// How long an answer is true without being asked for again: up to 2^26 ns, 67 ms. Changes of routes and neighbours are
/// obeyed after that, also where nobody is there who could tell of them.
const LASTS: u32 = 26;

impl Question {
    #[inline(always)]
    fn is(&self, other: &Self) -> bool {
        self.source.differs(&other.source)
            | self.destination.differs(&other.destination)
            | (self.device ^ other.device)
            | (self.class ^ other.class)
            | (self.moment ^ other.moment)
            == 0
    }

    #[inline(always)]
    fn place(&self) -> u32 {
        let (from, to) = (&self.source.0, &self.destination.0);
        let mixed = to[3]
            ^ to[2].rotate_left(7)
            ^ to[1].rotate_left(13)
            ^ to[0].rotate_left(19)
            ^ from[3].rotate_left(16)
            ^ from[2].rotate_left(23)
            ^ from[1].rotate_left(29)
            ^ from[0].rotate_left(3)
            ^ self.device;
        mixed.wrapping_mul(0x9e37_79b1) >> (32 - PLACES_BITS)
    }
}

/// Asks for the `way` of the packet of this many bytes that becomes `to` and came by a device; 0 bytes for one that the
/// kernel cuts before it is sent. What the kernel says (`BPF_FIB_LKUP_RET_…`), or none for a packet that can't be read.
#[inline(always)]
pub fn ask(
    ctx: &(impl EbpfContext + Frame),
    all: &mut Scratch,
    device: u32,
    length: u16,
) -> Option<u32> {
    let (packet, to, way) = (&all.packet, &all.to, &mut all.way);
    let class = if packet.is_v6() {
        let first: u32 = ctx.read(ETHERNET)?;
        // Without the flow label: all flows between two addresses take one way, as those of IPv4 do.
        first & 0x0ff0_0000_u32.to_be()
    } else {
        let [_, service]: [u8; 2] = ctx.read(ETHERNET)?;
        u32::from(service)
    };
    let question = Question {
        source: to.source.words(),
        destination: to.destination.words(),
        device,
        class,
        moment: (packet.seen >> LASTS) as u32,
    };
    let known = WAYS.get_ptr_mut(question.place())?;
    // SAFETY: this CPU's; programs of tc and XDP never interrupt one another on a CPU.
    let known = unsafe { &mut *known };
    let is_way = known.device != 0;
    if !known.question.is(&question) || is_way && (length == 0 || u32::from(length) > known.mtu) {
        let found = look(ctx, packet, &question, way, length);
        if found == BPF_FIB_LKUP_RET_NOT_FWDED {
            known.device = 0;
            known.question = question;
        }
        if found != BPF_FIB_LKUP_RET_SUCCESS {
            way.back = 0;
            return Some(found);
        }
        known.device = way.device;
        known.mtu = way.mtu;
        known.family = way.hop.nh_family;
        // SAFETY: all bytes of the union are written.
        known.hop = unsafe { way.hop.__bindgen_anon_1.ipv6_nh };
        known.hardware = way.hardware;
        // SAFETY: the value is read once, here.
        way.back = unsafe { DEVICES.get(&way.device) }
            .copied()
            .unwrap_or_default();
        way.native = u8::from(translate::is_to_native());
        known.back = way.back;
        known.native = way.native;
        known.question = question;
        return Some(BPF_FIB_LKUP_RET_SUCCESS);
    }
    if !is_way {
        return Some(BPF_FIB_LKUP_RET_NOT_FWDED);
    }
    way.device = known.device;
    way.hop.nh_family = known.family;
    way.hop.__bindgen_anon_1.ipv6_nh = known.hop;
    way.hardware = known.hardware;
    way.back = known.back;
    way.native = known.native;
    Some(BPF_FIB_LKUP_RET_SUCCESS)
}

/// Asks the kernel.
#[inline(always)]
fn look(
    ctx: &impl EbpfContext,
    packet: &Packet,
    question: &Question,
    way: &mut Way,
    length: u16,
) -> u32 {
    let route = &mut way.question;
    // All of it counts: of zeros, the table takes nothing for a wish.
    (route.l4_protocol, route.sport, route.dport) = (0, 0, 0);
    route.ifindex = question.device;
    route.__bindgen_anon_1.tot_len = length;
    route.__bindgen_anon_5.tbid = 0;
    if packet.is_v6() {
        route.family = AF_INET6;
        route.__bindgen_anon_2.flowinfo = question.class;
        route.__bindgen_anon_3.ipv6_src = question.source.0;
        route.__bindgen_anon_4.ipv6_dst = question.destination.0;
    } else {
        route.family = AF_INET;
        route.__bindgen_anon_2.flowinfo = 0;
        route.__bindgen_anon_2.tos = question.class as u8;
        route.__bindgen_anon_3.ipv4_src = question.source.as_v4();
        route.__bindgen_anon_4.ipv4_dst = question.destination.as_v4();
    }
    // SAFETY: context and structure are valid, and the size is the structure's.
    let found = unsafe { ask_kernel(ctx.as_ptr(), route, size_of::<bpf_fib_lookup>() as i32, 0) };
    let found = u32::try_from(found).unwrap_or(u32::MAX);
    // SAFETY: all bytes of the unions are written, and mean something as numbers.
    unsafe {
        // The next hop may be of another family.
        way.hop.nh_family = u32::from(route.family);
        way.hop.__bindgen_anon_1.ipv6_nh = route.__bindgen_anon_4.ipv6_dst;
        way.mtu = u32::from(route.__bindgen_anon_1.mtu_result);
    }
    way.device = route.ifindex;
    let [a, b, c, d, e, f] = route.dmac;
    let [g, h, i, j, k, l] = route.smac;
    way.hardware = [[a, b, c, d], [e, f, g, h], [i, j, k, l]].map(u32::from_ne_bytes);
    found
}
