//! The flag that says how clients outside reach backends of other nodes.

use clap::ValueEnum;

/// How flows from outside reach backends of other nodes.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum LbMode {
    /// Masqueraded: backends see the node that was asked, and answers come back through it
    #[default]
    Snat,
    /// Backends see the client, and their nodes answer it directly; between nodes such packets are in Geneve (UDP 6081)
    Dsr,
    /// `dsr` for TCP and SCTP, `snat` for UDP
    Hybrid,
}

impl From<LbMode> for xebec_agent::network::LbMode {
    fn from(mode: LbMode) -> Self {
        match mode {
            LbMode::Snat => Self::Snat,
            LbMode::Dsr => Self::Dsr,
            LbMode::Hybrid => Self::Hybrid,
        }
    }
}
