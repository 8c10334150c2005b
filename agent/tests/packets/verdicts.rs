//! Verdicts of the sets of a chain; and those that are remembered: asked twice, the same is said, and nothing of it once
//! anything changes.

use std::net::IpAddr;

use bytemuck::Zeroable;
use xebec_dataplane_common::flow::{AUDITED, DROPPED, FORWARDED};
use xebec_dataplane_common::policy::{
    ALLOW, Chains, DENY, Decision, NO_SHAPE, RuleKey, SET_ALLOWS, SET_DENIES, SET_FIRST,
    SHAPE_CLASS, SHAPE_IDENTITY, SHAPE_PROTOCOL, SHAPES, Set,
};
use xebec_policy::kernel::PolicyKernel;

use super::{FAMILIES, Family, Kernel, client, left_out, pod, tcp};

const SET: u32 = 21;
const FRIEND: u32 = 5_001;
const OTHER: u32 = 5_002;
const BY_IDENTITY: u8 = SHAPE_IDENTITY | SHAPE_PROTOCOL | 16;
const BY_CLASS: u8 = SHAPE_CLASS | SHAPE_PROTOCOL | 16;

/// A pod that asks a client of one family again and again, each time as a new flow.
struct Asking<'a> {
    kernel: &'a mut Kernel,
    family: Family,
    port: u16,
}

impl Asking<'_> {
    /// What becomes of a flow, twice alike: verdict, set and rule.
    fn told(&mut self) -> (u8, u32, u32) {
        let mut told = [0; 2].map(|_| {
            while self.kernel.event().is_some() {}
            self.port += 1;
            let packet = tcp(pod(self.family), client(self.family), self.port, 80, "S");
            self.kernel.run("xebec_from_pod", &packet.bytes());
            let event = self.kernel.event().unwrap();
            (event.verdict, event.set, event.rule)
        });
        assert_eq!(told[0], told[1], "asked again");
        std::mem::take(&mut told[0])
    }

    fn assert(&mut self, verdict: u8, rule: u32) {
        assert_eq!(self.told(), (verdict, SET, rule), "{}", client(self.family));
    }

    fn peer(&self) -> IpAddr {
        client(self.family)
    }
}

fn entry(shape: u8, peer: u32, rule: u32) -> (RuleKey, Decision) {
    let key = RuleKey {
        set: SET,
        peer,
        port: 80_u16.to_be(),
        protocol: 6,
        shape,
    };
    let verdict = ALLOW;
    (key, Decision { verdict, rule })
}

fn set(shapes: &[u8]) -> Set {
    let mut all = [NO_SHAPE; SHAPES];
    all[..shapes.len()].copy_from_slice(shapes);
    Set {
        shapes: all,
        flags: SET_DENIES,
    }
}

#[test]
fn nothing_is_remembered_over_a_change() {
    if left_out() {
        return;
    }
    for family in FAMILIES {
        let mut kernel = Kernel::shared();
        let endpoint = kernel.policy().endpoint(pod(family)).unwrap().unwrap();
        let mut under = endpoint;
        under.chains = Chains {
            egress: [0, SET, 0, 0],
            ..Chains::zeroed()
        };
        let mut asking = Asking {
            kernel: &mut kernel,
            family,
            port: 2_000,
        };
        let peer = asking.peer();
        assert_eq!(asking.told(), (FORWARDED, 0, 0), "under no rules");

        let policy = asking.kernel.policy();
        policy.set_set(SET, set(&[BY_IDENTITY])).unwrap();
        policy.set_endpoint(pod(family), under).unwrap();
        asking.assert(DROPPED, 0);
        // Who somebody is.
        let (key, decision) = entry(BY_IDENTITY, FRIEND, 1);
        asking
            .kernel
            .policy()
            .set_rules(&[(key, decision)])
            .unwrap();
        asking.assert(DROPPED, 0);
        asking.kernel.policy().set_identity(peer, FRIEND).unwrap();
        asking.assert(FORWARDED, 1);
        asking.kernel.policy().set_identity(peer, OTHER).unwrap();
        asking.assert(DROPPED, 0);
        asking.kernel.policy().set_identity(peer, FRIEND).unwrap();
        asking.assert(FORWARDED, 1);
        // What a set has.
        asking.kernel.policy().remove_rules(&[key]).unwrap();
        asking.assert(DROPPED, 0);
        let other = entry(BY_IDENTITY, FRIEND, 2);
        asking.kernel.policy().set_rules(&[other]).unwrap();
        asking.assert(FORWARDED, 2);
        asking.kernel.policy().remove_identity(peer).unwrap();
        asking.assert(DROPPED, 0);
        // What its blocks make of an address.
        asking
            .kernel
            .policy()
            .set_rules(&[entry(BY_CLASS, 7, 3)])
            .unwrap();
        asking
            .kernel
            .policy()
            .set_block(SET, peer.into(), 7)
            .unwrap();
        asking.assert(DROPPED, 0);
        let both = set(&[BY_CLASS, BY_IDENTITY]);
        asking.kernel.policy().set_set(SET, both).unwrap();
        asking.assert(FORWARDED, 3);
        asking
            .kernel
            .policy()
            .remove_block(SET, peer.into())
            .unwrap();
        asking.assert(DROPPED, 0);
        // The set itself.
        let open = Set { flags: 0, ..both };
        asking.kernel.policy().set_set(SET, open).unwrap();
        assert_eq!(asking.told(), (FORWARDED, 0, 0), "nothing is said of it");
        asking.kernel.policy().set_set(SET, both).unwrap();
        asking.assert(DROPPED, 0);
        // What would be dropped is told as often.
        under.chains = Chains {
            egress_audit: [0, SET, 0, 0],
            ..Chains::zeroed()
        };
        asking
            .kernel
            .policy()
            .set_endpoint(pod(family), under)
            .unwrap();
        asking.assert(AUDITED, 0);
        asking.kernel.policy().remove_set(SET).unwrap();
        asking
            .kernel
            .policy()
            .set_endpoint(pod(family), endpoint)
            .unwrap();
        assert_eq!(asking.told(), (FORWARDED, 0, 0), "under no rules again");
    }
}

/// What a set has for the question: nothing, or a rule that allows or denies.
#[derive(Clone, Copy, Debug)]
enum Has {
    /// No entry, and what none decides is denied or left.
    Nothing {
        denies: bool,
    },
    Allows,
    Denies,
}

const NOTHING: Has = Has::Nothing { denies: false };
const ISOLATES: Has = Has::Nothing { denies: true };

/// Writes a set whose rule has its number.
fn write(kernel: &mut Kernel, number: u32, has: Has) {
    let shape = SHAPE_PROTOCOL | 16;
    // Of NetworkPolicies, a rule that denies is stronger than one that allows.
    let (verdict, flags) = match has {
        Has::Nothing { denies } => (None, if denies { SET_DENIES } else { 0 }),
        Has::Allows => (Some(4 | ALLOW), SET_DENIES | SET_FIRST | SET_ALLOWS),
        Has::Denies => (Some(DENY), SET_FIRST),
    };
    let mut key = entry(shape, 0, 0).0;
    key.set = number;
    kernel.policy().remove_rules(&[key]).unwrap();
    if let Some(verdict) = verdict {
        let decision = Decision {
            verdict,
            rule: number,
        };
        kernel.policy().set_rules(&[(key, decision)]).unwrap();
    }
    let all = match verdict {
        Some(_) => set(&[shape]),
        None => set(&[]),
    };
    kernel
        .policy()
        .set_set(number, Set { flags, ..all })
        .unwrap();
}

#[test]
fn two_sets_of_a_tier_decide_together() {
    if left_out() {
        return;
    }
    let (wide, narrow, last) = (31, 32, 33);
    let mut kernel = Kernel::shared();
    let endpoint = kernel.policy().endpoint(pod(FAMILIES[0])).unwrap().unwrap();
    let mut asking = Asking {
        kernel: &mut kernel,
        family: FAMILIES[0],
        port: 2_000,
    };
    for (first, second, behind, told) in [
        (Has::Allows, ISOLATES, ISOLATES, (FORWARDED, wide, wide)),
        (ISOLATES, Has::Allows, ISOLATES, (FORWARDED, narrow, narrow)),
        (
            Has::Allows,
            Has::Allows,
            Has::Denies,
            (FORWARDED, wide, wide),
        ),
        (Has::Allows, Has::Denies, NOTHING, (DROPPED, narrow, narrow)),
        (Has::Denies, Has::Allows, Has::Allows, (DROPPED, wide, wide)),
        (Has::Denies, Has::Denies, Has::Allows, (DROPPED, wide, wide)),
        (ISOLATES, NOTHING, Has::Allows, (DROPPED, wide, 0)),
        (NOTHING, ISOLATES, Has::Allows, (DROPPED, narrow, 0)),
        (
            NOTHING,
            Has::Allows,
            Has::Denies,
            (FORWARDED, narrow, narrow),
        ),
        (NOTHING, NOTHING, Has::Denies, (DROPPED, last, last)),
        (NOTHING, NOTHING, Has::Allows, (FORWARDED, last, last)),
        (NOTHING, NOTHING, ISOLATES, (DROPPED, last, 0)),
        (NOTHING, NOTHING, NOTHING, (FORWARDED, 0, 0)),
    ] {
        for (number, has) in [(wide, first), (narrow, second), (last, behind)] {
            write(asking.kernel, number, has);
        }
        let mut under = endpoint;
        under.chains = Chains {
            egress: [0, wide, narrow, last],
            ..Chains::zeroed()
        };
        let policy = asking.kernel.policy();
        policy.set_endpoint(pod(FAMILIES[0]), under).unwrap();
        assert_eq!(asking.told(), told, "{first:?}, {second:?}, {behind:?}");
        // Where a set says nothing, it is as if it were not there.
        if matches!(first, Has::Nothing { denies: false }) {
            under.chains.egress[1] = 0;
            let policy = asking.kernel.policy();
            policy.set_endpoint(pod(FAMILIES[0]), under).unwrap();
            assert_eq!(
                asking.told(),
                told,
                "without the first: {second:?}, {behind:?}"
            );
        }
    }
    asking
        .kernel
        .policy()
        .set_endpoint(pod(FAMILIES[0]), endpoint)
        .unwrap();
    for number in [wide, narrow, last] {
        write(asking.kernel, number, NOTHING);
        asking.kernel.policy().remove_set(number).unwrap();
    }
}
