//! `xebec service`: Services as the agent has them: its frontends, their backends, and which one a client gets.

mod list;
mod rows;
mod trace;

use anyhow::Result;
use clap::Subcommand;

use crate::paths::Layout;

/// `service <what>`.
#[derive(Subcommand)]
pub enum Service {
    /// List frontends with their backends
    #[command(visible_alias = "ls")]
    List(list::List),
    /// Which backends a client may get, how one is chosen, and why
    Trace(trace::Trace),
}

impl Service {
    /// Asks the agents and prints.
    pub async fn run(self, layout: &Layout) -> Result<()> {
        match self {
            Self::List(list) => list.run(layout).await,
            Self::Trace(trace) => trace.run(layout).await,
        }
    }
}
