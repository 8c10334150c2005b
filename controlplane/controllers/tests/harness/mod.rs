//! A control plane for tests, the node that they play, and what they wait with.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{Config as Watch, watcher};
use kube::{Api, Client, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use xebec_apiserver::{ApiServer, UserInfo};
use xebec_controllers::Config;
use xebec_store::{Embedded, Options};

pub const CA: &str = "-----BEGIN CERTIFICATE-----\ntest\n-----END CERTIFICATE-----\n";

/// How long a pod takes to stop.
pub const STOPPING: Duration = Duration::from_millis(300);

/// A control plane without a scheduler and a kubelet; everything ends with it.
pub struct Cluster {
    pub client: Client,
    pub stop: CancellationToken,
    controllers: tokio::task::JoinHandle<anyhow::Result<()>>,
    server: Arc<ApiServer>,
    directory: tempfile::TempDir,
}

impl Cluster {
    pub async fn start() -> Self {
        Self::start_with(|_, _| {}).await
    }

    /// With other settings of API server and controllers.
    pub async fn start_with(set: impl FnOnce(&mut xebec_apiserver::Config, &mut Config)) -> Self {
        let directory = tempfile::tempdir().expect("a temporary folder");
        Self::start_in(directory, set).await
    }

    /// Over a store that is there already.
    pub async fn start_in(
        directory: tempfile::TempDir,
        set: impl FnOnce(&mut xebec_apiserver::Config, &mut Config),
    ) -> Self {
        let mut store = Embedded::open(directory.path(), Options::default());
        for _ in 0..100 {
            // Tasks of the cluster before may still be ending.
            if store.is_ok() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
            store = Embedded::open(directory.path(), Options::default());
        }
        let store = store.expect("the store opens");
        let stop = CancellationToken::new();
        let key = rcgen::KeyPair::generate().expect("a key").serialize_pem();
        let mut server_config = xebec_apiserver::Config {
            service_account_key_pem: key,
            ..xebec_apiserver::Config::default()
        };
        let mut config = Config {
            service_account_ca: CA.into(),
            // Nobody plays the nodes' heartbeats.
            node_monitor_grace_period: Duration::from_secs(3600),
            pod_gc_quarantine: Duration::from_millis(200),
            ..Config::default()
        };
        set(&mut server_config, &mut config);
        let server = ApiServer::start(server_config, store, stop.clone())
            .await
            .expect("the API server starts");
        let user = |name: &str, groups: &[&str]| {
            Client::new(server.in_process(UserInfo::new(name, groups)), "default")
        };
        let controllers = user("system:kube-controller-manager", &["system:authenticated"]);
        let controllers = tokio::spawn(xebec_controllers::run(controllers, config, stop.clone()));
        Self {
            client: user("kubernetes-admin", &["system:masters"]),
            stop,
            controllers,
            server,
            directory,
        }
    }

    pub fn api<K>(&self, namespace: &str) -> Api<K>
    where
        K: kube::Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), namespace)
    }

    pub async fn namespace(&self, name: &str) {
        let api = Api::<Namespace>::all(self.client.clone());
        create(&api, json!({"metadata": {"name": name}})).await;
    }

    /// A node whose kubelet runs every pod at once and stops it a little after it is told to.
    pub async fn node(&self, name: &str) -> tokio::task::JoinHandle<()> {
        let nodes = Api::<Node>::all(self.client.clone());
        create(
            &nodes,
            json!({"metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": "z1"}}}),
        )
        .await;
        let status = json!({"status": {"conditions": [{"type": "Ready", "status": "True",
            "lastHeartbeatTime": "2025-01-01T00:00:00Z", "lastTransitionTime": "2025-01-01T00:00:00Z"}]}});
        nodes
            .patch_status(name, &PatchParams::default(), &Patch::Merge(status))
            .await
            .expect("the node's status");
        let (client, name, stop) = (self.client.clone(), name.to_owned(), self.stop.clone());
        tokio::spawn(async move {
            let pods = watcher(Api::<Pod>::all(client.clone()), Watch::default())
                .default_backoff()
                .touched_objects();
            let mut pods = std::pin::pin!(pods);
            let mut last = 1;
            loop {
                let pod = tokio::select! {
                    () = stop.cancelled() => return,
                    pod = pods.try_next() => pod,
                };
                if let Ok(Some(pod)) = pod {
                    // What fails because the pod changed comes again with the change.
                    let _ = run_pod(&client, &name, &pod, &mut last).await;
                }
            }
        })
    }

    /// Ends everything; the controllers must have run without an error until now.
    pub async fn end(self) -> tempfile::TempDir {
        assert!(
            !self.controllers.is_finished(),
            "the controllers ended early: {:?}",
            self.controllers.await
        );
        self.stop.cancel();
        let ended = tokio::time::timeout(Duration::from_secs(10), self.controllers).await;
        ended
            .expect("the controllers end when told")
            .expect("no panic")
            .expect("no error");
        drop(self.server);
        self.directory
    }
}

pub async fn run_pod(client: &Client, node: &str, pod: &Pod, last: &mut u8) -> kube::Result<()> {
    let (name, namespace) = (pod.name_any(), pod.namespace().unwrap_or_default());
    let api = Api::<Pod>::namespaced(client.clone(), &namespace);
    let bound = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
    let phase = pod.status.as_ref().and_then(|status| status.phase.clone());
    match bound {
        None if pod.metadata.deletion_timestamp.is_none() => {
            let binding = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name},
                "target": {"kind": "Node", "name": node}});
            let _: Value = api
                .create_subresource("binding", &name, &PostParams::default(), &binding)
                .await?;
        }
        Some(bound) if bound == node && pod.metadata.deletion_timestamp.is_some() => {
            // It takes its time, during which a rash controller would be found out.
            tokio::spawn(async move {
                tokio::time::sleep(STOPPING).await;
                // Already gone when told twice.
                let _ = api
                    .delete(&name, &DeleteParams::default().grace_period(0))
                    .await;
            });
        }
        Some(bound) if bound == node && phase.as_deref() != Some("Running") => {
            *last += 1;
            let ip = format!("10.244.0.{last}");
            let status = json!({"status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": [
                {"type": "Ready", "status": "True", "lastTransitionTime": "2025-01-01T00:00:00Z"}]}});
            api.patch_status(&name, &PatchParams::default(), &Patch::Strategic(status))
                .await?;
        }
        _ => {}
    }
    Ok(())
}

pub async fn create<K>(api: &Api<K>, object: Value) -> K
where
    K: Clone + DeserializeOwned + Debug + serde::Serialize,
{
    let object = serde_json::from_value(object).expect("an object of its kind");
    api.create(&PostParams::default(), &object)
        .await
        .expect("created")
}

/// Lists until the objects are as wanted; says what they were if they never are.
pub async fn until<K, T: Debug>(
    api: &Api<K>,
    what: &str,
    wanted: impl Fn(&[K]) -> Result<T, String>,
) -> T
where
    K: Clone + DeserializeOwned + Debug,
{
    let mut last = String::new();
    for _ in 0..600 {
        match wanted(
            &api.list(&ListParams::default())
                .await
                .expect("listed")
                .items,
        ) {
            Ok(found) => return found,
            Err(problem) => last = problem,
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{what}: {last}");
}

pub fn check(holds: bool, problem: impl Debug) -> Result<(), String> {
    if holds {
        Ok(())
    } else {
        Err(format!("{problem:?}"))
    }
}

pub fn web(replicas: i32, image: &str, strategy: Value) -> Value {
    json!({
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {
            "replicas": replicas, "selector": {"matchLabels": {"app": "web"}}, "strategy": strategy,
            "template": {
                "metadata": {"labels": {"app": "web"}},
                "spec": {"containers": [{"name": "c", "image": image, "ports": [{"name": "http", "containerPort": 8080}]}]},
            },
        },
    })
}

/// The Deployment has rolled out this image at this size.
pub async fn rolled_out(cluster: &Cluster, image: &str, size: i32) -> Deployment {
    until(&cluster.api::<Deployment>("shop"), "rolled out", |found| {
        let deployment = found.first().ok_or("no deployment")?;
        let status = deployment.status.clone().unwrap_or_default();
        let containers = deployment
            .spec
            .as_ref()
            .and_then(|spec| spec.template.spec.as_ref());
        let has = containers.is_some_and(|spec| spec.containers[0].image.as_deref() == Some(image));
        let done = status.observed_generation == deployment.metadata.generation
            && [
                status.replicas,
                status.updated_replicas,
                status.available_replicas,
            ]
            .iter()
            .all(|n| n.unwrap_or(0) == size)
            && status
                .conditions
                .iter()
                .flatten()
                .any(|c| c.reason.as_deref() == Some("NewReplicaSetAvailable"));
        check(has && done, &deployment.status)?;
        Ok(deployment.clone())
    })
    .await
}

pub fn addresses(slices: &[EndpointSlice]) -> BTreeSet<String> {
    let ready = slices
        .iter()
        .flat_map(|slice| slice.endpoints.iter().flatten());
    let ready = ready.filter(|endpoint| {
        endpoint
            .conditions
            .as_ref()
            .is_some_and(|c| c.ready == Some(true))
    });
    ready
        .flat_map(|endpoint| endpoint.addresses.clone())
        .collect()
}
