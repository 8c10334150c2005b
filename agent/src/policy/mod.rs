//! Network policy: keeps what the kernel judges by in step with the API.

mod conditions;
mod custom;
mod known;
mod listing;
mod notices;
pub mod watch;
