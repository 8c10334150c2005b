//! What users are told of Services by Kubernetes Events.

use k8s_openapi::api::core::v1::ObjectReference;
use tracing::warn;

use super::view::ServiceView;
use crate::events::{self, Teller};

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

impl Notice {
    /// Tells it; of a host port, which is no object, in the log alone.
    pub(crate) fn tell(self, teller: &Teller) {
        let object = self.service.split_once('/');
        let Some((namespace, name)) = object.filter(|(_, name)| !name.contains(['.', ':', '/']))
        else {
            warn!(service = self.service, reason = ?self.reason, "{}", self.words);
            return;
        };
        teller.tell(events::Notice {
            about: ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Service".to_owned()),
                namespace: Some(namespace.to_owned()),
                name: Some(name.to_owned()),
                uid: self.uid,
                ..ObjectReference::default()
            },
            reason: format!("{:?}", self.reason),
            action: "SyncService",
            words: self.words,
        });
    }
}
