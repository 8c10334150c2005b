//! Flags that say which way packets take: of clients outside to backends of other nodes, and of pods.

use clap::{Args, ValueEnum};

/// Common to `up` and `agent`.
#[derive(Args, Clone, Debug)]
pub struct Ways {
    /// How clients outside reach backends of other nodes by node ports, load balancers' and external addresses. All
    /// nodes need the same
    #[arg(long, alias = "bpf-lb-mode", value_enum, default_value_t)]
    lb_mode: LbMode,
    /// Pods' packets to and from other nodes and the outside go through the node's stack, where its own rules (iptables,
    /// nftables, IPsec policies) see them. By default they go around it
    #[arg(long, alias = "enable-host-legacy-routing")]
    pub host_legacy_routing: bool,
}

impl Ways {
    /// How flows from outside reach backends of other nodes.
    pub fn lb_mode(&self) -> xebec_agent::network::LbMode {
        self.lb_mode.into()
    }
}

/// How flows from outside reach backends of other nodes.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum LbMode {
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

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};
    use xebec_agent::network::LbMode;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        ways: Ways,
    }

    fn ways(args: &[&str]) -> Result<(LbMode, bool), clap::Error> {
        let ways = Cli::try_parse_from([&["xebec"], args].concat())?.ways;
        Ok((ways.lb_mode(), ways.host_legacy_routing))
    }

    #[test]
    fn ways_by_name() {
        assert_eq!(ways(&[]).unwrap(), (LbMode::Snat, false));
        for (name, mode) in [
            ("snat", LbMode::Snat),
            ("dsr", LbMode::Dsr),
            ("hybrid", LbMode::Hybrid),
        ] {
            assert_eq!(ways(&["--lb-mode", name]).unwrap(), (mode, false));
        }
        // Cilium's names.
        assert_eq!(
            ways(&["--bpf-lb-mode=dsr", "--enable-host-legacy-routing"]).unwrap(),
            (LbMode::Dsr, true)
        );
        for wrong in [
            "--lb-mode=geneve",
            "--lb-mode=DSR",
            "--lb-mode=",
            "--host-legacy-routing=1",
        ] {
            assert!(ways(&[wrong]).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_help_of_up_and_agent_tells_of_them() {
        let mut all = crate::Cli::command();
        for name in ["up", "agent"] {
            let command = all.find_subcommand_mut(name).unwrap();
            let help = command.render_long_help().to_string();
            for words in [
                "--lb-mode <LB_MODE>",
                "- snat: ",
                "- dsr: ",
                "- hybrid: ",
                "[default: snat]",
                "--host-legacy-routing\n",
                "By default they go around it",
            ] {
                assert!(help.contains(words), "{name} tells no {words:?}: {help}");
            }
        }
    }
}
