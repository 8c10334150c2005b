//! The scenarios of `root_cells`, and the cluster that they share.

pub mod addresses;
pub mod bad_input;
pub mod endpoints;
pub mod express;
pub mod faults;
pub mod frontends;
pub mod kept;
pub mod life;
pub mod odd;
pub mod policies;
pub mod sctp;
pub mod told;
pub mod ways;
pub mod world;
