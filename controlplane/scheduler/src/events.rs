//! What the scheduler tells the user about a pod: events, and the `PodScheduled` condition.

use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tracing::warn;

use crate::view::PodView;

/// Writes events as `default-scheduler`.
#[derive(Clone)]
pub(crate) struct Teller {
    client: kube::Client,
    recorder: Recorder,
}

impl Teller {
    pub(crate) fn new(client: kube::Client) -> Self {
        let reporter = Reporter {
            controller: "default-scheduler".into(),
            instance: None,
        };
        Self {
            recorder: Recorder::new(client.clone(), reporter),
            client,
        }
    }

    /// The pod has a node.
    pub(crate) async fn scheduled(&self, pod: &PodView, node: &str) {
        let note = format!("Successfully assigned {} to {node}", pod.key());
        self.publish(pod, EventType::Normal, "Scheduled", "Binding", note)
            .await;
    }

    /// No node was found, or binding failed; the pod's condition says so too.
    pub(crate) async fn failed(&self, pod: &PodView, message: &str, unschedulable: bool) {
        self.publish(
            pod,
            EventType::Warning,
            "FailedScheduling",
            "Scheduling",
            message.to_owned(),
        )
        .await;
        let reason = if unschedulable {
            "Unschedulable"
        } else {
            "SchedulerError"
        };
        let patch = serde_json::json!({"status": {"conditions": [{
            "type": "PodScheduled", "status": "False", "reason": reason, "message": message,
            "lastTransitionTime": k8s_openapi::jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        }]}});
        let api = Api::<Pod>::namespaced(self.client.clone(), &pod.namespace);
        match api
            .patch_status(&pod.name, &PatchParams::default(), &Patch::Strategic(patch))
            .await
        {
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => {
                warn!(pod = pod.key(), %error, "could not write the PodScheduled condition")
            }
            Ok(_) => {}
        }
    }

    async fn publish(
        &self,
        pod: &PodView,
        type_: EventType,
        reason: &str,
        action: &str,
        note: String,
    ) {
        let reference = ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Pod".into()),
            name: Some(pod.name.clone()),
            namespace: Some(pod.namespace.clone()),
            uid: Some(pod.uid.clone()),
            ..ObjectReference::default()
        };
        // More than 1,024 bytes are refused.
        let mut end = note.len().min(1024);
        while !note.is_char_boundary(end) {
            end -= 1;
        }
        let event = Event {
            type_,
            reason: reason.into(),
            note: Some(note[..end].to_owned()),
            action: action.into(),
            secondary: None,
        };
        if let Err(error) = self.recorder.publish(&event, &reference).await {
            warn!(pod = pod.key(), reason, %error, "could not write an event");
        }
    }
}
