//! What users are told of Services by Kubernetes Events.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::mpsc;
use tracing::{debug, warn};

use super::view::ServiceView;

/// Events that may wait to be sent; a hostile API server can cause any number.
const WAITING: usize = 256;

/// Why a user is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    DataplaneFull,
    PortConflict,
    InvalidService,
    InvalidEndpoints,
    FailedToStartServiceHealthcheck,
}

/// What a user is told of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Namespace and name.
    pub service: String,
    pub uid: Option<String>,
    pub reason: Reason,
    pub words: String,
}

impl Notice {
    pub fn new(name: &str, view: Option<&ServiceView>, reason: Reason, words: String) -> Self {
        Self {
            service: name.to_owned(),
            uid: view.and_then(ServiceView::uid_text),
            reason,
            words,
        }
    }
}

/// Sends events in the background.
#[derive(Clone)]
pub struct Teller(mpsc::Sender<Notice>);

impl Teller {
    /// The sender, and what has to run for it.
    pub fn new(client: kube::Client, node: &str) -> (Self, impl Future<Output = ()> + use<>) {
        let (sender, mut waiting) = mpsc::channel::<Notice>(WAITING);
        let reporter = Reporter {
            controller: "xebec-agent".to_owned(),
            instance: Some(node.to_owned()),
        };
        let run = async move {
            let recorder = Recorder::new(client, reporter);
            while let Some(notice) = waiting.recv().await {
                send(&recorder, notice).await;
            }
        };
        (Self(sender), run)
    }

    /// Tells it, in the log as well.
    pub fn tell(&self, notice: Notice) {
        warn!(
            service = notice.service,
            reason = format!("{:?}", notice.reason),
            "{}",
            notice.words
        );
        // With that many waiting, one more tells nothing new; it is in the log.
        let _ = self.0.try_send(notice);
    }
}

async fn send(recorder: &Recorder, notice: Notice) {
    let Some((namespace, name)) = notice.service.split_once('/') else {
        return;
    };
    if name.contains(['.', ':', '/']) {
        // A host port's, which is no object.
        return;
    }
    let reference = ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Service".to_owned()),
        namespace: Some(namespace.to_owned()),
        name: Some(name.to_owned()),
        uid: notice.uid,
        ..ObjectReference::default()
    };
    let event = Event {
        type_: EventType::Warning,
        reason: format!("{:?}", notice.reason),
        // The API takes no longer ones.
        note: Some(notice.words.chars().take(1000).collect()),
        action: "SyncService".to_owned(),
        secondary: None,
    };
    if let Err(error) = recorder.publish(&event, &reference).await {
        debug!(%error, "an event could not be sent");
    }
}
