//! Leases (`coordination.k8s.io`), as far as an election needs them.

use std::time::Duration;

use anyhow::{Error, anyhow};
use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{DeleteParams, PostParams, Preconditions};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};

/// Where the leases are.
pub const NAMESPACE: &str = "kube-system";
/// The label that leases of this kind have, with [`KIND`].
pub const LABEL: &str = "xebec.io/lease";
/// What the leases are for.
pub const KIND: &str = "l2-announcement";

/// Why a lease was not written.
#[derive(Debug)]
pub enum Refused {
    /// Another wrote it, or it is gone or there already.
    Conflict,
    /// Anything else; it may go better the next time.
    Failed(Error),
}

/// A table of leases, each of which is written only by who knows how it is.
pub trait Leases: Send + Sync + 'static {
    /// How one is now.
    fn get(&self, name: &str) -> impl Future<Output = Result<Option<Lease>, Error>> + Send;
    /// Makes one.
    fn create(&self, lease: Lease) -> impl Future<Output = Result<Lease, Refused>> + Send;
    /// Writes one over the version that it has.
    fn replace(&self, lease: Lease) -> impl Future<Output = Result<Lease, Refused>> + Send;
    /// Takes one away, if it is still of this version.
    fn delete(&self, lease: &Lease) -> impl Future<Output = Result<(), Refused>> + Send;
    /// What happens to those of this kind; all of them are told first.
    fn watch(&self) -> BoxStream<'static, Result<Event<Lease>, Error>>;
}

/// Those of a cluster.
pub struct Cluster(Api<Lease>);

/// An API server that says nothing for so long is asked again.
const PATIENCE: Duration = Duration::from_secs(5);

impl Cluster {
    /// Asks the API server.
    pub fn new(client: Client) -> Self {
        Self(Api::namespaced(client, NAMESPACE))
    }
}

async fn patient<T>(asked: impl Future<Output = kube::Result<T>>) -> Result<T, Refused> {
    match tokio::time::timeout(PATIENCE, asked).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => {
            Err(Refused::Conflict)
        }
        Ok(Err(error)) => Err(Refused::Failed(error.into())),
        Err(_) => Err(Refused::Failed(anyhow!(
            "the API server does not answer a request for a Lease"
        ))),
    }
}

impl Leases for Cluster {
    async fn get(&self, name: &str) -> Result<Option<Lease>, Error> {
        match patient(self.0.get_opt(name)).await {
            Ok(lease) => Ok(lease),
            Err(Refused::Conflict) => Ok(None),
            Err(Refused::Failed(error)) => Err(error),
        }
    }

    async fn create(&self, lease: Lease) -> Result<Lease, Refused> {
        patient(self.0.create(&PostParams::default(), &lease)).await
    }

    async fn replace(&self, lease: Lease) -> Result<Lease, Refused> {
        let name = lease.metadata.name.clone().unwrap_or_default();
        patient(self.0.replace(&name, &PostParams::default(), &lease)).await
    }

    async fn delete(&self, lease: &Lease) -> Result<(), Refused> {
        let name = lease.metadata.name.clone().unwrap_or_default();
        let parameters = DeleteParams::default().preconditions(Preconditions {
            uid: lease.metadata.uid.clone(),
            resource_version: lease.metadata.resource_version.clone(),
        });
        patient(self.0.delete(&name, &parameters)).await.map(drop)
    }

    fn watch(&self) -> BoxStream<'static, Result<Event<Lease>, Error>> {
        let config = watcher::Config::default().labels(&format!("{LABEL}={KIND}"));
        let events = watcher(self.0.clone(), config).default_backoff();
        errors(events).boxed()
    }
}

fn errors(
    events: impl Stream<Item = watcher::Result<Event<Lease>>>,
) -> impl Stream<Item = Result<Event<Lease>, Error>> {
    events.map(|event| event.map_err(Error::from))
}
