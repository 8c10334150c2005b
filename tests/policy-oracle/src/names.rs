//! Names of domains, and what resolvers said of them.

use std::net::IpAddr;

use crate::{Answer, Cluster};

/// The names that resolvers gave an address, those that still hold.
pub fn of(cluster: &Cluster, address: IpAddr) -> Vec<String> {
    let holds = |one: &&Answer| one.address == address && one.until >= cluster.now;
    let answers = cluster.answers.iter().filter(holds);
    answers.map(|one| plain(&one.name)).collect()
}

/// Without the dot at the end, and in lower case.
fn plain(name: &str) -> String {
    name.trim_end_matches('.').to_lowercase()
}

/// A name.
pub fn is(name: &str, wanted: &str) -> bool {
    plain(name) == plain(wanted)
}

/// Cilium's patterns: `*` stands for any part of a label, `**` at the beginning for one label or more, and `*` alone for
/// all names.
pub fn is_like(name: &str, pattern: &str) -> bool {
    let (name, pattern) = (plain(name), plain(pattern));
    if pattern == "*" {
        return true;
    }
    let labels: Vec<&str> = name.split('.').collect();
    let wanted: Vec<&str> = pattern.split('.').collect();
    let whole = |labels: &[&str], wanted: &[&str]| {
        labels.len() == wanted.len()
            && labels
                .iter()
                .zip(wanted)
                .all(|(label, wanted)| is_label_like(label, wanted))
    };
    match wanted.split_first() {
        Some((&"**", rest)) if !rest.is_empty() => {
            (1..labels.len()).any(|first| whole(&labels[first..], rest))
        }
        _ => whole(&labels, &wanted),
    }
}

/// Names of the network policy API: `*` at the beginning stands for one label or more.
pub fn is_domain(name: &str, wanted: &str) -> bool {
    match wanted.strip_prefix("*.") {
        Some(rest) => is_like(name, &format!("**.{rest}")),
        None => is(name, wanted),
    }
}

fn is_label_like(label: &str, wanted: &str) -> bool {
    let mut parts = wanted.split('*');
    let Some(mut left) = parts.next().and_then(|first| label.strip_prefix(first)) else {
        return false;
    };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else {
        return left.is_empty();
    };
    // What stands between two stars is found as early as can be, which leaves most to the rest.
    for part in parts {
        match left.split_once(part) {
            Some((_, rest)) => left = rest,
            None => return false,
        }
    }
    left.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_examples_of_the_documentation() {
        for (pattern, like, unlike) in [
            (
                "*.cilium.io",
                ["www.cilium.io", "blog.cilium.io"],
                ["cilium.io", "google.com"],
            ),
            (
                "*cilium.io",
                ["cilium.io", "sub-cilium.io"],
                ["www.cilium.io", "a.cilium.io"],
            ),
            (
                "sub*.cilium.io",
                ["sub.cilium.io", "subdomain.cilium.io"],
                ["www.cilium.io", "asub.cilium.io"],
            ),
            (
                "**.cilium.io",
                ["app.cilium.io", "test.app.cilium.io"],
                ["cilium.io", "acilium.io"],
            ),
        ] {
            for name in like {
                assert!(is_like(name, pattern), "{name} {pattern}");
            }
            for name in unlike {
                assert!(!is_like(name, pattern), "{name} {pattern}");
            }
        }
        assert!(is_domain("latest.blog.kubernetes.io", "*.kubernetes.io"));
        assert!(!is_domain("kubernetes.io", "*.kubernetes.io"));
        assert!(is("A.b.", "a.B"));
        assert!(is_like("aXbYbc", "a*b*c") && !is_like("abY", "a*b*c"));
    }
}
