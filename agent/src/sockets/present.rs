//! The connections that this namespace's processes have now.

use std::collections::HashSet;
use std::net::SocketAddr;

use anyhow::Result;

use super::diag::Diag;

/// A connection of TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Connection {
    /// Who began it.
    pub from: SocketAddr,
    /// With whom.
    pub to: SocketAddr,
}

/// All of them, but for those that stay within the node's loopback device. One whose own port is listened at was begun by
/// the other end.
pub(crate) fn connections() -> Result<HashSet<Connection>> {
    let mut diag = Diag::open()?;
    let (mut all, mut listened) = (Vec::new(), HashSet::new());
    for family in [libc::AF_INET, libc::AF_INET6] {
        let [connected, listening] = diag.tcp(family)?;
        listened.extend(listening.iter().map(|one| one.local().port()));
        all.extend(connected);
    }
    let ends = all.iter().map(|one| {
        let peer = one.peer();
        (one.local(), SocketAddr::new(peer.address, peer.port))
    });
    Ok(ends
        .filter(|(_, peer)| !peer.ip().is_loopback())
        .map(|(own, peer)| match listened.contains(&own.port()) {
            true => Connection {
                from: peer,
                to: own,
            },
            false => Connection {
                from: own,
                to: peer,
            },
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_within_the_node_alone_are_none() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let all = connections().unwrap();
        assert!(!all.iter().any(|one| one.to.port() == port), "{all:?}");
        drop(stream);
    }
}
