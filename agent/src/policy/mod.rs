//! NetworkPolicy: what the API says becomes sets of rules, which the kernel judges by.

pub mod compile;
pub mod engine;
#[cfg(test)]
mod naive;
pub mod selector;
pub mod watch;
