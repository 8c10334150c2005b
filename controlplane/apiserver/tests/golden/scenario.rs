//! Plays one recorded scenario against a server: its steps in order, then everything it made is deleted.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, Request};
use http_body_util::{BodyExt, Full};
use rand::Rng;
use regex::Regex;
use serde_json::{Map, Value, json};

use crate::normalise::Normaliser;
use crate::support::{Client, Cluster, Reply};

const HEADERS: &[&str] = &[
    "Content-Type",
    "Warning",
    "Retry-After",
    "Location",
    "WWW-Authenticate",
    "Allow",
    "X-Content-Type-Options",
    "Cache-Control",
    "Vary",
];

/// The value at a JSON pointer; none where it is absent.
fn pointer(value: &Value, at: &str) -> Value {
    value
        .pointer(if at == "/" { "" } else { at })
        .cloned()
        .unwrap_or(Value::Null)
}

fn parts(at: &str) -> Vec<String> {
    at.trim_start_matches('/')
        .split('/')
        .map(|part| part.replace("~1", "/").replace("~0", "~"))
        .collect()
}

/// Removes what a pointer with `*` for any key or index names.
fn drop_at(value: &mut Value, at: &[String]) {
    let Some((head, rest)) = at.split_first() else {
        return;
    };
    let star = head == "*";
    match value {
        Value::Object(map) if rest.is_empty() && star => map.clear(),
        Value::Object(map) if rest.is_empty() => {
            map.remove(head);
        }
        Value::Object(map) => {
            for (key, value) in map.iter_mut() {
                if star || key == head {
                    drop_at(value, rest);
                }
            }
        }
        Value::Array(items) if star && rest.is_empty() => items.clear(),
        Value::Array(items) if star => items.iter_mut().for_each(|item| drop_at(item, rest)),
        Value::Array(items) => {
            if let Some(index) = head.parse::<usize>().ok().filter(|at| *at < items.len()) {
                if rest.is_empty() {
                    items.remove(index);
                } else {
                    drop_at(&mut items[index], rest);
                }
            }
        }
        _ => {}
    }
}

/// The `edit` of a step: values set and removed at pointers.
fn edit(value: &mut Value, changes: &Value) {
    for change in changes.as_array().into_iter().flatten() {
        let removes = change.get("remove").is_some();
        let at = change["set"].as_str().or(change["remove"].as_str());
        let way = parts(at.unwrap());
        let (last, way) = way.split_last().unwrap();
        let mut current = &mut *value;
        for part in way {
            current = match current {
                Value::Array(items) => &mut items[part.parse::<usize>().unwrap()],
                other => {
                    if other[part.as_str()].is_null() {
                        other[part.as_str()] = json!({});
                    }
                    &mut other[part.as_str()]
                }
            };
        }
        match current {
            Value::Array(items) if removes => {
                items.remove(last.parse::<usize>().unwrap());
            }
            Value::Array(items) if last == "-" => items.push(change["value"].clone()),
            Value::Array(items) => items[last.parse::<usize>().unwrap()] = change["value"].clone(),
            Value::Object(map) if removes => {
                map.remove(last);
            }
            other => other[last.as_str()] = change["value"].clone(),
        }
    }
}

/// Percent-encodes what may not stand in a path or query; `keep` may.
fn quote(text: &str, keep: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        let c = byte as char;
        if c.is_ascii_alphanumeric() || "_.-~".contains(c) || keep.contains(c) {
            out.push(c);
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Bool(true) => "True".into(),
        Value::Bool(false) => "False".into(),
        Value::Null => "None".into(),
        other => other.to_string(),
    }
}

/// A request as a step describes it.
struct Built {
    method: String,
    path: String,
    headers: Vec<(String, String)>,
    body: Option<Bytes>,
    stranger: bool,
}

/// A scenario being played.
pub struct Run<'a> {
    admin: &'a Client,
    stranger: &'a Client,
    scenario: &'a Value,
    suffix: String,
    namespace: String,
    variables: HashMap<String, Value>,
    created: Vec<String>,
}

/// The two clients that scenarios need.
pub fn clients(cluster: &Cluster) -> (Client, Client) {
    // Under the name that the recording client had.
    (
        cluster.client("admin", &["system:masters"]),
        cluster.stranger(),
    )
}

impl<'a> Run<'a> {
    pub fn new((admin, stranger): &'a (Client, Client), scenario: &'a Value) -> Self {
        let mut rng = rand::rng();
        let mut letter = |of: &[u8]| of[rng.random_range(0..of.len())] as char;
        let mut suffix = letter(b"ghjkmnpqrtvw").to_string();
        (0..6).for_each(|_| suffix.push(letter(b"ghjkmnpqrtvwz")));
        let namespace = format!("gs-{suffix}");
        let variables = [("u", &suffix), ("ns", &namespace)]
            .map(|(name, value)| (name.to_owned(), value.clone().into()));
        Self {
            admin,
            stranger,
            scenario,
            variables: variables.into(),
            suffix,
            namespace,
            created: Vec::new(),
        }
    }

    fn expand_text(&self, text: &str) -> Value {
        let whole = text
            .strip_prefix("${")
            .and_then(|rest| rest.strip_suffix('}'))
            .and_then(|name| self.variables.get(name));
        if let Some(value) = whole {
            return value.clone();
        }
        let pattern = Regex::new(r"\$\{([A-Za-z0-9_]+)\}").unwrap();
        pattern
            .replace_all(text, |found: &regex::Captures| {
                let known = self.variables.get(&found[1]);
                known.map_or_else(|| found[0].to_owned(), plain)
            })
            .into_owned()
            .into()
    }

    fn expand(&self, value: &Value) -> Value {
        match value {
            Value::String(text) => self.expand_text(text),
            Value::Array(items) => items.iter().map(|item| self.expand(item)).collect(),
            Value::Object(map) => map
                .iter()
                .map(|(key, value)| (plain(&self.expand_text(key)), self.expand(value)))
                .collect::<Map<_, _>>()
                .into(),
            other => other.clone(),
        }
    }

    fn build(&self, step: &Value) -> Built {
        let of = |key: &str| self.expand(&step[key]);
        let mut path = plain(&of("path"));
        let query = match of("query") {
            Value::Object(map) => {
                let mut pairs = Vec::new();
                for (key, value) in &map {
                    let all = match value {
                        Value::Array(items) => items.clone(),
                        one => vec![one.clone()],
                    };
                    for value in all {
                        let text = |text: &str| quote(text, " ").replace(' ', "+");
                        pairs.push(format!("{}={}", text(key), text(&plain(&value))));
                    }
                }
                pairs.join("&")
            }
            Value::String(text) => text,
            _ => String::new(),
        };
        if !query.is_empty() {
            path.push(if path.contains('?') { '&' } else { '?' });
            path.push_str(&query);
        }
        let mut headers = vec![
            ("Accept".to_owned(), "application/json".to_owned()),
            ("User-Agent".to_owned(), "golden-replay/1".to_owned()),
        ];
        let mut body = match step["bodyFrom"].as_str() {
            Some(name) => self.variables[name].clone(),
            None => of("body"),
        };
        edit(&mut body, &of("edit"));
        let body = match body {
            Value::Null => None,
            Value::String(text) => Some(text),
            other => Some(other.to_string()),
        };
        if body.is_some() {
            headers.push(("Content-Type".into(), "application/json".into()));
        }
        let given = of("headers");
        for (key, value) in given.as_object().into_iter().flatten() {
            headers.retain(|(name, _)| !name.eq_ignore_ascii_case(key));
            if !value.is_null() {
                headers.push((key.clone(), plain(value)));
            }
        }
        if let Some(user) = of("as").as_str() {
            headers.push(("Impersonate-User".into(), user.into()));
        }
        if let Some(token) = of("token").as_str() {
            headers.push(("Authorization".into(), format!("Bearer {token}")));
        }
        Built {
            method: step["method"].as_str().unwrap_or("GET").into(),
            path: quote(&path, "/?&=%:+,;@!$'()*~[]"),
            headers,
            body: body.map(Bytes::from),
            stranger: step["anonymous"] == true || !step["token"].is_null(),
        }
    }

    fn client(&self, built: &Built) -> &'a Client {
        if built.stranger {
            self.stranger
        } else {
            self.admin
        }
    }

    async fn one(&mut self, step: &Value) -> Value {
        let retry = &step["retry"];
        // This server sees at once what it stored: waiting long would only make failures slow.
        let seconds = retry["timeout"].as_f64().unwrap_or(15.0).min(1.0);
        let deadline = Instant::now() + Duration::from_secs_f64(seconds);
        let (built, reply, body) = loop {
            let built = self.build(step);
            let reply = self.client(&built).ask(request(&built)).await;
            let body = decode(&reply.headers, &reply.body);
            let over = retry.is_null() || Instant::now() > deadline;
            if over || self.satisfied(retry, reply.status, &body) {
                break (built, reply, body);
            }
            let made = reply.status == 201 && built.method == "POST";
            if made && retry["undo"] != false && !built.path.contains("dryRun") {
                if let Some(name) = body["metadata"]["name"].as_str() {
                    let base = built.path.split('?').next().unwrap();
                    let path = format!("{base}/{}?gracePeriodSeconds=0", quote(name, ""));
                    self.quiet("DELETE", &path, None, "application/json").await;
                }
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        let base = built.path.split('?').next().unwrap();
        let dry = built.path.contains("dryRun");
        if matches!(reply.status, 200 | 201) && body.is_object() && !dry {
            let metadata = &body["metadata"];
            let made = reply.status == 201;
            match (built.method.as_str(), metadata["name"].as_str()) {
                ("POST", Some(name)) if made && !metadata["uid"].is_null() => {
                    self.created.push(format!("{base}/{}", quote(name, "")));
                }
                ("PUT" | "PATCH", _) if made => self.created.push(base.into()),
                _ => {}
            }
        }
        for (name, at) in step["capture"].as_object().into_iter().flatten() {
            let value = pointer(&body, at.as_str().unwrap());
            self.variables.insert(name.clone(), value);
        }
        if let Some(seconds) = step["sleep"].as_f64() {
            tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
        }
        json!({"status": reply.status, "headers": pick(&reply.headers), "body": body})
    }

    fn satisfied(&self, retry: &Value, status: u16, body: &Value) -> bool {
        let wanted = match &retry["status"] {
            Value::Null => true,
            Value::Array(all) => all.iter().any(|one| *one == status),
            one => *one == status,
        };
        let at = retry["pointer"].as_str().is_none_or(|at| {
            let found = pointer(body, &plain(&self.expand_text(at)));
            match retry.get("value") {
                Some(value) => found == self.expand(value),
                None => !found.is_null(),
            }
        });
        let contains = retry["contains"]
            .as_str()
            .is_none_or(|text| body.to_string().contains(&plain(&self.expand_text(text))));
        wanted && at && contains
    }

    async fn watch(&mut self, step: &Value) -> Value {
        let about = &step["watch"];
        let built = self.build(about);
        let limit = about["timeout"].as_f64().unwrap_or(6.0);
        let deadline = Instant::now() + Duration::from_secs_f64(limit);
        let want = about["events"].as_u64().unwrap_or(0) as usize;
        let settle = about["settle"].as_f64().unwrap_or(0.25);
        let response = self.client(&built).open(request(&built)).await;
        let (head, mut body) = response.into_parts();
        let mut watch = json!({"status": head.status.as_u16(), "headers": pick(&head.headers)});
        let mut steps = Vec::new();
        if head.status != 200 {
            let bytes = body.collect().await.unwrap().to_bytes();
            watch["body"] = decode(&head.headers, &bytes);
            for inner in step["steps"].as_array().into_iter().flatten() {
                steps.push(Box::pin(self.step(inner)).await);
            }
            return json!({"watch": watch, "steps": steps});
        }
        let (sender, mut events) = tokio::sync::mpsc::unbounded_channel();
        let reader = tokio::spawn(async move {
            let mut buffer = Vec::new();
            while let Some(Ok(frame)) = body.frame().await {
                buffer.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
                while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = buffer.drain(..=end).collect();
                    let text = String::from_utf8_lossy(&line).trim().to_owned();
                    if !text.is_empty() {
                        let event = serde_json::from_str(&text).unwrap_or(json!({"raw": text}));
                        let _ = sender.send(event);
                    }
                }
            }
        });
        for inner in step["steps"].as_array().into_iter().flatten() {
            steps.push(Box::pin(self.step(inner)).await);
        }
        let mut seen: Vec<Value> = Vec::new();
        let mut closed = false;
        let more = if about["untilClosed"] == true {
            limit
        } else {
            settle
        };
        let mut until = if want > 0 {
            deadline
        } else {
            Instant::now() + Duration::from_secs_f64(more)
        };
        loop {
            match tokio::time::timeout_at(until.into(), events.recv()).await {
                Ok(Some(event)) => seen.push(event),
                Ok(None) => {
                    closed = true;
                    break;
                }
                Err(_) => break,
            }
            if seen.len() == want {
                until = Instant::now() + Duration::from_secs_f64(more);
                until = until.min(deadline.max(Instant::now() + Duration::from_secs_f64(settle)));
            }
        }
        reader.abort();
        watch["closedByServer"] = closed.into();
        watch["events"] = seen.into();
        for (name, at) in about["capture"].as_object().into_iter().flatten() {
            let value = pointer(&watch["events"], at.as_str().unwrap());
            self.variables.insert(name.clone(), value);
        }
        json!({"watch": watch, "steps": steps})
    }

    async fn step(&mut self, step: &Value) -> Value {
        if step.get("watch").is_some() {
            return self.watch(step).await;
        }
        if let Some(seconds) = step["pause"].as_f64() {
            tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
            return json!({"pause": step["pause"]});
        }
        self.one(step).await
    }

    async fn quiet(&self, method: &str, path: &str, body: Option<Value>, media: &str) -> Reply {
        let built = Built {
            method: method.into(),
            path: path.into(),
            headers: vec![
                ("Content-Type".into(), media.into()),
                ("Accept".into(), "application/json".into()),
            ],
            body: body.map(|body| body.to_string().into()),
            stranger: false,
        };
        self.admin.ask(request(&built)).await
    }

    async fn cleanup(&self) {
        const JSON: &str = "application/json";
        for path in self.created.iter().rev() {
            let delete = format!("{path}?gracePeriodSeconds=0&propagationPolicy=Background");
            let gone = self.quiet("DELETE", &delete, None, JSON).await;
            if matches!(gone.status, 200 | 202) {
                let left = self.quiet("GET", path, None, JSON).await;
                if left.status == 200 && String::from_utf8_lossy(&left.body).contains("finalizers")
                {
                    let body = json!({"metadata": {"finalizers": null}});
                    let merge = "application/merge-patch+json";
                    self.quiet("PATCH", path, Some(body), merge).await;
                }
            }
            if let Some(name) = path
                .strip_prefix("/api/v1/namespaces/")
                .filter(|name| !name.contains('/'))
            {
                self.finalize(name).await;
            }
        }
        if self.scenario["namespace"] != false {
            let path = format!("/api/v1/namespaces/{}", self.namespace);
            self.quiet("DELETE", &path, None, JSON).await;
            self.finalize(&self.namespace).await;
        }
    }

    async fn finalize(&self, name: &str) {
        let body = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}, "spec": {"finalizers": []}});
        let path = format!("/api/v1/namespaces/{name}/finalize");
        self.quiet("PUT", &path, Some(body), "application/json")
            .await;
    }

    /// Plays it; the answers, normalised.
    pub async fn play(mut self) -> Vec<Value> {
        let steps = self.scenario["steps"].as_array().unwrap().clone();
        if self.scenario["namespace"] != false {
            let mut metadata = json!({"name": self.namespace});
            if self.scenario["namespaceLabels"].is_object() {
                metadata["labels"] = self.scenario["namespaceLabels"].clone();
            }
            let body = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata});
            let json = "application/json";
            let made = self
                .quiet("POST", "/api/v1/namespaces", Some(body), json)
                .await;
            assert_eq!(made.status, 201, "a namespace for the scenario");
            let path = format!("/api/v1/namespaces/{}/serviceaccounts", self.namespace);
            let body = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}});
            self.quiet("POST", &path, Some(body), json).await;
        }
        let mut raw = Vec::new();
        for step in &steps {
            raw.push(self.step(step).await);
        }
        self.cleanup().await;
        let text = self.scenario["steps"].to_string();
        let pattern = Regex::new(r#""generateName":"([^"]+)""#).unwrap();
        let mut prefixes: Vec<String> = pattern
            .captures_iter(&text)
            .map(|found| plain(&self.expand_text(&found[1])))
            .collect();
        prefixes.sort_by_key(|prefix| (std::cmp::Reverse(prefix.len()), prefix.clone()));
        prefixes.dedup();
        let literals = vec![
            (self.namespace.clone(), "<ns>".to_owned()),
            (self.suffix.clone(), "<u>".to_owned()),
        ];
        let mut normaliser = Normaliser::new(literals, text, prefixes);
        raw.iter()
            .zip(&steps)
            .map(|(one, step)| self.normal(&mut normaliser, one, step))
            .collect()
    }

    fn normal(&self, normaliser: &mut Normaliser, raw: &Value, step: &Value) -> Value {
        if raw.get("pause").is_some() {
            return raw.clone();
        }
        if raw.get("watch").is_none() {
            let headers = normal_headers(normaliser, &raw["headers"]);
            let body = normaliser.body(&self.cut(&raw["body"], step));
            return json!({"status": raw["status"], "headers": headers, "body": self.order(body, step)});
        }
        let about = &step["watch"];
        let mut watch = raw["watch"].clone();
        watch["headers"] = normal_headers(normaliser, &watch["headers"]);
        let inner = raw["steps"].as_array().unwrap();
        let empty = Vec::new();
        let steps: Vec<Value> = inner
            .iter()
            .zip(step["steps"].as_array().unwrap_or(&empty))
            .map(|(one, step)| self.normal(normaliser, one, step))
            .collect();
        if let Some(events) = raw["watch"]["events"].as_array() {
            let mut kept: Vec<Value> = events
                .iter()
                .filter(|event| about["bookmarks"] == true || !periodic(event))
                .map(|event| {
                    let event = normaliser.event(&self.cut(event, about));
                    self.order(event, about)
                })
                .collect();
            if about["sort"] == true {
                kept.sort_by_key(Value::to_string);
            }
            watch["events"] = kept.into();
        }
        if let Some(body) = raw["watch"].get("body") {
            let body = normaliser.body(&self.cut(body, about));
            watch["body"] = self.order(body, about);
        }
        json!({"watch": watch, "steps": steps})
    }

    /// Leaves out what is not compared.
    fn cut(&self, value: &Value, step: &Value) -> Value {
        let mut value = value.clone();
        let all = [&self.scenario["ignore"], &step["ignore"]];
        for at in all.iter().filter_map(|list| list.as_array()).flatten() {
            drop_at(&mut value, &parts(&plain(&self.expand(at))));
        }
        match step["only"].as_array() {
            Some(only) => only
                .iter()
                .map(|at| {
                    let name = plain(at);
                    let found = pointer(&value, &plain(&self.expand(at)));
                    (name, found)
                })
                .collect::<Map<_, _>>()
                .into(),
            None => value,
        }
    }

    /// Brings lists that have no promised order into one.
    fn order(&self, mut value: Value, step: &Value) -> Value {
        if self.scenario["unorderedCauses"] == true || step["unorderedCauses"] == true {
            unorder(&mut value);
        }
        for at in step["sortBy"].as_array().into_iter().flatten() {
            let list = value.pointer_mut(at.as_str().unwrap());
            if let Some(list) = list.and_then(Value::as_array_mut) {
                list.sort_by_key(sorted_text);
            }
        }
        value
    }
}

/// An item as the recorder sorts it: its text with sorted keys and a space after separators.
fn sorted_text(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let mut keys: Vec<&String> = map.keys().collect();
            keys.sort();
            let parts: Vec<String> = keys
                .iter()
                .map(|key| format!("{}: {}", Value::from(key.as_str()), sorted_text(&map[*key])))
                .collect();
            format!("{{{}}}", parts.join(", "))
        }
        Value::Array(items) => {
            let parts: Vec<String> = items.iter().map(sorted_text).collect();
            format!("[{}]", parts.join(", "))
        }
        other => other.to_string(),
    }
}

/// A bookmark that the server sends when it likes.
fn periodic(event: &Value) -> bool {
    event["type"] == "BOOKMARK" && !event.to_string().contains("k8s.io/initial-events-end")
}

fn unorder(value: &mut Value) {
    if value["kind"] != "Status" {
        return;
    }
    let mut message = value["message"].as_str().unwrap_or_default().to_owned();
    let causes = value.pointer_mut("/details/causes");
    let Some(causes) = causes.and_then(Value::as_array_mut) else {
        return;
    };
    let text = |one: &Value, key: &str| one[key].as_str().unwrap_or_default().to_owned();
    causes.sort_by_key(|one| (text(one, "field"), text(one, "message")));
    let texts: Vec<String> = causes
        .iter()
        .map(|one| format!("{}: {}", text(one, "field"), text(one, "message")))
        .collect();
    if let Some(at) = message.find('[') {
        if texts.len() > 1 && texts.iter().all(|text| message.contains(text)) {
            message.truncate(at);
            message.push_str(&format!("[{}]", texts.join(", ")));
            value["message"] = message.into();
        }
    }
}

fn request(built: &Built) -> Request<Full<Bytes>> {
    let mut request = Request::builder()
        .method(built.method.as_str())
        .uri(&built.path);
    for (name, value) in &built.headers {
        request = request.header(name, value);
    }
    let body = built.body.clone().unwrap_or_default();
    request.body(Full::new(body)).unwrap()
}

fn decode(headers: &HeaderMap, data: &[u8]) -> Value {
    let media = headers
        .get("content-type")
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    if data.is_empty() {
        return Value::Null;
    }
    if media.contains("json") || data[0] == b'{' && !data.contains(&0) {
        if let Ok(value) = serde_json::from_slice(data) {
            return value;
        }
    }
    if media.contains("yaml") {
        if let Ok(value) = serde_yaml_ng::from_slice(data) {
            return value;
        }
    }
    match std::str::from_utf8(data) {
        Ok(text) if !data.contains(&0) => text.into(),
        _ => {
            let prefix: String = data.iter().take(4).map(|byte| *byte as char).collect();
            json!({"binary": true, "prefix": prefix})
        }
    }
}

fn pick(headers: &HeaderMap) -> Value {
    let mut out = json!({"Audit-Id": headers.contains_key("audit-id")});
    for name in HEADERS {
        let all: Vec<Value> = headers
            .get_all(*name)
            .iter()
            .map(|value| String::from_utf8_lossy(value.as_bytes()).into())
            .collect();
        if all.is_empty() {
            continue;
        }
        out[*name] = if *name == "Warning" {
            all.into()
        } else {
            all[0].clone()
        };
    }
    out
}

fn normal_headers(normaliser: &mut Normaliser, headers: &Value) -> Value {
    let mut out = Map::new();
    for (key, value) in headers.as_object().into_iter().flatten() {
        let new = match value {
            Value::String(text) => normaliser.text(text).into(),
            Value::Array(all) => all
                .iter()
                .map(|one| Value::from(normaliser.text(&plain(one))))
                .collect(),
            other => other.clone(),
        };
        out.insert(key.clone(), new);
    }
    out.into()
}
