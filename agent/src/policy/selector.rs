//! Label selectors (`meta/v1.LabelSelector`).

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

/// Labels of an object.
pub type Labels = BTreeMap<String, String>;

/// Whether a selector selects these labels; an empty one selects everything, one that can't be understood nothing.
pub fn matches(selector: &LabelSelector, labels: &Labels) -> bool {
    let equal = selector
        .match_labels
        .iter()
        .flatten()
        .all(|(key, value)| labels.get(key) == Some(value));
    equal
        && selector.match_expressions.iter().flatten().all(|one| {
            let value = labels.get(&one.key);
            let listed = |value: &String| one.values.iter().flatten().any(|listed| listed == value);
            match one.operator.as_str() {
                "In" => value.is_some_and(listed),
                "NotIn" => !value.is_some_and(listed),
                "Exists" => value.is_some(),
                "DoesNotExist" => value.is_none(),
                _ => false,
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn selects(selector: serde_json::Value, labels: &[(&str, &str)]) -> bool {
        let labels = labels
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        matches(&serde_json::from_value(selector).unwrap(), &labels)
    }

    #[test]
    fn all_operators() {
        let web = [("app", "web"), ("tier", "front")];
        assert!(selects(json!({}), &[]));
        assert!(selects(json!({"matchLabels": {"app": "web"}}), &web));
        assert!(!selects(json!({"matchLabels": {"app": "api"}}), &web));
        let expression = |operator: &str, key: &str, values: &[&str]| json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]});
        assert!(selects(expression("In", "app", &["api", "web"]), &web));
        assert!(!selects(expression("In", "gone", &["web"]), &web));
        assert!(!selects(expression("NotIn", "app", &["web"]), &web));
        assert!(selects(expression("NotIn", "gone", &["web"]), &web));
        assert!(selects(expression("Exists", "tier", &[]), &web));
        assert!(!selects(expression("Exists", "gone", &[]), &web));
        assert!(selects(expression("DoesNotExist", "gone", &[]), &web));
        assert!(!selects(expression("Near", "app", &["web"]), &web));
    }
}
