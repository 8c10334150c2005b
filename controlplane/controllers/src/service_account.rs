//! In each namespace: the ServiceAccount `default`, and the ConfigMap that pods trust the API server by.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Context;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::Config;
use crate::cluster::{Cluster, is_code, is_namespace_terminating};
use crate::informer::Key;
use crate::queue::{Again, Queue};

const ROOT_CA: &str = "kube-root-ca.crt";

/// Registers with the watches and gives the loop.
pub(crate) fn start(
    cluster: &Arc<Cluster>,
    config: &Config,
    shutdown: CancellationToken,
) -> impl Future<Output = anyhow::Result<()>> + Send + 'static {
    let queue = Queue::new();
    let wake = queue.clone();
    cluster.namespaces.on_change(move |_, new| {
        if let Some(namespace) = new {
            wake.add(Key::of(namespace.as_ref()));
        }
    });
    // What was removed is made again, what was changed put right.
    let wake = queue.clone();
    cluster.service_accounts.on_change(move |old, new| {
        if let (Some(old), None) = (old, new) {
            wake.add(Key::new("", &old.namespace().unwrap_or_default()));
        }
    });
    let wake = queue.clone();
    cluster.root_cas.on_change(move |old, new| {
        if let (Some(changed), _) = (old, new) {
            wake.add(Key::new("", &changed.namespace().unwrap_or_default()));
        }
    });
    let cluster = cluster.clone();
    let ca = config.service_account_ca.clone();
    async move {
        cluster.namespaces.synced().await;
        cluster.service_accounts.synced().await;
        cluster.root_cas.synced().await;
        queue
            .run("service account", 2, shutdown, |key| {
                let (cluster, ca) = (cluster.clone(), ca.clone());
                async move { reconcile(&cluster, &ca, &key).await }
            })
            .await;
        Ok(())
    }
}

async fn reconcile(cluster: &Cluster, ca: &str, key: &Key) -> anyhow::Result<Again> {
    let Some(namespace) = cluster
        .namespaces
        .get(key)
        .filter(|namespace| is_active(namespace))
    else {
        return Ok(None);
    };
    let name = namespace.name_any();
    if cluster
        .service_accounts
        .get(&Key::new(&name, "default"))
        .is_none()
    {
        let account = ServiceAccount {
            metadata: meta("default", &name),
            ..ServiceAccount::default()
        };
        let api = Api::<ServiceAccount>::namespaced(cluster.client.clone(), &name);
        made(api.create(&PostParams::default(), &account).await)
            .context("could not create the default service account")?;
    }
    let data = BTreeMap::from([("ca.crt".to_owned(), ca.to_owned())]);
    let api = Api::<ConfigMap>::namespaced(cluster.client.clone(), &name);
    match cluster.root_cas.get(&Key::new(&name, ROOT_CA)) {
        Some(map) if map.data.as_ref() == Some(&data) => {}
        Some(_) => {
            let patch = json!([{"op": "add", "path": "/data", "value": data}]);
            let patch = Patch::Json::<()>(serde_json::from_value(patch)?);
            match api.patch(ROOT_CA, &PatchParams::default(), &patch).await {
                Ok(map) => cluster.root_cas.note(map),
                Err(error) if is_code(&error, 404) => {}
                Err(error) => return Err(error).context("could not put kube-root-ca.crt right"),
            }
        }
        None => {
            let mut metadata = meta(ROOT_CA, &name);
            let note = "Contains a CA bundle that can be used to verify the kube-apiserver when using \
                        internal endpoints such as the internal service IP or kubernetes.default.svc. \
                        No other usage is guaranteed across distributions of Kubernetes clusters.";
            metadata.annotations = Some(BTreeMap::from([(
                "kubernetes.io/description".to_owned(),
                note.to_owned(),
            )]));
            let map = ConfigMap {
                metadata,
                data: Some(data),
                ..ConfigMap::default()
            };
            made(api.create(&PostParams::default(), &map).await)
                .context("could not create kube-root-ca.crt")?;
        }
    }
    Ok(None)
}

fn meta(name: &str, namespace: &str) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.into()),
        namespace: Some(namespace.into()),
        ..ObjectMeta::default()
    }
}

/// That it is there already, or its namespace is going away, is as good.
fn made<K>(result: kube::Result<K>) -> kube::Result<()> {
    match result {
        Ok(_) => Ok(()),
        Err(error) if is_namespace_terminating(&error) => Ok(()),
        Err(error) if is_code(&error, 409) || is_code(&error, 404) => Ok(()),
        Err(error) => Err(error),
    }
}

fn is_active(namespace: &Namespace) -> bool {
    let phase = namespace
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    namespace.metadata.deletion_timestamp.is_none() && phase != Some("Terminating")
}
