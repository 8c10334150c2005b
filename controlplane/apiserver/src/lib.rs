//! The Kubernetes API server: HTTP, authentication, authorization, admission, storage, watch.
//!
//! Every built-in resource goes through one generic registry over the type table of `xebec-schema`; what a
//! kind has of its own (pods' grace period, Services' addresses, bindings) is in `admission`, `services` and
//! `special`.

mod admission;
mod authn;
mod authz;
mod bootstrap;
mod discovery;
mod documents;
mod encode;
mod error;
mod eviction;
mod handler;
mod kubelet_proxy;
mod metrics;
mod registry;
mod request;
mod server;
mod services;
mod special;
mod tokens;
mod verbs;
mod watch;

pub use authn::UserInfo;
pub use error::ApiError;
pub use server::{ApiServer, Config, InProcess, ResponseBody, StartError};
