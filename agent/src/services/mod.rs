//! Services: what the API says of them and their endpoints becomes frontends and backends in the kernel.

mod addresses;
mod backends;
mod batch;
mod claims;
mod extents;
mod health;
mod maglev;
mod metrics;
mod names;
mod notices;
mod objects;
mod pages;
mod pool;
mod rows;
mod run;
mod select;
mod slots;
mod tables;
#[cfg(test)]
mod tests;
mod unit;
mod view;
mod wanted;

pub use addresses::NodePortAddresses;
pub(crate) use addresses::follow as follow_addresses;
pub use metrics::Metrics;
pub use names::ServiceNames;
pub use objects::{EndpointSlice, Service};
pub(crate) use run::run;
pub use run::{Left, Options, Services};
pub use tables::Tables;
