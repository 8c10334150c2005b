//! The nodes that serve flows, and connections to them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tracing::{info, warn};
use xebec_hubble::client::{Server, Tls};
use xebec_hubble::peer::peer_client::PeerClient;
use xebec_hubble::peer::{ChangeNotification, ChangeNotificationType, NotifyRequest};

/// How long it waits before it asks for the nodes again, at first and at most.
const AGAIN: Duration = Duration::from_millis(500);
const AGAIN_AT_MOST: Duration = Duration::from_secs(30);

/// A node that serves flows.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub server: Server,
    /// The name in its certificate; none without TLS.
    pub server_name: Option<String>,
    /// A connection that was made, and lasts.
    channel: Option<Channel>,
}

/// All nodes by name; cheap to clone.
#[derive(Clone)]
pub(crate) struct Nodes {
    known: Arc<Mutex<BTreeMap<String, Node>>>,
    tls: Option<Tls>,
}

impl Nodes {
    pub(crate) fn new(tls: Option<Tls>) -> Self {
        Self {
            known: Arc::default(),
            tls,
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Node>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that are known.
    pub(crate) fn all(&self) -> BTreeMap<String, Node> {
        self.lock().clone()
    }

    /// It is these, without TLS.
    pub(crate) fn set(&self, all: &BTreeMap<String, Server>) {
        let nodes = all.iter().map(|(name, server)| {
            let node = Node {
                server: server.clone(),
                server_name: None,
                channel: None,
            };
            (name.clone(), node)
        });
        *self.lock() = nodes.collect();
    }

    /// A connection to a node: the one from before, or a new one.
    pub(crate) async fn connect(&self, name: &str, node: &Node) -> Result<Channel> {
        if let Some(channel) = &node.channel {
            return Ok(channel.clone());
        }
        let tls = match (&node.server_name, &self.tls) {
            (None, _) => None,
            (Some(server_name), tls) => Some(Tls {
                server_name: Some(server_name.clone()),
                ..tls
                    .clone()
                    .context("the node serves with TLS, and the relay has no certificates")?
            }),
        };
        let channel = node.server.connect(tls.as_ref()).await?;
        if let Some(known) = self.lock().get_mut(name)
            && known.server == node.server
        {
            known.channel = Some(channel.clone());
        }
        Ok(channel)
    }

    /// Learns of the nodes from one that knows them, until `shutdown`; those that it knew stay while that one is away.
    pub(crate) async fn follow(&self, from: &Server, shutdown: CancellationToken) {
        let mut again = AGAIN;
        loop {
            let told = tokio::select! {
                () = shutdown.cancelled() => return,
                told = self.listen(from, &mut again) => told,
            };
            if let Err(error) = told {
                let error = format!("{error:#}");
                warn!(error, from = %from, "nobody tells of the nodes; trying again");
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(again) => {}
            }
            again = (again * 2).min(AGAIN_AT_MOST);
        }
    }

    async fn listen(&self, from: &Server, again: &mut Duration) -> Result<()> {
        let tls = match from {
            Server::Unix(_) => None,
            Server::Tcp(..) => self.tls.as_ref(),
        };
        let mut client = PeerClient::new(from.connect(tls).await?);
        let asked = client.notify(NotifyRequest {}).await;
        let mut changes = asked.context("it does not tell")?.into_inner();
        *again = AGAIN;
        // What it does not tell again is gone. It begins with all that there are, in one go.
        let mut before = Some(self.all());
        loop {
            let change = if before.is_some() {
                match tokio::time::timeout(AGAIN, changes.message()).await {
                    Ok(change) => change,
                    Err(_) => {
                        let gone = before.take().unwrap_or_default();
                        gone.keys().for_each(|name| drop(self.lock().remove(name)));
                        continue;
                    }
                }
            } else {
                changes.message().await
            };
            let Some(change) = change.context("it tells no more")? else {
                anyhow::bail!("it tells no more");
            };
            if let Some(before) = &mut before {
                before.remove(&change.name);
            }
            self.change(change);
        }
    }

    fn change(&self, change: ChangeNotification) {
        let name = change.name.clone();
        if change.r#type() == ChangeNotificationType::PeerDeleted {
            info!(node = name, "no longer serves flows");
            self.lock().remove(&name);
            return;
        }
        let server = match change.address.strip_prefix("unix://") {
            Some(path) => Server::Unix(path.into()),
            None => Server::Tcp(change.address.clone(), false),
        };
        let server_name = change.tls.map(|tls| tls.server_name);
        let mut known = self.lock();
        match known.get(&name) {
            Some(node) if node.server == server && node.server_name == server_name => {}
            _ => {
                info!(node = name, address = change.address, "serves flows");
                let node = Node {
                    server,
                    server_name,
                    channel: None,
                };
                known.insert(name, node);
            }
        }
    }
}
