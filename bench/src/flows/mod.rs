//! Flows: what it costs to observe them, and how many of their events are read.

pub mod cost;
pub mod read;
