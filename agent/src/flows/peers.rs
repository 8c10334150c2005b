//! Hubble's `peer.Peer`: which nodes serve flows, for relays.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use futures::stream::{BoxStream, StreamExt};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use xebec_hubble::peer::{
    ChangeNotification, ChangeNotificationType, NotifyRequest, Tls, peer_server::Peer,
};

use crate::nodes::Nodes;

/// Tells of the nodes that serve flows.
#[derive(Clone)]
pub struct Peers {
    nodes: watch::Receiver<Nodes>,
    /// The port at which all of them serve, and whether with TLS; none where they do not.
    serve: Option<(u16, bool)>,
    shutdown: CancellationToken,
}

impl Peers {
    /// All nodes, which serve as this one does.
    #[must_use]
    pub fn new(
        nodes: watch::Receiver<Nodes>,
        serve: Option<(u16, bool)>,
        shutdown: CancellationToken,
    ) -> Self {
        Self {
            nodes,
            serve,
            shutdown,
        }
    }
}

/// What a node's certificate calls it, as Cilium's do.
fn server_name(node: &str) -> String {
    let node = node.replace('.', "-");
    format!(
        "{node}.{}.hubble-grpc.cilium.io",
        xebec_hubble::DEFAULT_CLUSTER
    )
}

fn notification(
    kind: ChangeNotificationType,
    node: &str,
    address: IpAddr,
    (port, tls): (u16, bool),
) -> ChangeNotification {
    ChangeNotification {
        name: node.to_owned(),
        address: SocketAddr::new(address, port).to_string(),
        r#type: kind.into(),
        tls: tls.then(|| Tls {
            server_name: server_name(node),
        }),
    }
}

/// What has changed between two moments.
fn changes(
    before: &BTreeMap<String, IpAddr>,
    after: &BTreeMap<String, IpAddr>,
    serve: (u16, bool),
) -> Vec<ChangeNotification> {
    use ChangeNotificationType::{PeerAdded, PeerDeleted, PeerUpdated};
    let gone = before.iter().filter(|(node, _)| !after.contains_key(*node));
    let gone = gone.map(|(node, address)| notification(PeerDeleted, node, *address, serve));
    let there = after.iter().filter_map(|(node, address)| {
        let kind = match before.get(node) {
            None => PeerAdded,
            Some(known) if known != address => PeerUpdated,
            Some(_) => return None,
        };
        Some(notification(kind, node, *address, serve))
    });
    gone.chain(there).collect()
}

/// One who is told: what it knows.
struct Told {
    nodes: watch::Receiver<Nodes>,
    known: BTreeMap<String, IpAddr>,
    serve: (u16, bool),
}

impl Told {
    /// The next changes; none when the agent ends.
    async fn next(&mut self) -> Option<Vec<ChangeNotification>> {
        loop {
            let now = self.nodes.borrow_and_update().clone();
            // Until the API has told of all of them, none is told as gone.
            if let Some(now) = now {
                let first = |(name, node): (String, crate::nodes::NodeView)| {
                    Some((name, *node.addresses.first()?))
                };
                let now = now.into_iter().filter_map(first).collect();
                let changes = changes(&self.known, &now, self.serve);
                self.known = now;
                if !changes.is_empty() {
                    return Some(changes);
                }
            }
            self.nodes.changed().await.ok()?;
        }
    }
}

#[tonic::async_trait]
impl Peer for Peers {
    type NotifyStream = BoxStream<'static, Result<ChangeNotification, Status>>;

    async fn notify(
        &self,
        _: Request<NotifyRequest>,
    ) -> Result<Response<Self::NotifyStream>, Status> {
        let serve = self.serve.ok_or_else(|| {
            Status::unavailable(
                "flows are served on a UNIX socket alone: see --hubble-listen-address",
            )
        })?;
        let told = Told {
            nodes: self.nodes.clone(),
            known: BTreeMap::new(),
            serve,
        };
        let changes = futures::stream::unfold(told, |mut told| async move {
            let changes = told.next().await?;
            Some((futures::stream::iter(changes.into_iter().map(Ok)), told))
        });
        let until = self.shutdown.clone().cancelled_owned();
        Ok(Response::new(changes.flatten().take_until(until).boxed()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nodes::NodeView;

    fn nodes(all: &[(&str, [u8; 4])]) -> Nodes {
        let view = |address: [u8; 4]| NodeView {
            addresses: vec![address.into()],
            ..NodeView::default()
        };
        Some(
            all.iter()
                .map(|(name, address)| ((*name).to_owned(), view(*address)))
                .collect(),
        )
    }

    #[tokio::test]
    async fn all_nodes_are_told_and_then_every_change() {
        let (sender, receiver) = watch::channel(None);
        let shutdown = CancellationToken::new();
        let peers = Peers::new(receiver, Some((4244, true)), shutdown.clone());
        let mut told = peers
            .notify(Request::new(NotifyRequest {}))
            .await
            .unwrap()
            .into_inner();
        sender.send_replace(nodes(&[("a", [10, 0, 0, 1]), ("b.example", [10, 0, 0, 2])]));
        let first = told.next().await.unwrap().unwrap();
        assert_eq!(
            (first.name.as_str(), first.address.as_str()),
            ("a", "10.0.0.1:4244")
        );
        assert_eq!(first.r#type(), ChangeNotificationType::PeerAdded);
        let second = told.next().await.unwrap().unwrap();
        assert_eq!(
            second.tls.unwrap().server_name,
            "b-example.default.hubble-grpc.cilium.io"
        );
        sender.send_replace(nodes(&[("b.example", [10, 0, 0, 3])]));
        let gone = told.next().await.unwrap().unwrap();
        assert_eq!(
            (gone.name.as_str(), gone.r#type()),
            ("a", ChangeNotificationType::PeerDeleted)
        );
        let moved = told.next().await.unwrap().unwrap();
        assert_eq!(moved.address, "10.0.0.3:4244");
        assert_eq!(moved.r#type(), ChangeNotificationType::PeerUpdated);
        shutdown.cancel();
        assert!(told.next().await.is_none());
    }

    #[tokio::test]
    async fn who_serves_nobody_says_so() {
        let peers = Peers::new(watch::channel(None).1, None, CancellationToken::new());
        let refused = peers
            .notify(Request::new(NotifyRequest {}))
            .await
            .err()
            .unwrap();
        assert_eq!(refused.code(), tonic::Code::Unavailable);
    }
}
