//! Names with namespaces, and patterns of domains and nodes.

use anyhow::{Result, ensure};
use regex::Regex;

/// The namespace of names that have none.
const DEFAULT_NAMESPACE: &str = "default";

/// The beginning of a name: `NAME` (in the namespace `default`), `NAMESPACE/NAME`, `NAMESPACE/`, `/` (any).
pub(super) struct NamePrefix {
    namespace: String,
    name: String,
}

impl NamePrefix {
    pub(super) fn parse(text: &str) -> Result<Self> {
        ensure!(!text.is_empty(), "an empty name; / stands for any");
        let (namespace, name) = text.split_once('/').unwrap_or((DEFAULT_NAMESPACE, text));
        Ok(Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        })
    }

    pub(super) fn is_of(&self, namespace: &str, name: &str) -> bool {
        (!namespace.is_empty() || !name.is_empty())
            && name.starts_with(&self.name)
            && (self.namespace.is_empty() || self.namespace == namespace)
    }
}

/// A pattern's letters as a regular expression; `*` stands for any letters and dots.
fn expression(pattern: &str) -> Result<String> {
    let lower = pattern.trim().to_ascii_lowercase();
    let lower = lower.strip_suffix('.').unwrap_or(&lower);
    ensure!(
        !lower.is_empty() && !lower.ends_with('.'),
        "{pattern:?} is no name"
    );
    lower
        .chars()
        .map(|letter| match letter {
            '.' => Ok(r"\.".to_owned()),
            '*' => Ok("[-.0-9a-z]*".to_owned()),
            'a'..='z' | '0'..='9' | '-' | '_' => Ok(letter.to_string()),
            other => anyhow::bail!("{pattern:?}: no name has a {other:?}"),
        })
        .collect()
}

/// Domains such as `api.example.com` and `*.example.com`.
pub(super) fn domains(pattern: &str) -> Result<Regex> {
    Ok(Regex::new(&format!("^(?:{})$", expression(pattern)?))?)
}

/// Nodes, as `NODE`, `CLUSTER/NODE` or `CLUSTER/`, with `*`; to be matched with `CLUSTER/NODE`.
pub(super) fn nodes(pattern: &str) -> Result<Regex> {
    const ANY: &str = r"[-0-9_a-z]+(?:\.[-0-9_a-z]+)*";
    let (cluster, node) = pattern.split_once('/').unwrap_or(("", pattern));
    ensure!(
        !pattern.is_empty() && !node.contains('/'),
        "{pattern:?} is neither NODE nor CLUSTER/NODE"
    );
    let part = |part: &str| match part {
        "" => Ok(ANY.to_owned()),
        some => expression(some),
    };
    Ok(Regex::new(&format!(
        "^{}/{}$",
        part(cluster)?,
        part(node)?
    ))?)
}
