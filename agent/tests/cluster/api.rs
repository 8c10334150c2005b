//! An API server for one agent: lists in pages, watches, and the Events and conditions that it is told. It speaks HTTP
//! without TLS.
//! Custom resources are there while their definitions are.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use serde_json::{Value, json};

/// One kind of objects.
#[derive(Default)]
struct Kind {
    /// By namespace and name.
    objects: BTreeMap<String, Arc<str>>,
    /// What changed: version, kind of event and object.
    log: Vec<(u64, &'static str, Arc<str>)>,
}

#[derive(Default)]
struct State {
    version: u64,
    kinds: HashMap<String, Kind>,
    events: Vec<Value>,
}

/// The server; cheap to clone.
#[derive(Clone, Default)]
pub struct Api(Arc<(Mutex<State>, Condvar)>);

/// The groups of custom resources.
const CUSTOM: [&str; 2] = ["cilium.io", "policy.networking.k8s.io"];
const NOT_FOUND: &str = "404 Not Found";
const CONFLICT: &str = "409 Conflict";

fn failure(code: u16, reason: &str) -> String {
    json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason,
        "message": "it is not so",
    })
    .to_string()
}

fn not_found() -> String {
    failure(404, "NotFound")
}

/// Puts conditions into an object, each in the place of the one of its type, as the API does with what is applied.
fn apply_conditions(object: &mut Value, applied: &Value) {
    let there = &mut object["status"]["conditions"];
    if there.is_null() {
        *there = json!([]);
    }
    let there = there.as_array_mut().unwrap();
    for one in applied["status"]["conditions"].as_array().unwrap() {
        there.retain(|other| other["type"] != one["type"]);
        there.push(one.clone());
    }
}

fn name_of(object: &Value) -> String {
    let text = |key: &str| object["metadata"][key].as_str().unwrap_or("").to_owned();
    format!("{}/{}", text("namespace"), text("name"))
}

impl Api {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.0.lock().unwrap()
    }

    /// Listens in this thread's network namespace.
    pub fn serve(&self, address: SocketAddr) {
        let listener = TcpListener::bind(address).unwrap();
        let api = self.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let api = api.clone();
                // A client that goes ends its connection's thread.
                std::thread::spawn(move || api.answer(stream));
            }
        });
    }

    /// Objects of a kind (`services`) are like this from here on.
    pub fn set(&self, kind: &str, objects: impl IntoIterator<Item = Value>) {
        let mut state = self.state();
        for mut object in objects {
            state.version += 1;
            let version = state.version;
            object["metadata"]["resourceVersion"] = version.to_string().into();
            object["metadata"]["generation"] = version.into();
            object["metadata"]["uid"] = format!("uid-{}", name_of(&object)).into();
            let text: Arc<str> = object.to_string().into();
            let kind = state.kinds.entry(kind.to_owned()).or_default();
            let before = kind.objects.insert(name_of(&object), text.clone());
            let event = if before.is_some() {
                "MODIFIED"
            } else {
                "ADDED"
            };
            kind.log.push((version, event, text));
        }
        self.0.1.notify_all();
    }

    /// An object is there no more.
    pub fn remove(&self, kind: &str, name: &str) {
        let mut state = self.state();
        state.version += 1;
        let version = state.version;
        let kind = state.kinds.get_mut(kind).unwrap();
        let text = kind.objects.remove(name).unwrap();
        let mut object: Value = serde_json::from_str(&text).unwrap();
        object["metadata"]["resourceVersion"] = version.to_string().into();
        kind.log
            .push((version, "DELETED", object.to_string().into()));
        self.0.1.notify_all();
    }

    /// Events that were told, as reason, object and words.
    pub fn events(&self) -> Vec<(String, String, String)> {
        let text = |value: &Value| value.as_str().unwrap_or("").to_owned();
        let state = self.state();
        let events = state.events.iter();
        events
            .map(|event| {
                let about = text(&event["regarding"]["name"]);
                (text(&event["reason"]), about, text(&event["note"]))
            })
            .collect()
    }

    fn answer(&self, stream: TcpStream) -> Option<()> {
        let mut out = stream.try_clone().ok()?;
        let mut lines = BufReader::new(stream);
        loop {
            let mut first = String::new();
            if lines.read_line(&mut first).ok()? == 0 {
                return None;
            }
            let mut words = first.split_whitespace();
            let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
            let mut length = 0;
            loop {
                let mut line = String::new();
                lines.read_line(&mut line).ok()?;
                let line = line.trim().to_ascii_lowercase();
                if let Some(told) = line.strip_prefix("content-length:") {
                    length = told.trim().parse().ok()?;
                }
                if line.is_empty() {
                    break;
                }
            }
            let mut body = vec![0; length];
            lines.read_exact(&mut body).ok()?;
            let (path, query) = target.split_once('?').unwrap_or((&target, ""));
            let kind = path.rsplit('/').next()?.to_owned();
            // What is asked of one namespace alone is kept as a kind of its own.
            let kind = match path.split_once("/namespaces/") {
                Some((_, of)) if method == "GET" && of.contains('/') => of.to_owned(),
                _ => kind,
            };
            let query: HashMap<&str, &str> = query
                .split('&')
                .filter_map(|one| one.split_once('='))
                .collect();
            let (status, text) = match method.as_str() {
                "GET" if !self.has(path) => (NOT_FOUND, not_found()),
                "GET" if query.get("watch").is_some_and(|watch| *watch != "false") => {
                    let from = query.get("resourceVersion");
                    return self.watch(&mut out, &kind, from.and_then(|from| from.parse().ok())?);
                }
                "GET" => ("200 OK", self.list(&kind, &query)),
                "POST" if kind == "events" => {
                    let event: Value = serde_json::from_slice(&body).ok()?;
                    let text = event.to_string();
                    self.state().events.push(event);
                    ("201 Created", text)
                }
                "PATCH" if kind == "status" => self.patch_status(path, &body)?,
                _ => (NOT_FOUND, not_found()),
            };
            write!(
                out,
                "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{text}",
                text.len()
            )
            .ok()?;
        }
    }

    /// What an object says of itself: that of a kind in `kinds`, by namespace and name.
    pub fn status(&self, kind: &str, name: &str) -> Value {
        let state = self.state();
        let text = &state.kinds[kind].objects[name];
        serde_json::from_str::<Value>(text).unwrap()["status"].clone()
    }

    /// Takes conditions for the object of a path that ends with `/status`.
    fn patch_status(&self, path: &str, body: &[u8]) -> Option<(&'static str, String)> {
        let applied: Value = serde_json::from_slice(body).ok()?;
        let plural = path.rsplit('/').nth(2)?;
        let mut state = self.state();
        let version = state.version + 1;
        let kind = state.kinds.get_mut(plural)?;
        let Some(text) = kind.objects.get_mut(&name_of(&applied)) else {
            return Some((NOT_FOUND, not_found()));
        };
        let mut object: Value = serde_json::from_str(text).ok()?;
        if applied["metadata"]["uid"] != object["metadata"]["uid"] {
            return Some((CONFLICT, failure(409, "Conflict")));
        }
        apply_conditions(&mut object, &applied);
        object["metadata"]["resourceVersion"] = version.to_string().into();
        *text = object.to_string().into();
        kind.log.push((version, "MODIFIED", text.clone()));
        state.version = version;
        self.0.1.notify_all();
        Some(("200 OK", object.to_string()))
    }

    /// Whether there are objects of the kind that a path is of.
    fn has(&self, path: &str) -> bool {
        let mut parts = path.trim_start_matches("/apis/").split('/');
        let group = parts.next().unwrap_or_default();
        if !CUSTOM.contains(&group) {
            return true;
        }
        let definition = format!("/{}.{group}", parts.next_back().unwrap_or_default());
        let state = self.state();
        let definitions = state.kinds.get("customresourcedefinitions");
        definitions.is_some_and(|all| all.objects.contains_key(&definition))
    }

    /// A page of a list. Pages are of different moments, but a watch from the first one's version tells of what changed.
    fn list(&self, kind: &str, query: &HashMap<&str, &str>) -> String {
        let number = |key: &str| query.get(key).and_then(|text| text.parse::<usize>().ok());
        let (first, limit) = (number("continue").unwrap_or(0), number("limit"));
        let state = self.state();
        let objects = state.kinds.get(kind).map(|kind| &kind.objects);
        let all = objects.map_or(0, BTreeMap::len);
        let end = limit.map_or(all, |limit| (first + limit).min(all));
        let page = objects.into_iter().flat_map(BTreeMap::values);
        let page: Vec<&str> = page
            .skip(first)
            .take(end - first)
            .map(|one| &**one)
            .collect();
        let mut metadata = json!({"resourceVersion": state.version.to_string()});
        if end < all {
            metadata["continue"] = end.to_string().into();
        }
        format!(
            "{{\"kind\":\"List\",\"apiVersion\":\"v1\",\"metadata\":{metadata},\"items\":[{}]}}",
            page.join(",")
        )
    }

    fn watch(&self, out: &mut TcpStream, kind: &str, from: u64) -> Option<()> {
        write!(
            out,
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        .ok()?;
        // Where to go on in the log.
        let mut next = None;
        loop {
            let mut state = self.state();
            let news: Vec<(&'static str, Arc<str>)> = loop {
                let log = state.kinds.get(kind).map_or(&[][..], |kind| &kind.log);
                let at = *next.get_or_insert_with(|| log.partition_point(|one| one.0 <= from));
                if at < log.len() {
                    let end = log.len().min(at + 1_000);
                    next = Some(end);
                    break log[at..end]
                        .iter()
                        .map(|one| (one.1, one.2.clone()))
                        .collect();
                }
                state = self
                    .0
                    .1
                    .wait_timeout(state, Duration::from_secs(5))
                    .unwrap()
                    .0;
            };
            drop(state);
            let mut piece = String::new();
            for (event, object) in news {
                piece.push_str(&format!("{{\"type\":\"{event}\",\"object\":{object}}}\n"));
            }
            write!(out, "{:x}\r\n{piece}\r\n", piece.len()).ok()?;
        }
    }
}
