//! Selectors of pods: by labels, by their namespace and its labels.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use crate::kind::Kind;

/// Labels of an object.
pub type Labels = BTreeMap<String, String>;

/// What of a pod is looked at.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    /// A label of the pod.
    Label(String),
    /// A label of its namespace.
    NamespaceLabel(String),
    /// The name of its namespace.
    Namespace,
    /// The name of its service account.
    ServiceAccount,
}

/// How it is looked at.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Test {
    /// It is one of these.
    In(BTreeSet<String>),
    /// It is none of these, or not there.
    NotIn(BTreeSet<String>),
    /// It is there.
    Exists,
    /// It is not there.
    DoesNotExist,
}

/// All of these must hold; none selects every pod. Tables of selectors are asked all the time, so one knows its hash.
#[derive(Clone, Debug)]
pub struct Selector {
    all: BTreeSet<(Key, Test)>,
    hash: u64,
}

impl FromIterator<(Key, Test)> for Selector {
    fn from_iter<T: IntoIterator<Item = (Key, Test)>>(all: T) -> Self {
        let all: BTreeSet<(Key, Test)> = all.into_iter().collect();
        let mut hasher = DefaultHasher::new();
        all.hash(&mut hasher);
        Self {
            hash: hasher.finish(),
            all,
        }
    }
}

impl Default for Selector {
    fn default() -> Self {
        std::iter::empty().collect()
    }
}

impl PartialEq for Selector {
    fn eq(&self, other: &Self) -> bool {
        self.hash == other.hash && self.all == other.all
    }
}

impl Eq for Selector {}

impl Hash for Selector {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

impl PartialOrd for Selector {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Selector {
    fn cmp(&self, other: &Self) -> Ordering {
        self.all.cmp(&other.all)
    }
}

/// Reads a label selector; `key` tells whose labels they are.
pub fn requirements(
    selector: &LabelSelector,
    key: impl Fn(&str) -> Key,
) -> Result<Vec<(Key, Test)>, String> {
    let mut found = Vec::new();
    for (name, value) in selector.match_labels.iter().flatten() {
        found.push((key(name), Test::In(BTreeSet::from([value.clone()]))));
    }
    for one in selector.match_expressions.iter().flatten() {
        let values: BTreeSet<String> = one.values.iter().flatten().cloned().collect();
        let test = match (one.operator.as_str(), values.is_empty()) {
            ("In", false) => Test::In(values),
            ("NotIn", false) => Test::NotIn(values),
            ("In" | "NotIn", true) => {
                return Err(format!(
                    "matchExpressions: {} {} needs values",
                    one.key, one.operator
                ));
            }
            ("Exists", true) => Test::Exists,
            ("DoesNotExist", true) => Test::DoesNotExist,
            ("Exists" | "DoesNotExist", false) => {
                return Err(format!(
                    "matchExpressions: {} {} takes no values",
                    one.key, one.operator
                ));
            }
            (other, _) => {
                return Err(format!(
                    "matchExpressions: {other:?} is no operator; use In, NotIn, Exists or DoesNotExist"
                ));
            }
        };
        found.push((key(&one.key), test));
    }
    Ok(found)
}

impl Test {
    /// Whether a value passes, or that there is none.
    pub fn passes(&self, value: Option<&str>) -> bool {
        match self {
            Self::In(values) => value.is_some_and(|value| values.contains(value)),
            Self::NotIn(values) => !value.is_some_and(|value| values.contains(value)),
            Self::Exists => value.is_some(),
            Self::DoesNotExist => value.is_none(),
        }
    }
}

impl Selector {
    /// What must hold.
    pub fn requirements(&self) -> &BTreeSet<(Key, Test)> {
        &self.all
    }

    /// Whether it selects pods of this kind; `namespace` has the labels of their namespace, if it is known.
    pub fn selects(&self, kind: &Kind, namespace: Option<&Labels>) -> bool {
        self.all.iter().all(|(key, test)| match key {
            Key::Label(key) => test.passes(kind.labels.get(key).map(String::as_str)),
            Key::Namespace => test.passes(Some(&kind.namespace)),
            Key::ServiceAccount => test.passes(Some(&kind.service_account)),
            // Of a namespace that is not known, nothing is known to be missing either.
            Key::NamespaceLabel(key) => {
                namespace.is_some_and(|labels| test.passes(labels.get(key).map(String::as_str)))
            }
        })
    }

    /// Whether it selects what has these labels and is no pod.
    pub fn selects_labels(&self, labels: &Labels) -> bool {
        self.all.iter().all(|(key, test)| match key {
            Key::Label(key) => test.passes(labels.get(key).map(String::as_str)),
            _ => test.passes(None),
        })
    }

    /// The only namespace that it selects pods of, if it names one.
    pub fn namespace(&self) -> Option<&str> {
        self.all.iter().find_map(|(key, test)| match (key, test) {
            (Key::Namespace, Test::In(names)) if names.len() == 1 => {
                names.first().map(String::as_str)
            }
            _ => None,
        })
    }

    /// Whether it looks at labels of namespaces.
    pub fn looks_at_namespaces(&self) -> bool {
        let mut keys = self.all.iter();
        keys.any(|(key, _)| matches!(key, Key::NamespaceLabel(_)))
    }

    /// Whether it looks at nothing but namespaces.
    pub fn looks_at_namespaces_alone(&self) -> bool {
        let mut keys = self.all.iter();
        keys.all(|(key, _)| matches!(key, Key::Namespace | Key::NamespaceLabel(_)))
    }

    /// The labels of pods that it looks at.
    pub fn labels(&self) -> impl Iterator<Item = &str> {
        self.all.iter().filter_map(|(key, _)| match key {
            Key::Label(key) => Some(key.as_str()),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn selector(value: serde_json::Value) -> Result<Selector, String> {
        let selector = serde_json::from_value(value).unwrap();
        let all = requirements(&selector, |key| Key::Label(key.to_owned()))?;
        Ok(all.into_iter().collect())
    }

    #[test]
    fn all_operators() {
        let web = Kind {
            labels: [("app", "web"), ("tier", "front")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
            ..Kind::default()
        };
        let selects = |value| selector(value).unwrap().selects(&web, None);
        assert!(selects(json!({})));
        assert!(selects(json!({"matchLabels": {"app": "web"}})));
        assert!(!selects(json!({"matchLabels": {"app": "api"}})));
        let expression = |operator: &str, key: &str, values: &[&str]| json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]});
        assert!(selects(expression("In", "app", &["api", "web"])));
        assert!(!selects(expression("In", "gone", &["web"])));
        assert!(!selects(expression("NotIn", "app", &["web"])));
        assert!(selects(expression("NotIn", "gone", &["web"])));
        assert!(selects(expression("Exists", "tier", &[])));
        assert!(!selects(expression("Exists", "gone", &[])));
        assert!(selects(expression("DoesNotExist", "gone", &[])));
        assert!(!selects(expression("DoesNotExist", "app", &[])));
        for bad in [
            expression("Near", "app", &["web"]),
            expression("In", "app", &[]),
            expression("Exists", "app", &["web"]),
        ] {
            selector(bad).unwrap_err();
        }
    }

    #[test]
    fn of_a_namespace_that_is_not_known_nothing_is_selected_by_labels() {
        let key = Key::NamespaceLabel("team".to_owned());
        let absent = Selector::from_iter([(key, Test::DoesNotExist)]);
        assert!(!absent.selects(&Kind::default(), None));
        assert!(absent.selects(&Kind::default(), Some(&Labels::new())));
    }
}
