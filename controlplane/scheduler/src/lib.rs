//! The scheduler: queue, cache, framework and plugins.
//!
//! An ordinary API client: it watches Nodes and Pods, decides in memory on a cache that it keeps
//! in step with the watch, and binds through `pods/binding`. The extension points are those of
//! the Kubernetes scheduling framework (KEP-624), and plugins carry upstream's names.

mod cache;
mod events;
pub mod framework;
pub mod plugins;
mod queue;
mod scheduler;
pub mod view;

pub use scheduler::{Config, run};
