//! Label and field selectors, in their string and object forms.

use serde_json::{Map, Value};

use crate::Object;
use crate::table::Resource;

/// A label selector: all requirements hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LabelSelector {
    requirements: Vec<Requirement>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Requirement {
    key: String,
    operator: Operator,
    values: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
    Gt,
    Lt,
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Word(String),
    Symbol(&'static str),
    End,
}

fn tokens(text: &str) -> Vec<Token> {
    let symbols = ["==", "!=", "=", "!", ",", "(", ")", ">", "<"];
    let mut found = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        if let Some(symbol) = symbols.iter().find(|symbol| rest.starts_with(**symbol)) {
            found.push(Token::Symbol(symbol));
            rest = &rest[symbol.len()..];
        } else {
            let end = rest
                .find(|c: char| c.is_whitespace() || "=!,()<>".contains(c))
                .unwrap_or(rest.len());
            found.push(Token::Word(rest[..end].to_owned()));
            rest = &rest[end..];
        }
        rest = rest.trim_start();
    }
    found.push(Token::End);
    found
}

impl Token {
    fn text(&self) -> &str {
        match self {
            Token::Word(word) => word,
            Token::Symbol(symbol) => symbol,
            Token::End => "",
        }
    }
}

impl LabelSelector {
    /// Reads `a=b,c!=d,e in (f,g),!h`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let tokens = tokens(text);
        let mut at = 0;
        let mut requirements = Vec::new();
        if tokens[0] == Token::End {
            return Ok(Self::default());
        }
        loop {
            requirements.push(requirement(&tokens, &mut at)?);
            match &tokens[at] {
                Token::End => return Ok(Self { requirements }),
                Token::Symbol(",") => {
                    at += 1;
                    if !matches!(&tokens[at], Token::Word(_) | Token::Symbol("!")) {
                        return Err(format!(
                            "found '{}', expected: identifier after ','",
                            tokens[at].text()
                        ));
                    }
                }
                other => {
                    return Err(format!(
                        "found '{}', expected: ',' or 'end of string'",
                        other.text()
                    ));
                }
            }
        }
    }

    /// Reads a `meta/v1` LabelSelector; `None` or an empty one matches everything.
    pub fn from_object(selector: &Value) -> Result<Self, String> {
        let mut requirements = Vec::new();
        for (key, value) in selector["matchLabels"].as_object().into_iter().flatten() {
            let value = value.as_str().unwrap_or_default().to_owned();
            requirements.push(Requirement {
                key: key.clone(),
                operator: Operator::In,
                values: vec![value],
            });
        }
        for expression in selector["matchExpressions"]
            .as_array()
            .into_iter()
            .flatten()
        {
            let operator = match expression["operator"].as_str().unwrap_or_default() {
                "In" => Operator::In,
                "NotIn" => Operator::NotIn,
                "Exists" => Operator::Exists,
                "DoesNotExist" => Operator::DoesNotExist,
                other => return Err(format!("{other:?} is not a valid label selector operator")),
            };
            let values = expression["values"].as_array().into_iter().flatten();
            requirements.push(Requirement {
                key: expression["key"].as_str().unwrap_or_default().to_owned(),
                operator,
                values: values
                    .filter_map(|value| value.as_str().map(str::to_owned))
                    .collect(),
            });
        }
        Ok(Self { requirements })
    }

    /// Whether it lets everything through.
    pub fn is_everything(&self) -> bool {
        self.requirements.is_empty()
    }

    /// Whether labels satisfy it; no labels at all are an empty map.
    pub fn matches(&self, labels: Option<&Map<String, Value>>) -> bool {
        self.requirements.iter().all(|requirement| {
            let value = labels
                .and_then(|labels| labels.get(&requirement.key))
                .and_then(Value::as_str);
            let listed = |value: &str| requirement.values.iter().any(|one| one == value);
            let compare = |less: bool| match (
                value.and_then(|v| v.parse::<i64>().ok()),
                requirement
                    .values
                    .first()
                    .and_then(|v| v.parse::<i64>().ok()),
            ) {
                (Some(value), Some(bound)) => {
                    if less {
                        value < bound
                    } else {
                        value > bound
                    }
                }
                _ => false,
            };
            match requirement.operator {
                Operator::In => value.is_some_and(listed),
                Operator::NotIn => !value.is_some_and(listed),
                Operator::Exists => value.is_some(),
                Operator::DoesNotExist => value.is_none(),
                Operator::Gt => compare(false),
                Operator::Lt => compare(true),
            }
        })
    }
}

fn requirement(tokens: &[Token], at: &mut usize) -> Result<Requirement, String> {
    let next = |at: &mut usize| {
        let token = tokens[(*at).min(tokens.len() - 1)].clone();
        *at += 1;
        token
    };
    let word = |token: Token| match token {
        Token::Word(word) => Ok(word),
        other => Err(format!("found '{}', expected: identifier", other.text())),
    };
    if tokens[*at] == Token::Symbol("!") {
        *at += 1;
        let key = check_key(word(next(at))?)?;
        return Ok(Requirement {
            key,
            operator: Operator::DoesNotExist,
            values: Vec::new(),
        });
    }
    let key = match next(at) {
        Token::Word(word) => check_key(word)?,
        other => {
            return Err(format!(
                "found '{}', expected: !, identifier, or 'end of string'",
                other.text()
            ));
        }
    };
    let single = |at: &mut usize| match &tokens[(*at).min(tokens.len() - 1)] {
        Token::Word(word) => {
            *at += 1;
            word.clone()
        }
        _ => String::new(),
    };
    let (operator, values) = match tokens[*at].clone() {
        Token::End | Token::Symbol(",") => (Operator::Exists, Vec::new()),
        Token::Symbol("=" | "==") => {
            *at += 1;
            (Operator::In, vec![single(at)])
        }
        Token::Symbol("!=") => {
            *at += 1;
            (Operator::NotIn, vec![single(at)])
        }
        Token::Symbol(symbol @ (">" | "<")) => {
            *at += 1;
            let value = single(at);
            if value.parse::<i64>().is_err() {
                return Err(format!(
                    "unable to parse requirement: values[0]: Invalid value: {value:?}: for 'Gt', 'Lt' operators, the value must be an integer"
                ));
            }
            (
                if symbol == ">" {
                    Operator::Gt
                } else {
                    Operator::Lt
                },
                vec![value],
            )
        }
        Token::Word(operator) if operator == "in" || operator == "notin" => {
            *at += 1;
            match next(at) {
                Token::Symbol("(") => {}
                other => return Err(format!("found '{}', expected: '('", other.text())),
            }
            let mut values = Vec::new();
            loop {
                values.push(single(at));
                match next(at) {
                    Token::Symbol(",") => {}
                    Token::Symbol(")") => break,
                    other => return Err(format!("found '{}', expected: ',' or ')'", other.text())),
                }
            }
            (
                if operator == "in" {
                    Operator::In
                } else {
                    Operator::NotIn
                },
                values,
            )
        }
        other => {
            return Err(format!(
                "found '{}', expected: in, notin, =, ==, !=, gt, lt",
                other.text()
            ));
        }
    };
    for value in &values {
        if value.len() > 63 {
            return Err(format!(
                "unable to parse requirement: values[0][{key}]: Invalid value: {value:?}: must be no more than 63 bytes"
            ));
        }
    }
    Ok(Requirement {
        key,
        operator,
        values,
    })
}

fn check_key(key: String) -> Result<String, String> {
    let messages = crate::validate::names::qualified_name(&key);
    match messages.first() {
        Some(message) => Err(format!(
            "unable to parse requirement: <nil>: Invalid value: {key:?}: {message}"
        )),
        None => Ok(key),
    }
}

/// A field selector: all terms hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldSelector {
    terms: Vec<(String, bool, String)>,
}

/// Fields beyond name and namespace that can be selected on.
fn selectable(resource: &Resource) -> &'static [&'static str] {
    match (resource.group, resource.plural) {
        ("", "pods") => &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.podIPs",
            "status.nominatedNodeName",
        ],
        ("", "events") => &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "reason",
            "reportingComponent",
            "source",
            "type",
        ],
        ("events.k8s.io", "events") => &[
            "regarding.kind",
            "regarding.namespace",
            "regarding.name",
            "regarding.uid",
            "regarding.apiVersion",
            "regarding.resourceVersion",
            "regarding.fieldPath",
            "reason",
            "reportingController",
            "type",
        ],
        ("", "nodes") => &["spec.unschedulable"],
        ("", "namespaces") => &["status.phase"],
        ("", "secrets") => &["type"],
        ("", "services") => &["spec.clusterIP", "spec.type"],
        ("", "replicationcontrollers") | ("apps", "replicasets") => &["status.replicas"],
        ("batch", "jobs") => &["status.successful"],
        ("certificates.k8s.io", _) => &["spec.signerName"],
        ("resource.k8s.io", "resourceslices") => &["spec.nodeName", "spec.driver"],
        _ => &[],
    }
}

/// The terms between commas; a backslash takes away a character's meaning.
fn split_terms(text: &str) -> Vec<&str> {
    let (mut terms, mut start, mut escaped) = (Vec::new(), 0, false);
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            ',' => {
                terms.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    terms.push(&text[start..]);
    terms.retain(|term| !term.is_empty());
    terms
}

/// Field, whether it must be equal, and the value as it is written.
fn split_term(term: &str) -> Option<(&str, bool, &str)> {
    term.char_indices().find_map(|(at, _)| {
        let (field, rest) = term.split_at(at);
        [("!=", false), ("==", true), ("=", true)]
            .into_iter()
            .find_map(|(sign, equal)| Some((field, equal, rest.strip_prefix(sign)?)))
    })
}

fn unescaped(value: &str) -> Result<String, String> {
    let mut text = String::with_capacity(value.len());
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some(c @ ('\\' | ',' | '=')) => text.push(c),
                Some(c) => {
                    return Err(format!(
                        "invalid field selector: invalid escape sequence: \\{c}"
                    ));
                }
                None => return Err("invalid field selector: invalid escape sequence: \\".into()),
            },
            ',' | '=' => {
                return Err(format!(
                    "invalid field selector: unescaped character in value: {c}"
                ));
            }
            c => text.push(c),
        }
    }
    Ok(text)
}

impl FieldSelector {
    /// Reads `metadata.name=a,spec.nodeName!=b`; a field that this resource does not know is an error.
    pub fn parse(text: &str, resource: &Resource) -> Result<Self, String> {
        let mut terms = Vec::new();
        for term in split_terms(text) {
            let Some((field, equal, value)) = split_term(term) else {
                return Err(format!(
                    "invalid selector: '{text}'; can't understand '{term}'"
                ));
            };
            let value = unescaped(value)?;
            // A term that says nothing asks for nothing.
            if field.is_empty() && value.is_empty() {
                continue;
            }
            let known = match field {
                "metadata.name" => true,
                "metadata.namespace" => resource.namespaced,
                _ => selectable(resource).contains(&field),
            };
            if !known {
                if selectable(resource).is_empty() {
                    return Err(format!(
                        "{field:?} is not a known field selector: only \"metadata.name\", \"metadata.namespace\""
                    ));
                }
                return Err(format!("field label not supported: {field}"));
            }
            terms.push((field.to_owned(), equal, value));
        }
        Ok(Self { terms })
    }

    /// Whether it lets everything through.
    pub fn is_everything(&self) -> bool {
        self.terms.is_empty()
    }

    /// The value that this field must have, if the selector says so.
    pub fn exact(&self, field: &str) -> Option<&str> {
        self.terms
            .iter()
            .find(|(name, equal, _)| *equal && name == field)
            .map(|(_, _, value)| value.as_str())
    }

    /// Whether an object satisfies it.
    pub fn matches(&self, object: &Object) -> bool {
        self.terms
            .iter()
            .all(|(field, equal, wanted)| (value_of(object, field) == *wanted) == *equal)
    }
}

fn value_of(object: &Object, field: &str) -> String {
    let mut value = object;
    let field = match field {
        "source" if object["source"].is_object() => "source.component",
        // A Job counts its successes under another name than its selector.
        "status.successful" => "status.succeeded",
        field => field,
    };
    for part in field.split('.') {
        value = &value[part];
    }
    match value {
        Value::String(text) => text.clone(),
        Value::Null if matches!(field, "spec.unschedulable" | "spec.hostNetwork") => "false".into(),
        Value::Null if field.starts_with("status.re") || field == "status.succeeded" => "0".into(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn label_selectors() {
        let labels = json!({"app": "web", "n": "5", "empty": ""});
        for (text, holds) in [
            ("", true),
            ("app", true),
            ("!app", false),
            ("app=web", true),
            ("app==web", true),
            ("app!=web", false),
            ("app in (api, web)", true),
            ("app notin (api)", true),
            ("absent notin (x)", true),
            ("absent!=x", true),
            ("n>4,n<6", true),
            ("n>5", false),
            ("empty=", true),
            ("app=web,!absent", true),
            ("absent", false),
        ] {
            assert_eq!(
                LabelSelector::parse(text)
                    .unwrap()
                    .matches(labels.as_object()),
                holds,
                "{text}"
            );
        }
        for text in ["app in", "app in (", "a,,b", "a b", "(", "n>x", "-a", "a,"] {
            assert!(LabelSelector::parse(text).is_err(), "{text}");
        }
        assert_eq!(
            LabelSelector::parse("a,").unwrap_err(),
            "found '', expected: identifier after ','"
        );
    }

    #[test]
    fn field_selectors() {
        let pods = crate::table::resource("", "v1", "pods").unwrap();
        let pod = json!({"metadata": {"name": "a"}, "spec": {"nodeName": "n"}, "status": {"phase": "Running"}});
        assert!(
            FieldSelector::parse("spec.nodeName=n,status.phase!=Failed", pods)
                .unwrap()
                .matches(&pod)
        );
        assert!(
            !FieldSelector::parse("metadata.name=b", pods)
                .unwrap()
                .matches(&pod)
        );
        assert_eq!(
            FieldSelector::parse("spec.x=1", pods).unwrap_err(),
            "field label not supported: spec.x"
        );
    }
}
