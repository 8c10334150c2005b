//! The scenarios of `root_cells`, and the cluster that they share.

pub mod frontends;
pub mod world;
