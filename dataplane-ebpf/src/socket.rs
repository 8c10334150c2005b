//! cgroup socket hooks: a Service's address becomes a backend's once, when a socket connects or sends.

use core::ptr::read_volatile;

use aya_ebpf::helpers::generated::{bpf_get_current_ancestor_cgroup_id, bpf_get_netns_cookie};
use aya_ebpf::helpers::{bpf_get_socket_cookie, bpf_set_retval};
use aya_ebpf::macros::{cgroup_sock, cgroup_sock_addr};
use aya_ebpf::programs::{SockAddrContext, SockContext};
use xebec_dataplane_common::ip::Ip;
use xebec_dataplane_common::nat::Tuple;
use xebec_dataplane_common::service::{ASKED, GIVEN, SocketKey, SocketValue};

use crate::balance::{self, CHOSEN, Choice, Client};
use crate::maps::{BACKENDS, SCOPE, SOCKETS, remember};
use crate::tell::{self, Translated};

/// Go on with the call.
const ALLOW: i32 = 1;
/// Refuse it; the error is EPERM unless another was set.
const REFUSE: i32 = 0;
const ECONNREFUSED: i32 = 111;
const EHOSTUNREACH: i32 = 113;
const AF_INET: u32 = 2;

#[cgroup_sock_addr(connect4)]
pub fn xebec_connect4(ctx: SockAddrContext) -> i32 {
    translate(&ctx, Family::V4, false)
}

#[cgroup_sock_addr(connect6)]
pub fn xebec_connect6(ctx: SockAddrContext) -> i32 {
    translate(&ctx, Family::V6, false)
}

#[cgroup_sock_addr(sendmsg4)]
pub fn xebec_sendmsg4(ctx: SockAddrContext) -> i32 {
    translate(&ctx, Family::V4, true)
}

#[cgroup_sock_addr(sendmsg6)]
pub fn xebec_sendmsg6(ctx: SockAddrContext) -> i32 {
    translate(&ctx, Family::V6, true)
}

#[cgroup_sock_addr(recvmsg4)]
pub fn xebec_recvmsg4(ctx: SockAddrContext) -> i32 {
    restore(&ctx, Family::V4)
}

#[cgroup_sock_addr(recvmsg6)]
pub fn xebec_recvmsg6(ctx: SockAddrContext) -> i32 {
    restore(&ctx, Family::V6)
}

#[cgroup_sock_addr(getpeername4)]
pub fn xebec_getpeername4(ctx: SockAddrContext) -> i32 {
    restore(&ctx, Family::V4)
}

#[cgroup_sock_addr(getpeername6)]
pub fn xebec_getpeername6(ctx: SockAddrContext) -> i32 {
    restore(&ctx, Family::V6)
}

/// A connected socket's translation ends with it. Those of one that sends without connecting are not known here, and are
/// forgotten as the oldest of a full table.
#[cgroup_sock(sock_release)]
pub fn xebec_release(ctx: SockContext) -> i32 {
    // Each field is read by itself and at once: the kernel allows no address in a context that was reckoned.
    // SAFETY: the kernel gives a valid context for the whole call, and this hook may read these fields of any socket.
    let (family, port, v4, v6) = unsafe {
        let sock = ctx.sock;
        let v6 = [
            read_volatile(&raw const (*sock).dst_ip6[0]),
            read_volatile(&raw const (*sock).dst_ip6[1]),
            read_volatile(&raw const (*sock).dst_ip6[2]),
            read_volatile(&raw const (*sock).dst_ip6[3]),
        ];
        let v4 = read_volatile(&raw const (*sock).dst_ip4);
        ((*sock).family, (*sock).dst_port, v4, v6)
    };
    let address = if family == AF_INET {
        Ip::v4(v4)
    } else {
        Ip(v6)
    };
    if port == 0 {
        return ALLOW;
    }
    let key = SocketKey {
        // SAFETY: the context is the one that the kernel gave.
        cookie: unsafe { bpf_get_socket_cookie(ctx.sock.cast()) },
        address,
        port,
        side: GIVEN,
        pad: 0,
    };
    // Most sockets have none, and looking costs less than taking away what is not there.
    if SOCKETS.get_ptr(&key).is_some() {
        let _ = SOCKETS.remove(&key);
    }
    ALLOW
}

/// Which family a socket is of. One of IPv6 may talk IPv4, by the addresses that stand for it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

/// The address and port that a call names.
#[inline(always)]
fn named(ctx: &SockAddrContext, family: Family) -> (Ip, u16) {
    // SAFETY: the kernel gives a valid context for the whole call, and the hooks of a family may read its fields.
    unsafe {
        let call = ctx.sock_addr;
        let address = match family {
            Family::V4 => Ip::v4((*call).user_ip4),
            Family::V6 => Ip([
                (*call).user_ip6[0],
                (*call).user_ip6[1],
                (*call).user_ip6[2],
                (*call).user_ip6[3],
            ]),
        };
        (address, (*call).user_port as u16)
    }
}

/// Puts another in its place.
#[inline(always)]
fn name(ctx: &SockAddrContext, family: Family, address: &Ip, port: u16) {
    // SAFETY: as in `named`; they may be written, too.
    unsafe {
        let call = ctx.sock_addr;
        match family {
            Family::V4 => (*call).user_ip4 = address.as_v4(),
            Family::V6 => {
                core::ptr::write_volatile(&raw mut (*call).user_ip6[0], address.0[0]);
                core::ptr::write_volatile(&raw mut (*call).user_ip6[1], address.0[1]);
                core::ptr::write_volatile(&raw mut (*call).user_ip6[2], address.0[2]);
                core::ptr::write_volatile(&raw mut (*call).user_ip6[3], address.0[3]);
            }
        }
        (*call).user_port = u32::from(port);
    }
}

/// cgroups are looked through to this depth.
const DEPTH: i32 = 16;

/// The cookie of the socket's network namespace, if it is the node's own or a pod's, and whether it is a pod's.
#[inline(always)]
fn scope(ctx: &SockAddrContext) -> Option<(u64, bool)> {
    let scope = SCOPE.get(0)?;
    // SAFETY: the context is the one that the kernel gave.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.sock_addr.cast()) };
    if cookie == scope.netns {
        return Some((cookie, false));
    }
    for level in 1..DEPTH {
        // SAFETY: the helper takes a number.
        let ancestor = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if ancestor == scope.pods {
            return Some((cookie, true));
        }
        if ancestor == 0 {
            return None;
        }
    }
    None
}

/// The frontend that was asked for becomes one of its backends. Who sends without connecting keeps the backend as long
/// as it is there.
#[inline(always)]
fn translate(ctx: &SockAddrContext, family: Family, sends: bool) -> i32 {
    let (address, port) = named(ctx, family);
    // SAFETY: the kernel gives a valid context for the whole call, and these hooks may read the field.
    let protocol = unsafe { (*ctx.sock_addr).protocol as u8 };
    let mut tuple = Tuple {
        source: Ip::NONE,
        destination: address,
        source_port: 0,
        destination_port: port,
        protocol,
        pad: [0; 3],
    };
    if !balance::is_frontend(&tuple) {
        return ALLOW;
    }
    let Some((namespace, pod)) = scope(ctx) else {
        return ALLOW;
    };
    // SAFETY: the context is the one that the kernel gave.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.sock_addr.cast()) };
    let mut key = SocketKey {
        cookie,
        address,
        port,
        side: ASKED,
        pad: 0,
    };
    let mut choice = Choice::new();
    if sends && kept(&key, &mut choice) {
        name(ctx, family, &choice.address, choice.port);
        return ALLOW;
    }
    // What stands for a hash where one is asked for: the socket.
    tuple.source.0[3] = cookie as u32;
    let client = Client {
        address: Ip([namespace as u32, (namespace >> 32) as u32, 0, 0]),
        namespace: true,
        unseen: pod,
        inside: true,
    };
    match balance::choose(&tuple, &client, &mut choice) {
        CHOSEN => {}
        balance::NONE => return ALLOW,
        // As kube-proxy does, a Service without endpoints answers at once.
        balance::REFUSE => return fail(ECONNREFUSED),
        _ => return fail(EHOSTUNREACH),
    }
    let mut value = SocketValue {
        address,
        port,
        protocol: u16::from(protocol),
        backend: choice.backend,
        generation: choice.generation,
        service: choice.service,
    };
    if sends {
        remember(&SOCKETS, &key, &value, 0);
    }
    key.address = choice.address;
    key.port = choice.port;
    key.side = GIVEN;
    value.address = address;
    remember(&SOCKETS, &key, &value, 0);
    name(ctx, family, &choice.address, choice.port);
    tell::tell_socket(&Translated {
        namespace,
        cookie,
        protocol,
        asked: (&value.address, value.port),
        given: (&choice.address, choice.port),
        service: choice.service,
    });
    ALLOW
}

/// The backend that a socket sent to before, if it is still there.
#[inline(always)]
fn kept(key: &SocketKey, choice: &mut Choice) -> bool {
    // SAFETY: the value is read once, here.
    let Some(value) = (unsafe { SOCKETS.get(key) }) else {
        return false;
    };
    let Some(backend) = BACKENDS.get(value.backend) else {
        return false;
    };
    choice.address = backend.address;
    choice.port = backend.port;
    backend.is(value.generation)
}

#[inline(always)]
fn fail(error: i32) -> i32 {
    // SAFETY: the helper takes a number and touches no memory of ours.
    unsafe { bpf_set_retval(-error) };
    REFUSE
}

/// What a socket was given is shown as what it asked for.
#[inline(always)]
fn restore(ctx: &SockAddrContext, family: Family) -> i32 {
    let (address, port) = named(ctx, family);
    // SAFETY: the context is the one that the kernel gave.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.sock_addr.cast()) };
    let key = SocketKey {
        cookie,
        address,
        port,
        side: GIVEN,
        pad: 0,
    };
    // SAFETY: the value is read once, here.
    if let Some(asked) = unsafe { SOCKETS.get(&key) } {
        name(ctx, family, &asked.address, asked.port);
    }
    ALLOW
}
