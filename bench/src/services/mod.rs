//! Services beside their peers: traffic at each size, the time that changes take, and full syncs.

mod agent;
mod change;
mod control;
mod list;
mod matrix;
pub mod part;
mod stage;
mod sync;
mod traffic;
mod wire;

pub use change::{run as change, watch};
pub use list::{NODE_PORT, OUTSIDE, PORT, TARGET_PORT};
pub use part::{Network, PART, Part};
pub use stage::{NODE_IP, XebecStage, first_service};
pub use sync::run as sync;
pub use traffic::run as traffic;
