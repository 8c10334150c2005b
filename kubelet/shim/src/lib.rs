//! The small per-pod supervisor that owns containers, their logs and exit codes.
//!
//! One process per pod sandbox: single-threaded, one `poll` loop, no async
//! runtime. It keeps the pod's IPC and UTS namespaces by living in them, adopts
//! its containers' processes as a subreaper, and outlives the CRI server.

mod container;
mod errors;
mod helper;
pub mod log_file;
pub mod protocol;
mod runtime;
mod sandbox;
mod server;
mod stdio;

pub use sandbox::main;
