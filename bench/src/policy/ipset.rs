//! The same policies as rules of iptables and sets of ipset, laid out as Calico's Felix does it (`iptables-save` on a
//! node of it): a set for each selector, which policies share; two chains for each policy; two for each pod, which the
//! connection's state is looked at in and which ask the pod's policies one after the other; and pods' chains found by the
//! name of the device, by its first digit and then whole. What a policy lets through bears a mark.
//!
//! Left out are what these policies have no use for: chains for the host, for profiles, and for failsafe ports.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::list::{self, Peer, Policy, Rule};

/// What a policy has let through.
const PASSED: &str = "0x10000/0x10000";

/// Which way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// What comes in to a pod.
    In,
    /// What goes out of it.
    Out,
}

impl Way {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::In, Self::Out];

    /// A policy's rules of this way, if it has a say in it.
    pub fn rules(self, policy: &Policy) -> Option<&[Rule]> {
        match self {
            Self::In => policy.ingress.as_deref(),
            Self::Out => policy.egress.as_deref(),
        }
    }

    /// The chain of a policy or a pod of this name.
    pub fn chain(self, of: &str, name: &str) -> String {
        match self {
            Self::In => format!("{of}i-{name}"),
            Self::Out => format!("{of}o-{name}"),
        }
    }
}

/// The pods of the node: the name of the device on the node, and the app. The first one is wired, and asks.
pub fn devices(pods: usize) -> Vec<(String, String)> {
    (0..pods)
        .map(|one| (format!("c{one}"), list::app(one)))
        .collect()
}

/// The policies, with the one that changes amid them.
pub fn with_moving(count: usize, open: bool) -> Vec<Policy> {
    let mut all = list::policies(0..count);
    all.insert(count / 2, list::moving(open));
    all
}

/// The set of a peer.
pub fn set(peer: &Peer) -> String {
    match peer {
        Peer::App(app) => format!("s-{app}"),
        Peer::Block { block, .. } => format!("b-{}", block.network()),
        Peer::Everybody => "everybody".to_owned(),
    }
}

/// What `ipset restore` reads: every set of these policies' peers.
pub fn sets(policies: &[Policy]) -> String {
    let mut text = String::new();
    for peer in peers(policies) {
        let name = set(peer);
        match peer {
            Peer::Block { block, except } => {
                let _ = writeln!(text, "create {name} hash:net family inet");
                let _ = writeln!(text, "add {name} {block}");
                let _ = writeln!(text, "add {name} {except} nomatch");
            }
            _ => {
                let _ = writeln!(text, "create {name} hash:ip family inet");
                for address in members(peer) {
                    let _ = writeln!(text, "add {name} {address}");
                }
            }
        }
    }
    text
}

/// The addresses of a peer's pods.
pub fn members(peer: &Peer) -> Vec<std::net::Ipv4Addr> {
    match peer {
        Peer::App(app) if app == list::SERVER => vec![crate::services::backend(2)],
        Peer::App(app) => {
            let number = app.trim_start_matches('a').parse();
            number.map(list::addresses).unwrap_or_default()
        }
        Peer::Everybody => (0..list::APPS).flat_map(list::addresses).collect(),
        Peer::Block { .. } => Vec::new(),
    }
}

/// All peers, each once.
pub fn peers(policies: &[Policy]) -> Vec<&Peer> {
    let mut seen = BTreeSet::new();
    policies
        .iter()
        .flat_map(|policy| Way::BOTH.map(|way| way.rules(policy)))
        .flatten()
        .flatten()
        .flat_map(|rule| &rule.peers)
        .filter(|peer| seen.insert(set(peer)))
        .collect()
}

/// The rules of a policy's chain.
fn rules_of(policy: &Policy, way: Way, text: &mut String) {
    let chain = way.chain("p", &policy.name);
    let end = if way == Way::In { "src" } else { "dst" };
    for rule in way.rules(policy).unwrap_or_default() {
        for peer in &rule.peers {
            for ports in &rule.ports {
                let protocol = if ports.udp { "udp" } else { "tcp" };
                let numbers: Vec<String> = ports.numbers.iter().map(u16::to_string).collect();
                let _ = writeln!(
                    text,
                    "-A {chain} -p {protocol} -m set --match-set {} {end} -m multiport --dports {} -j MARK --set-xmark {PASSED}",
                    set(peer),
                    numbers.join(",")
                );
                let _ = writeln!(text, "-A {chain} -m mark --mark {PASSED} -j RETURN");
            }
        }
    }
}

/// What `iptables-restore` reads for a node with these pods.
pub fn rules(policies: &[Policy], devices: &[(String, String)]) -> String {
    let mut heads = String::from("*filter\n:FORWARD ACCEPT [0:0]\n");
    let mut text = String::new();
    let head = |heads: &mut String, chain: &str| {
        let _ = writeln!(heads, ":{chain} - [0:0]");
    };
    for policy in policies {
        for way in Way::BOTH {
            if way.rules(policy).is_some() {
                head(&mut heads, &way.chain("p", &policy.name));
                rules_of(policy, way, &mut text);
            }
        }
    }
    for (device, app) in devices {
        for way in Way::BOTH {
            let chain = way.chain("w", device);
            head(&mut heads, &chain);
            for line in [
                "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
                "-m conntrack --ctstate INVALID -j DROP",
                "-j MARK --set-xmark 0x0/0x10000",
            ] {
                let _ = writeln!(text, "-A {chain} {line}");
            }
            for policy in policies {
                if policy.app.as_ref().is_some_and(|of| of != app) || way.rules(policy).is_none() {
                    continue;
                }
                let _ = writeln!(text, "-A {chain} -j {}", way.chain("p", &policy.name));
                let _ = writeln!(text, "-A {chain} -m mark --mark {PASSED} -j RETURN");
            }
            let _ = writeln!(text, "-A {chain} -j DROP");
        }
    }
    for way in Way::BOTH {
        let (flag, root) = match way {
            Way::In => ("-o", "to-pods"),
            Way::Out => ("-i", "from-pods"),
        };
        head(&mut heads, root);
        for digit in 1..=9 {
            // Their names' first digit, and then themselves.
            let prefix = format!("c{digit}");
            let all = || {
                devices
                    .iter()
                    .filter(|(device, _)| device.starts_with(&prefix))
            };
            if all().next().is_none() {
                continue;
            }
            let branch = format!("{root}-{digit}");
            head(&mut heads, &branch);
            let _ = writeln!(text, "-A {root} {flag} {prefix}+ -g {branch}");
            for (device, _) in all() {
                let _ = writeln!(
                    text,
                    "-A {branch} {flag} {device} -g {}",
                    way.chain("w", device)
                );
            }
            let _ = writeln!(text, "-A {branch} -j DROP");
        }
        let _ = writeln!(text, "-A {root} {flag} c0 -g {}", way.chain("w", "c0"));
        let _ = writeln!(text, "-A {root} -j DROP");
    }
    for line in [
        "-i c+ -j from-pods",
        "-o c+ -j to-pods",
        &format!("-m mark --mark {PASSED} -j ACCEPT"),
    ] {
        let _ = writeln!(text, "-A FORWARD {line}");
    }
    format!("{heads}{text}COMMIT\n")
}

/// What `iptables-restore --noflush` reads when the policy that changes has changed: its chain, written anew.
pub fn change(open: bool) -> String {
    let policy = list::moving(open);
    let mut text = format!("*filter\n:{} - [0:0]\n", Way::Out.chain("p", &policy.name));
    rules_of(&policy, Way::Out, &mut text);
    text + "COMMIT\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The words behind each one of these.
    fn behind<'a>(text: &'a str, words: &[&str]) -> BTreeSet<&'a str> {
        let all: Vec<&str> = text.split_whitespace().collect();
        let pairs = all.windows(2).filter(|pair| words.contains(&pair[0]));
        pairs.map(|pair| pair[1]).collect()
    }

    #[test]
    fn what_is_jumped_to_and_looked_into_is_there() {
        let policies = with_moving(250, true);
        let (rules, sets) = (rules(&policies, &devices(100)), sets(&policies));
        let chains: BTreeSet<&str> = rules
            .lines()
            .filter_map(|line| line.strip_prefix(':')?.split(' ').next())
            .collect();
        assert!(chains.iter().all(|chain| chain.len() <= 28));
        for target in behind(&rules, &["-j", "-g", "-A"]) {
            let own = ["ACCEPT", "DROP", "RETURN", "MARK"].contains(&target);
            assert!(own || chains.contains(target), "{target}");
        }
        let made = behind(&sets, &["create"]);
        assert_eq!(made, behind(&rules, &["--match-set"]));
        assert!(made.iter().all(|name| name.len() <= 31));
        // Each pod's chain ends what no policy lets through, and each is found by its device.
        for (device, app) in devices(100) {
            let chain = Way::Out.chain("w", &device);
            assert!(rules.contains(&format!("-A {chain} -j DROP")));
            assert!(rules.contains(&format!("-i {device} -g {chain}\n")));
            let own = policies
                .iter()
                .filter(|one| one.app.as_ref() == Some(&app))
                .count();
            let asked = rules.matches(&format!("-A {chain} -j po-")).count();
            assert_eq!(asked, own);
        }
        // 250 policies of two rules with two peers, one in five with three in one of them.
        let judging = rules.matches("--match-set").count();
        assert_eq!(judging, 250 * 4 + 50 + 2);
    }

    #[test]
    fn a_change_is_of_one_chain_and_nothing_else() {
        let policies = |open| rules(&with_moving(100, open), &devices(3));
        let (open, closed) = (policies(true), policies(false));
        let others: Vec<(&str, &str)> = open
            .lines()
            .zip(closed.lines())
            .filter(|(one, other)| one != other)
            .collect();
        assert_eq!(others.len(), 1);
        assert!(others[0].0.contains("po-moving") && others[0].0.contains("--dports 8080 "));
        assert!(change(true).contains(others[0].0) && change(false).contains(others[0].1));
        assert_eq!(change(true).matches("\n:").count(), 1);
        // It stands amid the others, not at either end.
        let place = with_moving(100, true)
            .iter()
            .position(|one| one.name == list::MOVING);
        assert_eq!(place, Some(50));
    }
}
