//! Services beside their peers: traffic at each size, the time that changes take, and full syncs. Policy's benchmarks
//! are on the same stage.

pub mod agent;
mod change;
pub mod control;
mod list;
mod matrix;
pub mod part;
pub mod stage;
mod sync;
mod tables;
mod traffic;
pub mod wire;

pub use change::{run as change, watch};
pub use list::{
    MANY, NAMESPACE, NODE_PORT, OUTSIDE, OUTSIDE6, PORT, TARGET_PORT, backend, backend6,
};
pub use part::{Network, PART, Part};
pub use stage::{NODE_IP, NODE_IP6, XebecStage, first_service};
pub use sync::run as sync;
pub use tables::run as tables;
pub use traffic::run as traffic;
