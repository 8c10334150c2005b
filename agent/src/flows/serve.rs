//! Where flows of this node are served.

use std::path::PathBuf;

use anyhow::Result;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use xebec_hubble::serve::{Api, Listen};

use super::Flows;
use super::observer::NodeObserver;
use super::peers::Peers;
use crate::nodes::Nodes;

/// Serves on a socket, and at an address if there is one, until `shutdown`.
pub(crate) async fn run(
    socket: PathBuf,
    listen: Option<Listen>,
    flows: Flows,
    nodes: watch::Receiver<Nodes>,
    shutdown: CancellationToken,
) -> Result<()> {
    let on_tcp = listen
        .as_ref()
        .map(|listen| (listen.address.port(), listen.tls.is_some()));
    let observer = NodeObserver::new(flows, shutdown.clone());
    let peers = Peers::new(nodes, on_tcp, shutdown.clone());
    let api = Api::new(observer, Some(peers), shutdown).await;
    let tcp = async {
        match listen {
            Some(listen) => api.tcp(listen).await,
            None => Ok(()),
        }
    };
    tokio::try_join!(api.unix(&socket), tcp).map(drop)
}
