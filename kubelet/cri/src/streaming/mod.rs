//! Exec, attach and port-forward: the HTTP server behind the URLs that CRI hands out.
//!
//! [`tokens`] keeps what was asked for under a single-use token; [`server`]
//! takes a token's connection and upgrades it; [`websocket`] and [`spdy`] are the
//! two protocols that clients speak; [`process`] joins a client with a process.

mod dial;
mod process;
pub(crate) mod server;
pub mod spdy;
mod status;
pub(crate) mod tokens;
mod websocket;
