//! Replaces what differs from run to run by placeholders, the same value always by the same one.

use std::collections::HashMap;

use regex::{Captures, Regex};
use serde_json::{Map, Value};
use time::format_description::well_known::Rfc3339;

/// Addresses that are the same in every cluster.
const FIXED: &[&str] = &["10.96.0.1", "10.96.0.0", "10.96.0.10"];
/// A source of the token volume that the recording server's vendor added.
const VENDOR_SOURCE: &str = "openshift-service-ca.crt";

/// What the server knows a client's certificate by.
pub const FINGERPRINT: &str = "X509SHA256=[0-9a-f]{64}";

struct Patterns {
    uuid: Regex,
    time: Regex,
    jwt: Regex,
    age: Regex,
    age_column: Regex,
    access: Regex,
    address: Regex,
    versions: Vec<(Regex, &'static str)>,
    port_cell: Regex,
}

impl Patterns {
    fn new() -> Self {
        let re = |text: &str| Regex::new(text).unwrap();
        Self {
            uuid: re(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b"),
            time: re(
                r"\b(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d| [+-]\d{4} [A-Z]+)?",
            ),
            jwt: re(r"\beyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*"),
            age: re(r"^(\d+y)?(\d+d)?(\d+h)?(\d+m)?(\d+s)?$"),
            age_column: re(r"(?i)age|seen|duration|date|last schedule"),
            access: re(r"\bkube-api-access-[a-z0-9]{5}\b"),
            address: re(r"\b10\.96\.\d{1,3}\.\d{1,3}\b"),
            versions: vec![
                (re(r#"(resourceVersion[\\":, ]{1,8})(\d{2,})"#), "${1}<rv>"),
                // Each client has a certificate of its own.
                (re(FINGERPRINT), "X509SHA256=<fingerprint>"),
                (
                    re(r"(resource version: )(\d+) \((\d+)\)"),
                    "${1}${2} (<rv>)",
                ),
                (re(r"(resource version: \d+, current: )(\d+)"), "${1}<rv>"),
                (
                    re(r"(ResourceVersion in (?:the precondition|record) )\((\d+)\)"),
                    "${1}(<rv>)",
                ),
            ],
            port_cell: re(r"(\b\d+:)(3[0-2]\d{3})(/(?:TCP|UDP|SCTP))"),
        }
    }
}

/// One scenario's replacements.
pub struct Normaliser {
    patterns: std::sync::Arc<Patterns>,
    literals: Vec<(String, String)>,
    prefixes: Vec<(String, Regex)>,
    requests: String,
    numbers: HashMap<&'static str, HashMap<String, String>>,
    columns: Vec<String>,
    list_version: bool,
    start: i64,
}

impl Normaliser {
    /// `requests`: what the scenario itself sent; such values are kept. `prefixes`: its generated names.
    pub fn new(literals: Vec<(String, String)>, requests: String, prefixes: Vec<String>) -> Self {
        let prefixes = prefixes
            .into_iter()
            .map(|prefix| {
                let pattern = format!(
                    "{}([bcdfghjklmnpqrstvwxz2456789]{{5}})",
                    regex::escape(&prefix)
                );
                (prefix, Regex::new(&pattern).unwrap())
            })
            .collect();
        Self {
            patterns: std::sync::Arc::new(Patterns::new()),
            literals,
            prefixes,
            requests,
            numbers: HashMap::new(),
            columns: Vec::new(),
            list_version: false,
            start: time::OffsetDateTime::now_utc().unix_timestamp(),
        }
    }

    fn number(&mut self, kind: &'static str, value: &str) -> String {
        let all = self.numbers.entry(kind).or_default();
        let next = all.len() + 1;
        all.entry(value.to_owned())
            .or_insert_with(|| format!("<{kind}:{next}>"))
            .clone()
    }

    /// Every match of a pattern, replaced by what `with` says or left alone.
    fn each(
        &mut self,
        pattern: &Regex,
        text: &str,
        mut with: impl FnMut(&mut Self, &Captures, &str) -> Option<String>,
    ) -> String {
        let mut out = String::new();
        let mut at = 0;
        for found in pattern.captures_iter(text) {
            let whole = found.get(0).unwrap();
            out.push_str(&text[at..whole.start()]);
            let around = &text[whole.end()..];
            match with(self, &found, around) {
                Some(new) => out.push_str(&new),
                None => out.push_str(whole.as_str()),
            }
            at = whole.end();
        }
        out.push_str(&text[at..]);
        out
    }

    /// One string.
    pub fn text(&mut self, text: &str) -> String {
        let mut text = text.to_owned();
        for (prefix, pattern) in self.prefixes.clone() {
            let whole = text.clone();
            text = self.each(&pattern, &whole, |this, found, after| {
                let start = found.get(0).unwrap().start();
                let word = |c: char| c.is_ascii_alphanumeric();
                let before = whole[..start].chars().next_back();
                let glued = before.is_some_and(|c| word(c) || c == '-')
                    || after
                        .chars()
                        .next()
                        .is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
                (!glued).then(|| format!("{prefix}{}", this.number("gen", &found[1])))
            });
        }
        for (from, to) in &self.literals {
            text = text.replace(from, to);
        }
        let patterns = self.patterns.clone();
        text = self.each(&patterns.uuid, &text.clone(), |this, found, _| {
            (!this.requests.contains(&found[0])).then(|| this.number("uid", &found[0]))
        });
        text = self.each(&patterns.jwt, &text.clone(), |this, found, _| {
            (!this.requests.contains(&found[0])).then(|| "<jwt>".into())
        });
        text = self.each(&patterns.time, &text.clone(), |this, found, _| {
            let at =
                time::OffsetDateTime::parse(&format!("{}T{}Z", &found[1], &found[2]), &Rfc3339)
                    .ok()?
                    .unix_timestamp();
            if (at - this.start).abs() > 2 * 86_400 || this.requests.contains(&found[0]) {
                return None;
            }
            let micro = found.get(3).is_some_and(|part| part.len() == 7);
            Some(if micro { "<microtime>" } else { "<time>" }.into())
        });
        text = patterns
            .access
            .replace_all(&text, "kube-api-access-<gen>")
            .into_owned();
        text = self.each(&patterns.address, &text.clone(), |this, found, after| {
            let kept = FIXED.contains(&&found[0])
                || this.requests.contains(&found[0])
                || after.starts_with('/');
            (!kept).then(|| this.number("clusterip", &found[0]))
        });
        for (pattern, with) in &patterns.versions {
            text = pattern.replace_all(&text, *with).into_owned();
        }
        text = self.each(&patterns.port_cell, &text.clone(), |this, found, _| {
            (!this.requests.contains(&found[2]))
                .then(|| format!("{}<nodeport>{}", &found[1], &found[3]))
        });
        text
    }

    /// The body of an answer.
    pub fn body(&mut self, body: &Value) -> Value {
        self.list_version = body.as_object().is_some_and(|map| {
            map.contains_key("items")
                || map.contains_key("rows")
                || map
                    .get("kind")
                    .and_then(Value::as_str)
                    .is_some_and(|kind| kind.ends_with("List"))
        });
        self.walk(body, &mut Vec::new())
    }

    /// One event of a watch.
    pub fn event(&mut self, event: &Value) -> Value {
        self.list_version = event["type"] == "BOOKMARK";
        self.walk(event, &mut Vec::new())
    }

    fn ages(&mut self, table: &mut Map<String, Value>) {
        if let Some(columns) = table.get("columnDefinitions").and_then(Value::as_array) {
            if !columns.is_empty() {
                self.columns = columns
                    .iter()
                    .map(|column| column["name"].as_str().unwrap_or_default().to_owned())
                    .collect();
            }
        }
        let rows = table.get_mut("rows").and_then(Value::as_array_mut);
        for row in rows.into_iter().flatten() {
            let cells = row.get_mut("cells").and_then(Value::as_array_mut);
            for (cell, column) in cells.into_iter().flatten().zip(&self.columns) {
                let Some(text) = cell.as_str().filter(|text| !text.is_empty()) else {
                    continue;
                };
                if self.patterns.age_column.is_match(column) && self.patterns.age.is_match(text) {
                    *cell = "<age>".into();
                }
            }
        }
    }

    fn walk(&mut self, value: &Value, path: &mut Vec<String>) -> Value {
        match value {
            Value::Object(map) => {
                let mut map = map.clone();
                if map.get("kind").is_some_and(|kind| kind == "Table") {
                    self.ages(&mut map);
                }
                let mut keys: Vec<&String> = map.keys().collect();
                keys.sort();
                let mut out = Map::new();
                for key in keys {
                    let value = &map[key];
                    let (name, new) = self.entry(key, value, path);
                    out.insert(name, new);
                }
                Value::Object(out)
            }
            Value::Array(items) => {
                let last = path
                    .last()
                    .map(String::as_str)
                    .unwrap_or_default()
                    .to_owned();
                let mut items = items.clone();
                if last == "sources" {
                    items.retain(|item| item["configMap"]["name"] != VENDOR_SOURCE);
                }
                if last == "causes"
                    && items
                        .iter()
                        .all(|item| item["reason"] == "FieldManagerConflict")
                {
                    items.sort_by_key(|item| {
                        (item["message"].to_string(), item["field"].to_string())
                    });
                }
                path.push("#".into());
                let out = items.iter().map(|item| self.walk(item, path)).collect();
                path.pop();
                Value::Array(out)
            }
            Value::String(text) => self.text(text).into(),
            other => other.clone(),
        }
    }

    fn entry(&mut self, key: &str, value: &Value, path: &mut Vec<String>) -> (String, Value) {
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        match (key, value) {
            ("resourceVersion", Value::String(version)) if digits(version) && version != "0" => {
                let of_list = self.list_version && path.last().is_some_and(|at| at == "metadata");
                let new = if of_list {
                    "<listrv>".into()
                } else {
                    self.number("rv", version)
                };
                return (key.into(), new.into());
            }
            ("continue", Value::String(token)) if !token.is_empty() => {
                return (key.into(), "<continue>".into());
            }
            ("nodePort" | "healthCheckNodePort", Value::Number(port))
                if port.as_i64() != Some(0) && !self.requests.contains(&port.to_string()) =>
            {
                return (key.into(), "<nodeport>".into());
            }
            _ => {}
        }
        let mut value = value.clone();
        if let ("managedFields", Some(entries)) = (key, value.as_array_mut()) {
            let text = |one: &Value, key: &str| one[key].as_str().unwrap_or_default().to_owned();
            entries.sort_by_key(|one| {
                ["operation", "manager", "apiVersion", "subresource"].map(|key| text(one, key))
            });
        }
        let name = if key == "managedFields" {
            key.to_owned()
        } else {
            self.text(key)
        };
        path.push(key.into());
        let new = self.walk(&value, path);
        path.pop();
        (name, new)
    }
}
