//! Kubernetes Events: what users are told of objects.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::mpsc;
use tracing::{debug, warn};

/// Events that may wait to be sent; a hostile API server can cause any number.
const WAITING: usize = 256;
/// The API takes no longer words.
const LONGEST: usize = 1_000;

/// What a user is told of an object.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Notice {
    /// The object.
    pub about: ObjectReference,
    /// Why, in one word.
    pub reason: String,
    /// What was being done.
    pub action: &'static str,
    /// What there is to say.
    pub words: String,
}

/// Sends them in the background.
#[derive(Clone)]
pub(crate) struct Teller(mpsc::Sender<Notice>);

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
                let event = Event {
                    type_: EventType::Warning,
                    reason: notice.reason,
                    note: Some(notice.words.chars().take(LONGEST).collect()),
                    action: notice.action.to_owned(),
                    secondary: None,
                };
                if let Err(error) = recorder.publish(&event, &notice.about).await {
                    debug!(%error, "an event could not be sent");
                }
            }
        };
        (Self(sender), run)
    }

    /// Tells it, in the log as well.
    pub fn tell(&self, notice: Notice) {
        warn!(
            kind = notice.about.kind,
            namespace = notice.about.namespace,
            name = notice.about.name,
            reason = notice.reason,
            "{}",
            notice.words
        );
        // With that many waiting, one more tells nothing new; it is in the log.
        let _ = self.0.try_send(notice);
    }
}
