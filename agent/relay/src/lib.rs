//! The relay: one endpoint of Hubble's API (`observer.Observer`) for the flows of all nodes, in the order of time.
//!
//! It learns of the nodes from one of them (`peer.Peer`) and asks each that is asked for. A node that does not answer is
//! told of, and the others' flows are.

mod nodes;
mod observer;

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use tokio_util::sync::CancellationToken;
use tonic::async_trait;
use xebec_hubble::client::{Server, Tls};
use xebec_hubble::peer::peer_server::Peer;
use xebec_hubble::peer::{ChangeNotification, NotifyRequest};
use xebec_hubble::serve::{Api, Listen};

use nodes::Nodes;
use observer::Relay;

/// How the relay learns of the nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peers {
    /// From a server that knows them (`peer.Peer`).
    Told(Server),
    /// It is these, always.
    These(BTreeMap<String, Server>),
}

/// How the relay runs.
#[derive(Clone, Debug)]
pub struct Config {
    /// How it learns of the nodes.
    pub peers: Peers,
    /// How nodes prove who they are, and the relay to them; none for nodes that serve without TLS.
    pub tls: Option<Tls>,
    /// Where it serves.
    pub listen: Option<Listen>,
    /// A socket on which it serves.
    pub socket: Option<PathBuf>,
}

/// Serves until `shutdown`.
///
/// # Errors
/// If it can't listen, or certificates can't be used.
pub async fn run(config: Config, shutdown: CancellationToken) -> Result<()> {
    ensure!(
        config.listen.is_some() || config.socket.is_some(),
        "the relay is to serve nowhere"
    );
    let nodes = Nodes::new(config.tls);
    let relay = Relay::new(nodes.clone(), shutdown.clone());
    let api = Api::new(relay, None::<NoPeers>, shutdown.clone()).await;
    let tcp = async {
        match config.listen {
            Some(listen) => api.tcp(listen).await,
            None => Ok(()),
        }
    };
    let unix = async {
        match &config.socket {
            Some(socket) => api.unix(socket).await,
            None => Ok(()),
        }
    };
    let follow = async {
        match &config.peers {
            Peers::Told(server) => nodes.follow(server, shutdown).await,
            Peers::These(all) => {
                nodes.set(all);
                shutdown.cancelled().await;
            }
        }
        Ok(())
    };
    tokio::try_join!(tcp, unix, follow).map(drop)
}

/// A relay serves none.
struct NoPeers;

#[async_trait]
impl Peer for NoPeers {
    type NotifyStream = futures::stream::Empty<Result<ChangeNotification, tonic::Status>>;

    async fn notify(
        &self,
        _: tonic::Request<NotifyRequest>,
    ) -> Result<tonic::Response<Self::NotifyStream>, tonic::Status> {
        Err(tonic::Status::unimplemented("ask a node for its peers"))
    }
}

#[cfg(test)]
mod tests;
