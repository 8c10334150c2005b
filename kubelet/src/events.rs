//! Events about pods and the node.

use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tracing::warn;

/// Writes events as `kubelet`.
#[derive(Clone)]
pub(crate) struct Teller(Recorder);

impl Teller {
    pub(crate) fn new(client: kube::Client, node: &str) -> Self {
        let reporter = Reporter {
            controller: "kubelet".into(),
            instance: Some(node.to_owned()),
        };
        Self(Recorder::new(client, reporter))
    }

    /// Something went as it should.
    pub(crate) async fn normal(
        &self,
        pod: &Pod,
        container: Option<&str>,
        reason: &str,
        note: String,
    ) {
        self.tell(EventType::Normal, pod, container, reason, note)
            .await;
    }

    /// Something went wrong.
    pub(crate) async fn warning(
        &self,
        pod: &Pod,
        container: Option<&str>,
        reason: &str,
        note: String,
    ) {
        self.tell(EventType::Warning, pod, container, reason, note)
            .await;
    }

    async fn tell(
        &self,
        type_: EventType,
        pod: &Pod,
        container: Option<&str>,
        reason: &str,
        note: String,
    ) {
        let about = ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Pod".into()),
            name: pod.metadata.name.clone(),
            namespace: pod.metadata.namespace.clone(),
            uid: pod.metadata.uid.clone(),
            field_path: container.map(|name| format!("spec.containers{{{name}}}")),
            ..ObjectReference::default()
        };
        // events.k8s.io allows 1,024 bytes.
        let note: String = note.chars().take(1000).collect();
        let event = Event {
            type_,
            reason: reason.into(),
            note: Some(note),
            action: reason.into(),
            secondary: None,
        };
        if let Err(error) = self.0.publish(&event, &about).await {
            warn!(reason, %error, "could not write an event");
        }
    }
}
