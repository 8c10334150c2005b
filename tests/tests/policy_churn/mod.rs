//! Policies that change all the while, and who asks meanwhile.

pub mod audit;
pub mod bad_input;
pub mod churn;
pub mod cuts;
pub mod prober;
pub mod world;
