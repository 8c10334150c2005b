//! The API, asked as an administrator by blocking calls.

use std::fmt::Debug;

use anyhow::{Context, Result};
use k8s_openapi::serde::Serialize;
use k8s_openapi::serde::de::DeserializeOwned;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::NamespaceResourceScope;
use kube::{Client, Resource};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::Cluster;

/// Namespace and name.
pub type Name = (String, String);

/// A pod on a node that runs the demo's server, as the API takes it.
pub fn demo_pod(namespace: &str, name: &str, node: &str, labels: &Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name, "labels": labels},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 0,
            "containers": [{
                "name": "demo",
                "image": "xebec.local/demo:latest",
                "imagePullPolicy": "IfNotPresent",
                "args": ["serve"],
            }],
        },
    })
}

/// A client.
pub struct Api {
    client: Client,
    runtime: Runtime,
}

impl Api {
    /// One of a cluster.
    pub fn of(cluster: &Cluster) -> Result<Self> {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(1).enable_all().build()?;
        let options = KubeConfigOptions::default();
        let client = runtime.block_on(async {
            let file = Kubeconfig::read_from(cluster.kubeconfig())?;
            let config = kube::Config::from_custom_kubeconfig(file, &options).await?;
            Ok::<_, anyhow::Error>(Client::try_from(config)?)
        })?;
        Ok(Self { client, runtime })
    }

    /// Objects of the whole cluster.
    pub fn cluster<K>(&self) -> Objects<'_, K>
    where
        K: Resource<DynamicType = ()>,
    {
        Objects {
            api: kube::Api::all(self.client.clone()),
            runtime: &self.runtime,
        }
    }

    /// Objects of a namespace.
    pub fn namespace<K>(&self, namespace: &str) -> Objects<'_, K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        Objects {
            api: kube::Api::namespaced(self.client.clone(), namespace),
            runtime: &self.runtime,
        }
    }

    /// Objects where that of this name is, and its name there.
    pub fn beside<'a, K>(&self, name: &'a Name) -> (Objects<'_, K>, &'a str)
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        (self.namespace(&name.0), &name.1)
    }
}

/// Objects of one kind.
pub struct Objects<'a, K> {
    api: kube::Api<K>,
    runtime: &'a Runtime,
}

impl<K: Clone + Debug + Serialize + DeserializeOwned> Objects<'_, K> {
    /// All of them.
    pub fn list(&self) -> Result<Vec<Value>> {
        let all = self.runtime.block_on(self.api.list(&ListParams::default()));
        Ok(all?.items.iter().map(|one| json!(one)).collect())
    }

    /// One of them.
    pub fn get(&self, name: &str) -> Result<Value> {
        let one = self.runtime.block_on(self.api.get(name));
        Ok(json!(one.with_context(|| name.to_owned())?))
    }

    /// Creates one.
    pub fn create(&self, object: &Value) -> Result<()> {
        let object: K = serde_json::from_value(object.clone())?;
        let how = PostParams::default();
        let created = self.runtime.block_on(self.api.create(&how, &object));
        created.map(drop).map_err(Into::into)
    }

    /// Puts another in the place of one.
    pub fn replace(&self, name: &str, object: &Value) -> Result<()> {
        let mut object = object.clone();
        let before = self.get(name)?;
        object["metadata"]["resourceVersion"] = before["metadata"]["resourceVersion"].clone();
        let object: K = serde_json::from_value(object)?;
        let how = PostParams::default();
        let replaced = self.runtime.block_on(self.api.replace(name, &how, &object));
        replaced.map(drop).with_context(|| name.to_owned())
    }

    /// Merges a patch into one.
    pub fn patch(&self, name: &str, patch: &Value) -> Result<()> {
        let (how, patch) = (PatchParams::default(), Patch::Merge(patch));
        let patched = self.runtime.block_on(self.api.patch(name, &how, &patch));
        patched.map(drop).with_context(|| name.to_owned())
    }

    /// Takes one away at once.
    pub fn delete(&self, name: &str) -> Result<()> {
        let how = DeleteParams::default().grace_period(0);
        let deleted = self.runtime.block_on(self.api.delete(name, &how));
        deleted.map(drop).with_context(|| name.to_owned())
    }
}
