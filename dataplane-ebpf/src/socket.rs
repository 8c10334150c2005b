//! cgroup socket hooks: a Service's address becomes a backend's once, when a socket connects or sends.

use aya_ebpf::helpers::generated::{bpf_get_current_ancestor_cgroup_id, bpf_get_netns_cookie};
use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_get_socket_cookie, bpf_set_retval};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use xebec_dataplane_common::service::{Address, BackendKey, FrontendKey, ReverseKey};

use crate::maps::{BACKENDS, FRONTENDS, REVERSE, SCOPE};

/// Go on with the call.
const ALLOW: i32 = 1;
/// Refuse it; the error is EPERM unless another was set.
const REFUSE: i32 = 0;
const ECONNREFUSED: i32 = 111;

#[cgroup_sock_addr(connect4)]
pub fn xebec_connect4(ctx: SockAddrContext) -> i32 {
    translate(&ctx)
}

#[cgroup_sock_addr(sendmsg4)]
pub fn xebec_sendmsg4(ctx: SockAddrContext) -> i32 {
    translate(&ctx)
}

#[cgroup_sock_addr(recvmsg4)]
pub fn xebec_recvmsg4(ctx: SockAddrContext) -> i32 {
    restore(&ctx)
}

#[cgroup_sock_addr(getpeername4)]
pub fn xebec_getpeername4(ctx: SockAddrContext) -> i32 {
    restore(&ctx)
}

/// cgroups are looked through to this depth.
const DEPTH: i32 = 16;

/// Whether the socket is the node's own or a pod's.
#[inline(always)]
fn in_scope(ctx: &SockAddrContext) -> bool {
    let Some(scope) = SCOPE.get(0) else {
        return false;
    };
    // SAFETY: the context is the one that the kernel gave.
    if unsafe { bpf_get_netns_cookie(ctx.sock_addr.cast()) } == scope.netns {
        return true;
    }
    for level in 1..DEPTH {
        // SAFETY: the helper takes a number.
        let ancestor = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if ancestor == scope.pods {
            return true;
        }
        if ancestor == 0 {
            return false;
        }
    }
    false
}

/// The frontend that was asked for becomes one of its backends, at random.
#[inline(always)]
fn translate(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the kernel gives a valid context for the whole call, and these fields may be read by this hook.
    let (address, port, protocol) = unsafe {
        (
            (*ctx.sock_addr).user_ip4,
            (*ctx.sock_addr).user_port as u16,
            (*ctx.sock_addr).protocol as u8,
        )
    };
    let key = FrontendKey {
        address,
        port,
        protocol,
        pad: 0,
    };
    // SAFETY: values are replaced whole by userspace and read once here.
    let Some(frontend) = (unsafe { FRONTENDS.get(&key) }) else {
        return ALLOW;
    };
    if !in_scope(ctx) {
        return ALLOW;
    }
    let (set, count) = (frontend.set, frontend.count);
    if count == 0 {
        // As kube-proxy does, a Service without endpoints answers at once.
        // SAFETY: the helper takes a number and touches no memory of ours.
        unsafe { bpf_set_retval(-ECONNREFUSED) };
        return REFUSE;
    }
    // SAFETY: the helper has no arguments.
    let slot = unsafe { bpf_get_prandom_u32() } % count;
    // SAFETY: as above.
    let Some(backend) = (unsafe { BACKENDS.get(&BackendKey { set, slot }) }) else {
        return ALLOW;
    };
    let (to, to_port) = (backend.address, backend.port);
    // SAFETY: the context is the one that the kernel gave.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.sock_addr.cast()) };
    let reverse = ReverseKey {
        cookie,
        address: to,
        port: to_port,
        pad: 0,
    };
    // A full table forgets the oldest; only what getpeername says would differ then.
    let _ = REVERSE.insert(
        &reverse,
        &Address {
            address,
            port,
            pad: 0,
        },
        0,
    );
    // SAFETY: both fields may be written by this hook.
    unsafe {
        (*ctx.sock_addr).user_ip4 = to;
        (*ctx.sock_addr).user_port = u32::from(to_port);
    }
    ALLOW
}

/// What a socket was given is shown as what it asked for.
#[inline(always)]
fn restore(ctx: &SockAddrContext) -> i32 {
    // SAFETY: as in `translate`.
    let (address, port) = unsafe { ((*ctx.sock_addr).user_ip4, (*ctx.sock_addr).user_port as u16) };
    // SAFETY: as in `translate`.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.sock_addr.cast()) };
    // SAFETY: as in `translate`.
    if let Some(asked) = unsafe {
        REVERSE.get(&ReverseKey {
            cookie,
            address,
            port,
            pad: 0,
        })
    } {
        let (address, port) = (asked.address, asked.port);
        // SAFETY: both fields may be written by this hook.
        unsafe {
            (*ctx.sock_addr).user_ip4 = address;
            (*ctx.sock_addr).user_port = u32::from(port);
        }
    }
    ALLOW
}
