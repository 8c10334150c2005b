//! DefaultBinder: writes the `pods/binding` subresource.

use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{Binding, ObjectReference, Pod};
use kube::api::{ObjectMeta, PostParams};

use crate::framework::{Bind, Plugin, Refusal};
use crate::view::PodView;

/// Binds through the API server.
pub struct DefaultBinder {
    client: kube::Client,
}

impl DefaultBinder {
    /// A binder that writes with this client's identity.
    pub fn new(client: kube::Client) -> Self {
        Self { client }
    }
}

impl Plugin for DefaultBinder {
    fn name(&self) -> &'static str {
        "DefaultBinder"
    }
}

impl Bind for DefaultBinder {
    fn bind<'a>(&'a self, pod: &'a PodView, node: &'a str) -> BoxFuture<'a, Result<(), Refusal>> {
        Box::pin(async move {
            let binding = Binding {
                metadata: ObjectMeta {
                    name: Some(pod.name.clone()),
                    namespace: Some(pod.namespace.clone()),
                    uid: Some(pod.uid.clone()),
                    ..ObjectMeta::default()
                },
                target: ObjectReference {
                    kind: Some("Node".into()),
                    name: Some(node.to_owned()),
                    ..ObjectReference::default()
                },
            };
            let api = kube::Api::<Pod>::namespaced(self.client.clone(), &pod.namespace);
            api.create_subresource::<Binding, serde_json::Value>(
                "binding",
                &pod.name,
                &PostParams::default(),
                &binding,
            )
            .await
            .map(drop)
            .map_err(|error| Refusal::new(format!("binding was refused: {error}")))
        })
    }
}
