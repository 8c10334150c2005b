//! The kubelet: drives the pods of one node through CRI and reports their status.
//!
//! It knows the runtime by CRI v1 alone and the cluster by the public API alone, so either may be a stock one.
//! Each pod has a worker task that is woken by what changed: the Pod object, a container (told by CRI events),
//! a probe, or a timer of its own. Nothing is polled.

mod backoff;
mod config;
mod container;
mod env;
mod events;
mod last_words;
mod logs;
mod node;
mod pods;
mod pressure;
mod probes;
mod pull_secrets;
mod runtime;
mod server;
mod status;
mod subpath;
mod tokens;
mod volumes;
mod worker;

pub use config::{Config, run};
