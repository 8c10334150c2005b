//! Services beside their peers: traffic at each size, the time that changes take, and full syncs.

mod agent;
mod change;
mod control;
mod list;
mod matrix;
mod part;
mod stage;
mod sync;
mod traffic;
mod wire;

pub use change::run as change;
pub use part::{PART, main as part};
pub use sync::run as sync;
pub use traffic::run as traffic;
