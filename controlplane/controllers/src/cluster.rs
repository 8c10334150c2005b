//! The watches that the controllers share.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{
    ConfigMap, Endpoints, Namespace, Node, Pod, Service, ServiceAccount,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::runtime::watcher;
use kube::{Api, Client, Resource};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::endpoint_slice::SliceNames;
use crate::informer::{Informer, Key};

/// Every kind that more than the garbage collector looks at, watched once.
pub(crate) struct Cluster {
    pub client: Client,
    pub pods: Informer<Pod>,
    pub replica_sets: Informer<ReplicaSet>,
    pub deployments: Informer<Deployment>,
    pub services: Informer<Service>,
    pub endpoint_slices: Informer<EndpointSlice>,
    slice_names: Arc<SliceNames>,
    pub endpoints: Informer<Endpoints>,
    pub namespaces: Informer<Namespace>,
    /// The ones named `default` only.
    pub service_accounts: Informer<ServiceAccount>,
    /// The ones named `kube-root-ca.crt` only.
    pub root_cas: Informer<ConfigMap>,
    pub nodes: Informer<Node>,
    /// Those of `kube-node-lease` only.
    pub leases: Informer<Lease>,
}

impl Cluster {
    pub(crate) fn new(client: Client) -> Self {
        let all = watcher::Config::default;
        let named = |name: &str| all().fields(&format!("metadata.name={name}"));
        let api = || client.clone();
        let endpoint_slices = Informer::new(Api::all(api()), all());
        let slice_names = Arc::new(SliceNames::default());
        let names = slice_names.clone();
        endpoint_slices.on_change(move |old: Option<&Arc<_>>, new: Option<&Arc<_>>| {
            names.change(old.map(Arc::as_ref), new.map(Arc::as_ref));
        });
        Self {
            pods: Informer::new(Api::all(api()), all()),
            replica_sets: Informer::new(Api::all(api()), all()),
            deployments: Informer::new(Api::all(api()), all()),
            services: Informer::new(Api::all(api()), all()),
            endpoint_slices,
            slice_names,
            endpoints: Informer::new(Api::all(api()), all()),
            namespaces: Informer::new(Api::all(api()), all()),
            service_accounts: Informer::new(Api::all(api()), named("default")),
            root_cas: Informer::new(Api::all(api()), named("kube-root-ca.crt")),
            nodes: Informer::new(Api::all(api()), all()),
            leases: Informer::new(Api::namespaced(api(), "kube-node-lease"), all()),
            client,
        }
    }

    /// The slices of a Service, whoever made them, by name.
    pub(crate) fn slices_of(&self, service: &Key) -> Vec<Arc<EndpointSlice>> {
        let names = self.slice_names.of(service);
        let slice = |name: &String| {
            self.endpoint_slices
                .get(&Key::new(&service.namespace, name))
        };
        names.iter().filter_map(slice).collect()
    }

    /// Runs all watches until `shutdown`.
    pub(crate) async fn watch(self: Arc<Self>, shutdown: CancellationToken) -> anyhow::Result<()> {
        let stop = || shutdown.clone();
        tokio::join!(
            self.pods.run(stop()),
            self.replica_sets.run(stop()),
            self.deployments.run(stop()),
            self.services.run(stop()),
            self.endpoint_slices.run(stop()),
            self.endpoints.run(stop()),
            self.namespaces.run(stop()),
            self.service_accounts.run(stop()),
            self.root_cas.run(stop()),
            self.nodes.run(stop()),
            self.leases.run(stop()),
        );
        Ok(())
    }
}

/// Writes events in one controller's name.
#[derive(Clone)]
pub(crate) struct Teller(Recorder);

impl Teller {
    pub(crate) fn new(client: Client, controller: &str) -> Self {
        let reporter = Reporter {
            controller: controller.into(),
            instance: None,
        };
        Self(Recorder::new(client, reporter))
    }

    /// Tells the user; beside the work, which does not wait for it.
    pub(crate) fn tell<K: Resource<DynamicType = ()>>(
        &self,
        about: &K,
        type_: EventType,
        reason: &str,
        note: String,
    ) {
        let (recorder, reference) = (self.0.clone(), about.object_ref(&()));
        // More than 1,024 bytes are refused.
        let mut end = note.len().min(1024);
        while !note.is_char_boundary(end) {
            end -= 1;
        }
        let event = Event {
            type_,
            reason: reason.into(),
            note: Some(note[..end].to_owned()),
            action: reason.into(),
            secondary: None,
        };
        tokio::spawn(async move {
            // An event that gets lost (its namespace may be going away) must not disturb the work.
            if let Err(error) = recorder.publish(&event, &reference).await {
                debug!(reason = event.reason, %error, "could not write an event");
            }
        });
    }
}

/// Whether the API server answered with this HTTP status.
pub(crate) fn is_code(error: &kube::Error, code: u16) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == code)
}

/// Whether a create was refused because its namespace is going away: trying again is no use.
pub(crate) fn is_namespace_terminating(error: &kube::Error) -> bool {
    let kube::Error::Api(status) = error else {
        return false;
    };
    status.code == 403
        && (status.message.contains("because it is being terminated")
            || status.details.as_ref().is_some_and(|details| {
                details
                    .causes
                    .iter()
                    .any(|cause| cause.reason == "NamespaceTerminating")
            }))
}
