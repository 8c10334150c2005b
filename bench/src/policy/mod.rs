//! Network policy: the time of changes, what a verdict costs, what rules take of the kernel's memory, and other engines'
//! rules for the same policies.

mod change;
pub mod fill;
mod ipset;
pub mod judge;
mod list;
mod memory;
mod nft;
mod node;
mod peers;
pub mod pods;
mod rig;
mod traffic;
mod verdict;

pub use change::run as change;
pub use memory::run as memory;
pub use peers::run as peers;
pub use verdict::run as verdict;
