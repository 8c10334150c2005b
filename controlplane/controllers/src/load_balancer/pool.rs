//! The addresses that load balancers are given, and who has which.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use crate::informer::Key;

/// Addresses of one family, from the first to the last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressRange {
    first: IpAddr,
    last: IpAddr,
}

fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(v4) => u32::from(v4).into(),
        IpAddr::V6(v6) => v6.into(),
    }
}

impl AddressRange {
    /// From `first` to `last`.
    ///
    /// # Errors
    /// When they are of two families, or in the wrong order.
    pub fn new(first: IpAddr, last: IpAddr) -> Result<Self, String> {
        if first.is_ipv4() != last.is_ipv4() {
            return Err(format!("{first} and {last} are not of one family"));
        }
        if number(first) > number(last) {
            return Err(format!("{first} is behind {last}: say the lower one first"));
        }
        Ok(Self { first, last })
    }

    /// The lowest address.
    pub fn first(&self) -> IpAddr {
        self.first
    }

    /// The highest address.
    pub fn last(&self) -> IpAddr {
        self.last
    }

    /// Whether it has an address of this range.
    pub fn touches(&self, range: &ipnet::IpNet) -> bool {
        self.first.is_ipv4() == range.network().is_ipv4()
            && self.first <= range.broadcast()
            && range.network() <= self.last
    }

    pub(super) fn contains(&self, ip: IpAddr) -> bool {
        self.first.is_ipv4() == ip.is_ipv4()
            && (number(self.first)..=number(self.last)).contains(&number(ip))
    }

    /// How many addresses it has, less one.
    fn span(&self) -> u128 {
        number(self.last) - number(self.first)
    }

    fn nth(&self, n: u128) -> IpAddr {
        let number = number(self.first) + n;
        match self.first {
            IpAddr::V4(_) => IpAddr::V4((number as u32).into()),
            IpAddr::V6(_) => IpAddr::V6(number.into()),
        }
    }
}

impl FromStr for AddressRange {
    type Err = String;

    /// `192.0.2.0/24` (without the network's own and the broadcast address), `192.0.2.10-192.0.2.20`, or one address.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let ip = |text: &str| {
            let text = text.trim();
            text.parse::<IpAddr>()
                .map_err(|_| format!("{text:?} is no IP address"))
        };
        if let Some((first, last)) = text.split_once('-') {
            return Self::new(ip(first)?, ip(last)?);
        }
        let Some((network, length)) = text.split_once('/') else {
            return Self::new(ip(text)?, ip(text)?);
        };
        let network = ip(network)?;
        let bits = if network.is_ipv4() { 32 } else { 128 };
        let length = length.trim().parse::<u32>().ok();
        let length = length.filter(|length| *length <= bits).ok_or_else(|| {
            format!("{text:?} is no range: write it like 192.0.2.0/24 or 192.0.2.10-192.0.2.20")
        })?;
        let hosts = 1u128
            .checked_shl(bits - length)
            .unwrap_or(0)
            .wrapping_sub(1);
        let low = number(network) & !hosts;
        // Nobody must answer for the network itself or for all of it.
        let (skip_low, skip_high) = match (network, bits - length) {
            (_, 0 | 1) => (0, 0),
            (IpAddr::V4(_), _) => (1, 1),
            (IpAddr::V6(_), _) => (1, 0),
        };
        let of = |number: u128| match network {
            IpAddr::V4(_) => IpAddr::V4((number as u32).into()),
            IpAddr::V6(_) => IpAddr::V6(number.into()),
        };
        Self::new(of(low + skip_low), of((low | hosts) - skip_high))
    }
}

impl fmt::Display for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

/// Why an address is not to be had.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It is in none of the ranges.
    Outside,
    /// Another Service has it.
    Taken(Key),
}

struct Pool {
    range: AddressRange,
    used: u128,
    /// Where the search goes on, so that what was just given back rests for a while.
    next: u128,
}

/// Who has which address.
pub(super) struct Pools {
    pools: Vec<Pool>,
    owners: HashMap<IpAddr, Key>,
    held: HashMap<Key, Vec<IpAddr>>,
}

impl Pools {
    pub(super) fn new(ranges: Vec<AddressRange>) -> Self {
        let pool = |range| Pool {
            range,
            used: 0,
            next: 0,
        };
        Self {
            pools: ranges.into_iter().map(pool).collect(),
            owners: HashMap::new(),
            held: HashMap::new(),
        }
    }

    /// What this Service has.
    pub(super) fn held(&self, key: &Key) -> &[IpAddr] {
        self.held.get(key).map(Vec::as_slice).unwrap_or_default()
    }

    /// Whether there are addresses of this family at all.
    pub(super) fn serves(&self, v4: bool) -> bool {
        let mut pools = self.pools.iter();
        pools.any(|pool| pool.range.first.is_ipv4() == v4)
    }

    /// Gives the Service this address, if it is not another's.
    pub(super) fn take(&mut self, key: &Key, ip: IpAddr) -> Result<(), Refusal> {
        if !self.pools.iter().any(|pool| pool.range.contains(ip)) {
            return Err(Refusal::Outside);
        }
        match self.owners.get(&ip) {
            Some(owner) if owner == key => Ok(()),
            Some(owner) => Err(Refusal::Taken(owner.clone())),
            None => {
                self.owners.insert(ip, key.clone());
                self.held.entry(key.clone()).or_default().push(ip);
                self.count(ip, |used| used + 1);
                Ok(())
            }
        }
    }

    /// Gives the Service any free address of the family.
    pub(super) fn take_any(&mut self, key: &Key, v4: bool) -> Option<IpAddr> {
        let owners = &self.owners;
        let free = self.pools.iter_mut().find_map(|pool| {
            let span = pool.range.span();
            if pool.range.first.is_ipv4() != v4 || pool.used > span {
                return None;
            }
            // There is one: the search ends.
            loop {
                let ip = pool.range.nth(pool.next);
                pool.next = if pool.next == span { 0 } else { pool.next + 1 };
                if !owners.contains_key(&ip) {
                    return Some(ip);
                }
            }
        })?;
        self.take(key, free).ok().map(|()| free)
    }

    /// Takes all but these back. True: something became free.
    pub(super) fn take_back(&mut self, key: &Key, but: &[IpAddr]) -> bool {
        let Some(held) = self.held.remove(key) else {
            return false;
        };
        let (kept, gone): (Vec<_>, Vec<_>) = held.into_iter().partition(|ip| but.contains(ip));
        for ip in &gone {
            self.owners.remove(ip);
            self.count(*ip, |used| used.saturating_sub(1));
        }
        if !kept.is_empty() {
            self.held.insert(key.clone(), kept);
        }
        !gone.is_empty()
    }

    fn count(&mut self, ip: IpAddr, change: impl Fn(u128) -> u128) {
        let pools = self.pools.iter_mut();
        for pool in pools.filter(|pool| pool.range.contains(ip)) {
            pool.used = change(pool.used);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(text: &str) -> AddressRange {
        text.parse().unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn ranges_are_read() {
        for (text, first, last) in [
            ("192.0.2.0/24", "192.0.2.1", "192.0.2.254"),
            ("192.0.2.77/24", "192.0.2.1", "192.0.2.254"),
            ("192.0.2.4/31", "192.0.2.4", "192.0.2.5"),
            ("192.0.2.4/32", "192.0.2.4", "192.0.2.4"),
            ("192.0.2.4", "192.0.2.4", "192.0.2.4"),
            ("192.0.2.4 - 192.0.2.9", "192.0.2.4", "192.0.2.9"),
            ("fd00::/120", "fd00::1", "fd00::ff"),
            ("fd00::7-fd00::9", "fd00::7", "fd00::9"),
            ("::/0", "::1", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
            ("0.0.0.0/0", "0.0.0.1", "255.255.255.254"),
        ] {
            let range = range(text);
            assert_eq!((range.first, range.last), (ip(first), ip(last)), "{text}");
        }
        for text in [
            "",
            "x",
            "1.2.3.4/33",
            "1.2.3.4/x",
            "1.2.3.9-1.2.3.4",
            "1.2.3.4-fd00::1",
            "fd00::/129",
        ] {
            assert!(text.parse::<AddressRange>().is_err(), "{text}");
        }
        let touches = |a: &str, b: &str| range(a).touches(&b.parse().unwrap());
        assert!(touches("10.0.0.250-10.0.1.5", "10.0.1.0/24"));
        assert!(touches("10.0.0.0/8", "10.3.0.0/16") && touches("fd00::5", "fd00::/64"));
        assert!(!touches("10.0.0.0/24", "10.0.1.0/24") && !touches("0.0.0.0/0", "::/0"));
    }

    /// Random takers: nobody has another's address, a full pool gives nothing, what comes back can be had again.
    #[test]
    fn no_address_has_two_owners() {
        let mut random = 0x2545_f491_4f6c_dd1d_u64;
        let mut below = |n: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % n
        };
        // Two of the ranges overlap.
        let mut pools = Pools::new(vec![
            range("192.0.2.1-192.0.2.8"),
            range("192.0.2.5-192.0.2.12"),
            range("fd00::1-fd00::5"),
        ]);
        let mut model: HashMap<IpAddr, Key> = HashMap::new();
        let key = |n: u64| Key::new("n", &n.to_string());
        for _ in 0..20_000 {
            let who = key(below(9));
            match below(4) {
                0 => {
                    pools.take_back(&who, &[]);
                    model.retain(|_, owner| *owner != who);
                }
                1 => {
                    let wish = ip(&format!("192.0.2.{}", below(14)));
                    let free = model.get(&wish).is_none_or(|owner| *owner == who);
                    let inside = wish != ip("192.0.2.0") && wish != ip("192.0.2.13");
                    assert_eq!(pools.take(&who, wish).is_ok(), free && inside);
                    if free && inside {
                        model.insert(wish, who);
                    }
                }
                _ => {
                    let v4 = below(2) == 0;
                    let used = model.keys().filter(|ip| ip.is_ipv4() == v4).count();
                    let got = pools.take_any(&who, v4);
                    assert_eq!(got.is_some(), used < if v4 { 12 } else { 5 });
                    if let Some(ip) = got {
                        assert_eq!(ip.is_ipv4(), v4);
                        assert_eq!(model.insert(ip, who), None, "{ip} has two owners");
                    }
                }
            }
        }
    }
}
