//! Forwarding of IPv6, turned on without losing the way out that a router has told of.
#![allow(clippy::unwrap_used, reason = "tests")]

mod namespaces;

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use namespaces::Namespace;
use rtnetlink::{LinkUnspec, LinkVeth};
use xebec_agent::{forwarding, link};

/// How long the kernel may take to hear of what it is told.
const PATIENCE: Duration = Duration::from_secs(5);

fn setting(namespace: &Namespace, name: &str) -> String {
    let path = format!("/proc/sys/net/ipv6/conf/{name}");
    let text = namespace.within(|| std::fs::read_to_string(path).unwrap());
    text.trim().to_owned()
}

fn set(namespace: &Namespace, name: &str, value: &str) {
    let path = format!("/proc/sys/net/ipv6/conf/{name}");
    namespace.within(|| std::fs::write(path, value).unwrap());
}

/// A router's advertisement: its default route holds for half an hour.
fn advertise(router: &Namespace, device: &str) {
    use nix::sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn6, sendto, setsockopt,
        sockopt,
    };
    router.within(|| {
        let kind = (AddressFamily::Inet6, SockType::Raw);
        let socket =
            nix::sys::socket::socket(kind.0, kind.1, SockFlag::SOCK_CLOEXEC, SockProtocol::IcmpV6)
                .unwrap();
        setsockopt(&socket, sockopt::Ipv6MulticastHops, &255).unwrap();
        let message = [134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0];
        let index = nix::net::if_::if_nametoindex(device).unwrap();
        let all_nodes = std::net::SocketAddrV6::new("ff02::1".parse().unwrap(), 0, 0, index);
        let to = SockaddrIn6::from(all_nodes);
        match sendto(socket.as_raw_fd(), &message, &to, MsgFlags::empty()) {
            // Its device has no address of its own yet.
            Ok(_) | Err(nix::errno::Errno::EADDRNOTAVAIL) => {}
            Err(error) => panic!("{error}"),
        }
    });
}

/// Whether there is a default route that a router has told of (`RTF_ADDRCONF`, ipv6_route's flags).
fn has_default_route(namespace: &Namespace) -> bool {
    const TOLD: u32 = 0x0004_0000;
    let text = namespace.within(|| std::fs::read_to_string("/proc/thread-self/net/ipv6_route"));
    let everywhere = "0".repeat(32);
    text.unwrap().lines().any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let flags = u32::from_str_radix(words[8], 16).unwrap();
        words[0] == everywhere && words[1] == "00" && flags & TOLD != 0
    })
}

/// Says it again until it is heard.
fn is_heard(router: &Namespace, node: &Namespace) -> bool {
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        advertise(router, "down");
        if has_default_route(node) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    false
}

/// A node whose device `up` leads to the device `down` of a router, and a device `shut` that hears none.
fn node_and_router() -> (Namespace, Namespace) {
    let (node, router) = (Namespace::new(), Namespace::new());
    let path = router.path();
    node.block_on(async || {
        let handle = link::handle().unwrap();
        for (name, peer) in [("up", "down"), ("shut", "other")] {
            let add = handle.link().add(LinkVeth::new(name, peer).build());
            add.execute().await.unwrap();
        }
        let (index, _) = link::find(&handle, "down").await.unwrap().unwrap();
        let far = std::fs::File::open(&path).unwrap();
        let away = LinkUnspec::new_with_index(index)
            .setns_by_fd(far.as_raw_fd())
            .build();
        handle.link().set(away).execute().await.unwrap();
    });
    for (namespace, name) in [(&node, "up"), (&router, "down")] {
        // Their own addresses are to be usable at once.
        set(namespace, &format!("{name}/accept_dad"), "0");
        namespace.block_on(async || {
            let handle = link::handle().unwrap();
            let (index, _) = link::find(&handle, name).await.unwrap().unwrap();
            let up = LinkUnspec::new_with_index(index).up().build();
            handle.link().set(up).execute().await.unwrap();
        });
    }
    set(&node, "shut/accept_ra", "0");
    (node, router)
}

#[test]
fn the_way_out_that_a_router_told_of_stays() {
    if namespaces::left_out() {
        return;
    }
    let (node, router) = node_and_router();
    assert!(is_heard(&router, &node), "the router is not heard at all");
    node.within(|| forwarding::turn_on(true, true).unwrap());
    assert_eq!(setting(&node, "all/forwarding"), "1");
    assert!(has_default_route(&node), "the route is gone");
    assert_eq!(setting(&node, "up/accept_ra"), "2");
    assert_eq!(setting(&node, "shut/accept_ra"), "0");
    // A device that comes later hears nobody.
    assert_eq!(setting(&node, "default/accept_ra"), "1");
    assert_eq!(setting(&node, "default/forwarding"), "1");
    // The next agent finds it so.
    node.within(|| forwarding::turn_on(true, true).unwrap());
    assert_eq!(setting(&node, "up/accept_ra"), "2");
}

#[test]
fn a_family_that_is_not_in_use_stays_as_it_is() {
    if namespaces::left_out() {
        return;
    }
    let (node, router) = node_and_router();
    node.within(|| forwarding::turn_on(true, false).unwrap());
    assert_eq!(setting(&node, "all/forwarding"), "0");
    assert_eq!(setting(&node, "up/accept_ra"), "1");
    assert!(is_heard(&router, &node));
}
