//! Network policy: what the API's objects say becomes sets of rules, which the kernel judges by.
//!
//! Objects are read into one form ([`rule`]), whichever API they come by. Pods that are alike to policies are of one
//! [`kind`] and have one identity. The [`engine`] knows which policies are for which kinds; all kinds with the same
//! policies share one set, whose entries ([`content`]) the kernel finds by exact lookups.

mod admin;
pub mod admin_network_policy;
pub mod blocks;
pub mod cilium;
pub mod cluster_network_policy;
pub mod content;
pub mod domains;
pub mod engine;
pub mod explain;
pub mod kernel;
pub mod kind;
pub mod names;
pub mod network_policy;
pub mod object;
pub mod places;
pub mod pod;
pub mod policies;
pub mod read;
pub mod rows;
pub mod rule;
pub mod selector;
pub mod selectors;
pub mod services;
pub mod sets;
