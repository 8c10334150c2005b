//! Label selectors.

use serde::Deserialize;

use crate::object::Labels;

/// A label selector; an empty one matches everything.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Selector {
    pub match_labels: Option<Labels>,
    pub match_expressions: Option<Vec<Requirement>>,
}

/// What is asked of one label.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Requirement {
    pub key: String,
    pub operator: Operator,
    pub values: Option<Vec<String>>,
}

/// How a label is compared.
#[derive(Clone, Copy, Deserialize)]
pub enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
}

impl Selector {
    /// Whether labels match all that is asked.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.matches_with(|key| labels.get(key).map(String::as_str))
    }

    /// The same, of labels that are found by a function.
    pub fn matches_with<'a>(&self, find: impl Fn(&str) -> Option<&'a str>) -> bool {
        let labels = self.match_labels.iter().flatten();
        let mut expressions = self.match_expressions.iter().flatten();
        labels
            .into_iter()
            .all(|(key, value)| find(key) == Some(value.as_str()))
            && expressions.all(|one| one.holds(find(&one.key)))
    }

    /// The keys that it asks for.
    pub fn keys(&self) -> Vec<&str> {
        let labels = self.match_labels.iter().flatten().map(|(key, _)| key);
        let expressions = self.match_expressions.iter().flatten().map(|one| &one.key);
        labels.chain(expressions).map(String::as_str).collect()
    }
}

impl Requirement {
    /// Whether it holds for a label's value, or for a label that isn't there.
    fn holds(&self, value: Option<&str>) -> bool {
        let listed = self
            .values
            .iter()
            .flatten()
            .any(|one| Some(one.as_str()) == value);
        match self.operator {
            Operator::In => listed,
            Operator::NotIn => !listed,
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn selectors_match_as_documented() {
        let labels: Labels = [("app", "web"), ("tier", "front"), ("empty", "")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into();
        let expression = |key: &str, operator: &str, values: &[&str]| json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]});
        let cases: Vec<(Value, bool)> = vec![
            (json!({}), true),
            (json!({"matchLabels": null, "matchExpressions": []}), true),
            (json!({"matchLabels": {"app": "web"}}), true),
            (json!({"matchLabels": {"app": "db"}}), false),
            (
                json!({"matchLabels": {"app": "web", "tier": "back"}}),
                false,
            ),
            (json!({"matchLabels": {"none": ""}}), false),
            (json!({"matchLabels": {"empty": ""}}), true),
            (expression("app", "In", &["db", "web"]), true),
            (expression("app", "In", &["db"]), false),
            (expression("none", "In", &["db"]), false),
            (expression("app", "NotIn", &["db"]), true),
            (expression("app", "NotIn", &["db", "web"]), false),
            (expression("none", "NotIn", &["db"]), true),
            (expression("app", "Exists", &[]), true),
            (expression("none", "Exists", &[]), false),
            (expression("app", "DoesNotExist", &[]), false),
            (expression("none", "DoesNotExist", &[]), true),
            (
                json!({"matchLabels": {"app": "web"}, "matchExpressions": [{"key": "tier", "operator": "DoesNotExist"}]}),
                false,
            ),
        ];
        for (selector, expected) in cases {
            let read: Selector = serde_json::from_value(selector.clone()).unwrap();
            assert_eq!(read.matches(&labels), expected, "{selector}");
        }
    }

    #[test]
    fn unknown_fields_and_operators_are_refused() {
        for wrong in [
            json!({"matchLabel": {"app": "web"}}),
            json!({"matchExpressions": [{"key": "app", "operator": "Like", "values": ["web"]}]}),
            json!({"matchLabels": {"app": 1}}),
        ] {
            assert!(
                serde_json::from_value::<Selector>(wrong.clone()).is_err(),
                "{wrong}"
            );
        }
    }
}
