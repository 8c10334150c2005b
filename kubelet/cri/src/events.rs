//! Tells subscribers (the kubelet) what happens to containers, as it happens.

use std::sync::Arc;

use tokio::sync::broadcast;
use xebec_cri_api::v1;

use crate::records::Sandbox;
use crate::runtime::Runtime;
use crate::status;

/// Events that a slow subscriber may lag behind before its stream is ended.
const BACKLOG: usize = 1024;

/// A sender that nobody listens to yet.
pub fn channel() -> broadcast::Sender<v1::ContainerEventResponse> {
    broadcast::Sender::new(BACKLOG)
}

impl Runtime {
    /// Publishes an event of a container, or of a sandbox under its own id.
    pub fn publish(&self, id: &str, sandbox: &Arc<Sandbox>, kind: v1::ContainerEventType) {
        if self.events.receiver_count() == 0 {
            return;
        }
        let event = v1::ContainerEventResponse {
            container_id: id.to_owned(),
            container_event_type: kind as i32,
            created_at: xebec_shim::log_file::now_nanos(),
            pod_sandbox_status: Some(status::sandbox(sandbox)),
            containers_statuses: self
                .registry
                .containers_of(&sandbox.id)
                .iter()
                .map(|c| status::container(c, sandbox))
                .collect(),
        };
        // An error means that the last subscriber has just gone.
        let _ = self.events.send(event);
    }
}
