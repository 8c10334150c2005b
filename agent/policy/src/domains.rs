//! Domain names: what rules say of them, and the addresses that resolvers gave them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use hashbrown::HashMap;

/// Names at most.
const NAMES: usize = 16_384;
/// Addresses of a name at most, as Cilium's `--tofqdns-endpoint-max-ip-per-hostname` has it by default.
const ADDRESSES: usize = 1_000;

/// What names a rule means, in lower case and without the dot at the end: `*` stands for letters, digits, `-` and `_`, a
/// first `**` for one or more whole labels. Alone, `*` means all.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pattern(Box<str>);

/// A name as it is compared: in lower case, without the dot at the end.
pub fn plain(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

fn is_plain(one: char) -> bool {
    one.is_ascii_alphanumeric() || one == '-' || one == '_'
}

fn checked(text: &str, more: &[char]) -> Result<String, String> {
    let text = plain(text);
    let fits = |one: char| is_plain(one) || more.contains(&one);
    let right = |label: &str| !label.is_empty() && label.chars().all(fits);
    if text.len() > 255 || !text.split('.').all(right) {
        return Err(format!(
            "{text:?} is no name of a domain; write one like example.com"
        ));
    }
    Ok(text)
}

impl Pattern {
    /// One name (`matchName`).
    pub fn name(text: &str) -> Result<Self, String> {
        checked(text, &[]).map(|name| Self(name.into()))
    }

    /// A pattern of Cilium's (`matchPattern`).
    pub fn wildcard(text: &str) -> Result<Self, String> {
        let text = checked(text, &['*'])?;
        Ok(Self(text.into()))
    }

    /// A name of the network policy API (`domainNames`), whose first label may be `*`: one or more labels.
    pub fn domain(text: &str) -> Result<Self, String> {
        match text.strip_prefix("*.") {
            Some(rest) => checked(rest, &[]).map(|name| Self(format!("**.{name}").into())),
            None => Self::name(text),
        }
    }

    /// Whether it means a name, which must be [`plain`].
    pub fn matches(&self, name: &str) -> bool {
        let pattern = &*self.0;
        if pattern == "*" {
            return true;
        }
        let Some(rest) = pattern.strip_prefix("**.") else {
            return like(pattern.as_bytes(), name.as_bytes());
        };
        let dots = name.match_indices('.');
        let mut ends = dots.filter(|(at, _)| *at > 0);
        ends.any(|(at, _)| like(rest.as_bytes(), &name.as_bytes()[at + 1..]))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

/// Whether a name is what a pattern says, in which `*` stands for any part of a label.
fn like(pattern: &[u8], name: &[u8]) -> bool {
    let (mut at, mut place) = (0, 0);
    // Where the last `*` stood, and what it stands for so far.
    let mut star: Option<(usize, usize)> = None;
    loop {
        match (pattern.get(at), name.get(place)) {
            (Some(b'*'), _) => {
                star = Some((at, place));
                at += 1;
            }
            (Some(wanted), Some(found)) if wanted == found => {
                at += 1;
                place += 1;
            }
            (None, None) => return true,
            _ => match star {
                // A label's end is nothing that it may stand for.
                Some((stood, until)) if name.get(until).is_some_and(|one| *one != b'.') => {
                    star = Some((stood, until + 1));
                    at = stood + 1;
                    place = until + 1;
                }
                _ => return false,
            },
        }
    }
}

/// An address that a name has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Told {
    /// The address.
    pub address: IpAddr,
    /// Until when, in seconds since 1970.
    pub until: u64,
}

/// Names and their addresses.
#[derive(Debug, Default)]
pub struct Domains {
    by_name: BTreeMap<Arc<str>, BTreeMap<IpAddr, u64>>,
    by_address: HashMap<IpAddr, BTreeSet<Arc<str>>>,
}

impl Domains {
    /// Takes what a name was told to be; the addresses that names lost for it. Names and addresses of names are bounded:
    /// names that are not `wanted` are not taken any more and go first, then those that end first.
    pub fn learn(
        &mut self,
        name: &str,
        told: &[Told],
        wanted: impl Fn(&str) -> bool,
    ) -> BTreeSet<IpAddr> {
        let mut lost = BTreeSet::new();
        if self.by_name.len() >= NAMES && !self.by_name.contains_key(name) {
            // Who asks for many names must not have others' forgotten, nor have all looked through each time.
            if !wanted(name) {
                return lost;
            }
            let ends = |all: &BTreeMap<IpAddr, u64>| all.values().max().copied().unwrap_or(0);
            let all = self.by_name.iter();
            let first = all.min_by_key(|(name, all)| (wanted(name), ends(all)));
            if let Some(first) = first.map(|(name, _)| name.clone()) {
                lost.extend(self.forget(&first, |_, _| true));
            }
        }
        let name: Arc<str> = name.into();
        let all = self.by_name.entry(name.clone()).or_default();
        for one in told {
            let until = all.entry(one.address).or_default();
            *until = one.until.max(*until);
            self.by_address
                .entry(one.address)
                .or_default()
                .insert(name.clone());
        }
        if all.len() > ADDRESSES {
            let mut ends: Vec<Told> = listed(all).collect();
            ends.sort_by_key(|one| one.until);
            let gone: BTreeSet<IpAddr> = ends[..ends.len() - ADDRESSES]
                .iter()
                .map(|one| one.address)
                .collect();
            lost.extend(self.forget(&name, |address, _| gone.contains(&address)));
        }
        lost
    }

    /// Forgets addresses of a name.
    fn forget(&mut self, name: &str, gone: impl Fn(IpAddr, u64) -> bool) -> Vec<IpAddr> {
        let Some(all) = self.by_name.get_mut(name) else {
            return Vec::new();
        };
        let mut forgotten = Vec::new();
        all.retain(|address, until| {
            let stays = !gone(*address, *until);
            if !stays {
                forgotten.push(*address);
            }
            stays
        });
        if all.is_empty() {
            self.by_name.remove(name);
        }
        for address in &forgotten {
            if let Some(names) = self.by_address.get_mut(address) {
                names.remove(name);
                if names.is_empty() {
                    self.by_address.remove(address);
                }
            }
        }
        forgotten
    }

    /// Forgets what ended before `now` and is not used any more; the addresses that names lost.
    pub fn expire(&mut self, now: u64, used: impl Fn(IpAddr) -> bool) -> BTreeSet<IpAddr> {
        let over = |until: u64| until < now;
        let ended = self.by_name.iter();
        let ended = ended.filter(|(_, all)| all.values().any(|until| over(*until)));
        let names: Vec<Arc<str>> = ended.map(|(name, _)| name.clone()).collect();
        let lost =
            |name: Arc<str>| self.forget(&name, |address, until| over(until) && !used(address));
        names.into_iter().flat_map(lost).collect()
    }

    /// Whether something ended before `now`.
    pub fn has_ended(&self, now: u64) -> bool {
        let mut all = self.by_name.values().flatten();
        all.any(|(_, until)| *until < now)
    }

    /// The addresses of all names that a pattern means.
    pub fn of(&self, pattern: &Pattern) -> BTreeSet<IpAddr> {
        let names = self.by_name.iter();
        names
            .filter(|(name, _)| pattern.matches(name))
            .flat_map(|(_, all)| all.keys().copied())
            .collect()
    }

    /// Whether an address is one of a name that a pattern means.
    pub fn has(&self, pattern: &Pattern, address: IpAddr) -> bool {
        let names = self.by_address.get(&address);
        names.is_some_and(|names| names.iter().any(|name| pattern.matches(name)))
    }

    /// All names, with what they were told to be.
    pub fn all(&self) -> impl Iterator<Item = (&Arc<str>, Vec<Told>)> {
        let names = self.by_name.iter();
        names.map(|(name, all)| (name, listed(all).collect()))
    }

    /// The addresses of one name.
    pub fn addresses(&self, name: &str) -> Vec<IpAddr> {
        let all = self.by_name.get(name);
        all.into_iter()
            .flat_map(|all| all.keys().copied())
            .collect()
    }
}

fn listed(all: &BTreeMap<IpAddr, u64>) -> impl Iterator<Item = Told> {
    let all = all.iter();
    all.map(|(address, until)| Told {
        address: *address,
        until: *until,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(address: &str, until: u64) -> Told {
        Told {
            address: address.parse().unwrap(),
            until,
        }
    }

    #[test]
    fn patterns_mean_what_the_apis_say() {
        let cases = [
            ("*.cilium.io", "www.cilium.io", true),
            ("*.cilium.io", "cilium.io", false),
            ("*.cilium.io", "a.www.cilium.io", false),
            ("*cilium.io", "cilium.io", true),
            ("*cilium.io", "sub-cilium.io", true),
            ("*cilium.io", "www.cilium.io", false),
            ("sub*.cilium.io", "sub.cilium.io", true),
            ("sub*.cilium.io", "subdomain.cilium.io", true),
            ("sub*.cilium.io", "www.cilium.io", false),
            ("**.cilium.io", "test.app.cilium.io", true),
            ("**.cilium.io", "app.cilium.io", true),
            ("**.cilium.io", "cilium.io", false),
            ("**.*.io", "a.b.io", true),
            ("**.*.io", "b.io", false),
            ("*", "anything.at.all", true),
            ("a*b*c.x", "axbybc.x", true),
            ("a*b*c.x", "acb.x", false),
            ("a*b.x", "a.b.x", false),
            ("API.Example.com.", "api.example.com", true),
        ];
        for (pattern, name, meant) in cases {
            let read = Pattern::wildcard(pattern).unwrap();
            assert_eq!(read.matches(name), meant, "{pattern} {name}");
        }
        let domain = Pattern::domain("*.Kubernetes.io").unwrap();
        assert_eq!(domain, Pattern::wildcard("**.kubernetes.io").unwrap());
        assert!(domain.matches("latest.blog.kubernetes.io"));
        assert!(!domain.matches("kubernetes.io") && !domain.matches("notkubernetes.io"));
    }

    #[test]
    fn what_is_no_name_is_told() {
        for text in ["", ".", "a..b", "a b.c", "ex*mple.com", &"a".repeat(256)] {
            let error = Pattern::name(text).unwrap_err();
            assert!(error.contains("is no name of a domain"), "{error}");
        }
        assert!(Pattern::domain("*").is_err() && Pattern::domain("a.*.b").is_err());
        assert!(Pattern::wildcard("ex*mple.com").is_ok() && Pattern::name("a_b.c").is_ok());
    }

    #[test]
    fn addresses_stay_until_they_end_and_nobody_uses_them() {
        let mut domains = Domains::default();
        domains.learn(
            "a.example",
            &[told("192.0.2.1", 10), told("192.0.2.2", 20)],
            |_| true,
        );
        domains.learn("b.example", &[told("192.0.2.1", 30)], |_| true);
        // Sooner than before is not sooner.
        domains.learn("b.example", &[told("192.0.2.1", 5)], |_| true);
        let (a, all) = (
            Pattern::name("a.example").unwrap(),
            Pattern::wildcard("*").unwrap(),
        );
        assert!(!domains.has_ended(10) && domains.has_ended(11));
        let one = "192.0.2.1".parse().unwrap();
        assert_eq!(domains.expire(11, |address| address == one), [].into());
        assert!(domains.has(&a, one));
        assert_eq!(domains.expire(11, |_| false), [one].into());
        assert!(!domains.has(&a, one) && domains.has(&all, one));
        assert_eq!(domains.of(&all).len(), 2);
        assert_eq!(domains.expire(31, |_| false).len(), 2);
        assert_eq!(domains.all().count() + domains.by_address.len(), 0);
    }

    #[test]
    fn there_is_an_end_to_names_and_addresses() {
        let mut domains = Domains::default();
        let (wanted, one) = (|name: &str| name.ends_with(".x"), "192.0.2.1");
        for number in 0..NAMES - 1 {
            let until = 5 + number as u64;
            domains.learn(&format!("n{number}.x"), &[told(one, until)], wanted);
        }
        domains.learn("late.y", &[told("192.0.2.9", 1 << 40)], wanted);
        assert_eq!(domains.by_name.len(), NAMES);
        // What nobody wants does not come any more, and goes first; then what ends first.
        domains.learn("other.y", &[told("192.0.2.8", 1 << 40)], wanted);
        assert!(domains.addresses("other.y").is_empty());
        let lost = domains.learn("new.x", &[told(one, 5)], wanted);
        assert_eq!(lost, ["192.0.2.9".parse().unwrap()].into());
        let lost = domains.learn("newer.x", &[told(one, 50)], wanted);
        assert_eq!((lost.len(), domains.by_name.len()), (1, NAMES));
        let there = ["n0.x", "new.x"].map(|name| domains.addresses(name).len());
        assert_eq!(there.iter().sum::<usize>(), 1);
        let many: Vec<Told> = (0..=ADDRESSES as u64)
            .map(|number| Told {
                address: IpAddr::V4((number as u32 + 1).into()),
                until: 9 + number,
            })
            .collect();
        let lost = domains.learn("n7.x", &many, wanted);
        // What ends first goes; it had one before that ends later.
        assert_eq!(domains.addresses("n7.x").len(), ADDRESSES);
        assert_eq!(lost, [many[0].address, many[1].address].into());
    }
}
