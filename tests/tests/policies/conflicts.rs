//! Two policies of which one allows what the other does not.

use super::Facts;
use super::case::{Case, Group, step};
use super::policy::{Policy, Rule, all, block, namespaces, pod, with};

/// What a policy allows.
#[derive(Clone, Copy)]
enum What {
    Nothing,
    All,
    AllPods,
    AllAddresses,
    NoPods,
    NoAddresses,
}

impl What {
    fn word(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::All => "all",
            Self::AllPods => "all pods",
            Self::AllAddresses => "all addresses",
            Self::NoPods => "pods that there are none of",
            Self::NoAddresses => "addresses that nobody has",
        }
    }

    fn is_about_addresses(self) -> bool {
        matches!(self, Self::AllAddresses | Self::NoAddresses)
    }

    fn rules(self, v4: bool) -> Vec<Rule> {
        let (any, nobody) = match v4 {
            true => ("0.0.0.0/0", "0.0.0.0/31"),
            false => ("::/0", "::/127"),
        };
        let peer = match self {
            Self::Nothing => return vec![],
            Self::All => return vec![Rule::any()],
            Self::AllPods => namespaces(all()),
            Self::AllAddresses => block(any, &[]),
            Self::NoPods => namespaces(with("this-is-nowhere", "to-be-found")),
            Self::NoAddresses => block(nobody, &[]),
        };
        vec![Rule::peers([peer])]
    }
}

/// What one policy says: whose pod it is for, whether of what comes in, and what it allows.
type Says = ((&'static str, &'static str), bool, What);

/// All of them.
pub fn cases(facts: &Facts) -> Vec<Case> {
    let (source, destination) = (("x", "b"), ("y", "c"));
    let mut all: Vec<Vec<Says>> = vec![
        vec![
            (source, false, What::Nothing),
            (destination, true, What::All),
        ],
        vec![
            (source, false, What::All),
            (destination, true, What::Nothing),
        ],
        vec![(source, false, What::Nothing), (source, false, What::All)],
        vec![
            (destination, true, What::Nothing),
            (destination, true, What::All),
        ],
    ];
    for ingress in [false, true] {
        for (one, other) in [
            (What::Nothing, What::AllPods),
            (What::Nothing, What::AllAddresses),
            (What::NoAddresses, What::AllPods),
            (What::NoPods, What::AllAddresses),
        ] {
            all.push(vec![(source, ingress, one), (source, ingress, other)]);
        }
        all.push(vec![(source, ingress, What::NoAddresses)]);
        all.push(vec![(source, ingress, What::NoPods)]);
    }
    all.iter().map(|said| case(said, facts.v4)).collect()
}

fn case(said: &[Says], v4: bool) -> Case {
    let mut words = Vec::new();
    let mut policies = Vec::new();
    for (at, ((namespace, name), ingress, what)) in said.iter().enumerate() {
        let policy = Policy::new(namespace, &format!("conflict-{at}"), pod(name));
        let rules = what.rules(v4);
        let (way, policy) = match ingress {
            true => ("into", policy.ingress(rules)),
            false => ("out of", policy.egress(rules)),
        };
        words.push(format!("{} {way} {namespace}/{name}", what.word()));
        policies.push(policy);
    }
    let case = Case::new(Group::Conflicts, words.join(", "), vec![step(policies)]);
    match said.iter().any(|(.., what)| what.is_about_addresses()) {
        true => case.of_family(v4),
        false => case,
    }
}
