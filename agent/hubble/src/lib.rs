//! Hubble's API: its messages, their JSON, clients and servers, what filters and field masks mean, and the order of what
//! several nodes tell.
//!
//! The meaning of fields: `proto/`, written for the wire format of Hubble 1.19. It knows nothing of where flows come
//! from; the agent serves them, and the command line reads them.

pub mod client;
pub mod event;
pub mod filter;
pub mod mask;
pub mod order;
pub mod serve;
pub mod tls;
pub mod wkt;

/// The packages of `proto/`, as `codegen/` writes them.
#[allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    reason = "generated; the meaning of each item is in proto/"
)]
#[rustfmt::skip]
pub mod pb {
    pub(crate) mod fields;
    /// A flow, and filters.
    pub mod flow;
    /// How flows are asked for.
    pub mod observer;
    /// Who else serves them.
    pub mod peer;
    /// How nodes behind one endpoint fare.
    pub mod relay;
}
pub use pb::{flow, observer, peer, relay};

/// The cluster of names that name none (Cilium's `cluster-name`).
pub const DEFAULT_CLUSTER: &str = "default";
