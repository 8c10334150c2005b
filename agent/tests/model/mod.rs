//! The programs against a model of their rules: long random sequences of packets and of changes of the tables, in
//! which both must agree on every verdict, every byte and every entry of a flow.
//!
//! `XEBEC_MODEL_SEED` makes the packets of a run again that failed (what the programs leave to chance is not its), and
//! `XEBEC_MODEL_PACKETS` makes a longer one.

mod rules;
mod traffic;
mod world;

use crate::packets::wires::{ip, namespace, routed};
use crate::packets::{Kernel, left_out};

/// How many packets go through a hook.
const PACKETS: u64 = 1_000_000;
/// After so many all maps are emptied.
const EPOCH: u64 = 20_000;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

#[test]
fn programs_and_model_agree() {
    if left_out() {
        return;
    }
    let seed = number("XEBEC_MODEL_SEED").unwrap_or_else(rand::random);
    eprintln!("XEBEC_MODEL_SEED={seed}");
    let wanted = number("XEBEC_MODEL_PACKETS").unwrap_or(PACKETS);
    namespace(|| {
        routed();
        ip("link set lo address 02:00:00:00:00:02");
        let devices = [0, 1, 2].map(|pod| {
            ip(&format!(
                "link add pod{pod} address 02:00:00:00:00:02 type veth"
            ));
            nix::net::if_::if_nametoindex(format!("pod{pod}").as_str()).unwrap()
        });
        let kernel = &mut *Kernel::shared();
        let (mut done, mut epochs, mut counts) = (0, 0, traffic::Counts::default());
        let start = std::time::Instant::now();
        while done < wanted {
            // Each begins with a seed of its own: one alone can be run again.
            let mut run = traffic::Run::new(kernel, devices, seed.wrapping_add(epochs));
            done += run.go(EPOCH.min(wanted - done), &mut counts);
            epochs += 1;
        }
        eprintln!("{done} packets in {:?}: {counts:?}", start.elapsed());
        assert!(wanted < PACKETS || counts.is_of_all_kinds(), "{counts:?}");
    });
}
