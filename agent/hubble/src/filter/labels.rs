//! Label selectors, as Kubernetes writes them; keys may name where a label comes from: `k8s:app`, `reserved:host`.

use anyhow::{Context, Result, bail, ensure};

/// What all of its requirements select.
pub(super) struct Selector(Vec<Requirement>);

struct Requirement {
    /// `k8s`, `reserved` and the like; none where any will do.
    source: Option<String>,
    key: String,
    operator: Operator,
    values: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Operator {
    Exists,
    Absent,
    In,
    NotIn,
    Greater,
    Less,
}

impl Selector {
    /// Reads `app=web,tier in (a, b),!canary,reserved:host`.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let mut parts = Vec::new();
        let (mut from, mut depth) = (0, 0_u32);
        for (at, letter) in text.char_indices() {
            match letter {
                '(' => depth += 1,
                ')' => depth = depth.checked_sub(1).context("a ) without a (")?,
                ',' if depth == 0 => {
                    parts.push(&text[from..at]);
                    from = at + 1;
                }
                _ => {}
            }
        }
        ensure!(depth == 0, "{text:?}: a ( without a )");
        parts.push(&text[from..]);
        let requirements = parts.into_iter().map(|part| {
            Requirement::parse(part.trim())
                .with_context(|| format!("{text:?} is no label selector"))
        });
        Ok(Self(requirements.collect::<Result<_>>()?))
    }

    /// Whether labels such as `k8s:app=web` are selected.
    pub(super) fn selects(&self, labels: &[String]) -> bool {
        self.0.iter().all(|one| one.holds(labels))
    }
}

impl Requirement {
    fn parse(part: &str) -> Result<Self> {
        if let Some(key) = part.strip_prefix('!') {
            return Self::new(key.trim(), Operator::Absent, Vec::new());
        }
        let end = part
            .find(|letter: char| letter.is_whitespace() || "=!<>(".contains(letter))
            .unwrap_or(part.len());
        let (key, rest) = part.split_at(end);
        let rest = rest.trim();
        for (sign, operator) in [
            ("!=", Operator::NotIn),
            ("==", Operator::In),
            ("=", Operator::In),
            (">", Operator::Greater),
            ("<", Operator::Less),
        ] {
            if let Some(value) = rest.strip_prefix(sign) {
                let value = value.trim();
                ensure!(
                    !value.contains(
                        |letter: char| letter.is_whitespace() || "=!<>()".contains(letter)
                    ),
                    "{value:?} is no value"
                );
                if matches!(operator, Operator::Greater | Operator::Less) {
                    value
                        .parse::<i64>()
                        .with_context(|| format!("{value:?} is no whole number"))?;
                }
                return Self::new(key, operator, vec![value.to_owned()]);
            }
        }
        if rest.is_empty() {
            return Self::new(key, Operator::Exists, Vec::new());
        }
        let (word, list) = rest
            .split_once('(')
            .with_context(|| format!("{rest:?} is no operator with values"))?;
        let operator = match word.trim() {
            "in" => Operator::In,
            "notin" => Operator::NotIn,
            other => bail!("{other:?} is no operator: =, !=, in, notin, > and < are"),
        };
        let list = list
            .strip_suffix(')')
            .with_context(|| format!("{list:?} goes on after its values"))?;
        let values = list.split(',').map(|value| value.trim().to_owned());
        Self::new(key, operator, values.collect())
    }

    fn new(key: &str, operator: Operator, values: Vec<String>) -> Result<Self> {
        let (source, key) = match key.split_once(':') {
            Some(("any", key)) => (None, key),
            Some((source, key)) => (Some(source.to_owned()), key),
            None => (None, key),
        };
        ensure!(
            !key.is_empty()
                && key
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "-_./:".contains(c)),
            "{key:?} is no label's key"
        );
        Ok(Self {
            source,
            key: key.to_owned(),
            operator,
            values,
        })
    }

    /// The value that a label has if it is of this key.
    fn value<'a>(&self, label: &'a str) -> Option<&'a str> {
        let (whole, value) = label.split_once('=').unwrap_or((label, ""));
        let (source, key) = match whole.split_once(':') {
            Some((source, key)) => (Some(source), key),
            None => (None, whole),
        };
        let right = self.source.is_none() || self.source.as_deref() == source;
        (right && key == self.key).then_some(value)
    }

    fn holds(&self, labels: &[String]) -> bool {
        let has = labels.iter().find_map(|label| self.value(label));
        let first = || self.values.first()?.parse::<i64>().ok();
        let number = || has?.parse::<i64>().ok();
        let listed = || has.is_some_and(|has| self.values.iter().any(|one| one == has));
        match self.operator {
            Operator::Exists => has.is_some(),
            Operator::Absent => has.is_none(),
            Operator::In => listed(),
            Operator::NotIn => !listed(),
            Operator::Greater => number() > first() && number().is_some(),
            Operator::Less => number() < first() && number().is_some(),
        }
    }
}
