//! The Container Runtime Interface v1: messages, and gRPC clients and servers.
//!
//! Field meanings: `api.proto` of `k8s.io/cri-api` v0.36. The code is generated
//! and committed (see docs/adr), so that no build needs a protobuf compiler.

/// CRI v1 (`runtime.v1`), as `api.proto` defines it.
#[allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    reason = "generated; the meaning of each item is in api.proto"
)]
#[rustfmt::skip]
pub mod v1;
