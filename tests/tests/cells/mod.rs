//! The scenarios of `root_cells`, and the cluster that they share.

pub mod addresses;
pub mod alone;
pub mod bad_input;
pub mod endpoints;
pub mod express;
pub mod faults;
pub mod frontends;
pub mod kept;
pub mod left_alone;
pub mod life;
pub mod local;
pub mod machine;
pub mod near;
pub mod odd;
pub mod policies;
pub mod routes;
pub mod sctp;
pub mod told;
pub mod too_big;
pub mod ways;
pub mod weights;
pub mod world;
