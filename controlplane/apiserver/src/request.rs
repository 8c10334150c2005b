//! What a request is about: verb, resource, namespace, name, subresource, and its query.

use http::Method;
use xebec_schema::table::{self, Resource};

/// A request for a resource.
#[derive(Debug)]
pub(crate) struct ResourceRequest {
    pub resource: &'static Resource,
    pub namespace: Option<String>,
    pub name: Option<String>,
    pub subresource: Option<String>,
    pub verb: &'static str,
}

/// Decoded `key=value` pairs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    pub(crate) fn parse(query: Option<&str>) -> Self {
        let pairs = query
            .unwrap_or_default()
            .split('&')
            .filter(|pair| !pair.is_empty());
        Self(
            pairs
                .map(|pair| {
                    pair.split_once('=')
                        .map_or((unescape(pair), String::new()), |(k, v)| {
                            (unescape(k), unescape(v))
                        })
                })
                .collect(),
        )
    }

    /// The first value of this key, unless it is empty.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(name, _)| name == key)
            .map(|(_, value)| value.as_str())
            .filter(|value| !value.is_empty())
    }

    /// All values of this key.
    pub(crate) fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.0
            .iter()
            .filter(move |(name, _)| name == key)
            .map(|(_, value)| value.as_str())
    }

    pub(crate) fn flag(&self, key: &str) -> bool {
        self.0
            .iter()
            .find(|(name, _)| name == key)
            .is_some_and(|(_, value)| !matches!(value.to_ascii_lowercase().as_str(), "false" | "0"))
    }
}

fn unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let hex = || {
            std::str::from_utf8(bytes.get(at + 1..at + 3)?)
                .ok()
                .and_then(|hex| u8::from_str_radix(hex, 16).ok())
        };
        match bytes[at] {
            b'+' => out.push(b' '),
            b'%' => match hex() {
                Some(byte) => {
                    out.push(byte);
                    at += 2;
                }
                None => out.push(b'%'),
            },
            byte => out.push(byte),
        }
        at += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Reads a path below `/api` or `/apis`; none where it is no resource that is served.
pub(crate) fn parse(method: &Method, path: &str, query: &Query) -> Option<ResourceRequest> {
    // As a server sees it whose library decodes the path first: an escaped slash is one.
    let path = unescape(&path.replace('+', "%2B"));
    let path = path.strip_prefix('/')?;
    let mut parts = path.strip_suffix('/').unwrap_or(path).split('/');
    let (group, version) = match parts.next()? {
        "api" => ("", parts.next()?),
        "apis" => (parts.next()?, parts.next()?),
        _ => return None,
    };
    let rest: Vec<&str> = parts.collect();
    let watch_prefix = rest.first() == Some(&"watch");
    let rest = if watch_prefix { &rest[1..] } else { &rest[..] };
    let (namespace, rest) = match rest {
        // `namespaces/x`, `namespaces/x/status` and `namespaces/x/finalize` are about the namespace itself.
        // No name at all: every namespace.
        ["namespaces", "", tail @ ..] if !tail.is_empty() => (None, tail),
        ["namespaces", name, tail @ ..] if !matches!(tail, [] | ["status" | "finalize"]) => {
            (Some((*name).to_owned()), tail)
        }
        other => (None, other),
    };
    let resource = table::resource(group, version, rest.first()?)?;
    if rest.iter().any(|part| part.is_empty())
        || namespace.is_some() && !resource.namespaced
        || rest.len() > 3
    {
        // `proxy` takes the rest of the path; nothing else has more parts.
        return None;
    }
    let name = rest.get(1).map(|name| (*name).to_owned());
    let subresource = rest.get(2).map(|sub| (*sub).to_owned());
    if let Some(sub) = &subresource {
        resource.subresource(sub)?;
    }
    let watching = watch_prefix || query.flag("watch");
    let verb = match (method.as_str(), &name) {
        ("GET" | "HEAD", None) if watching => "watch",
        ("GET" | "HEAD", None) => "list",
        ("GET" | "HEAD", Some(_)) if watch_prefix => "watch",
        ("GET" | "HEAD", Some(_)) => "get",
        ("POST", _) => "create",
        ("PUT", Some(_)) => "update",
        ("PATCH", Some(_)) => "patch",
        ("DELETE", Some(_)) => "delete",
        ("DELETE", None) => "deletecollection",
        _ => "",
    };
    Some(ResourceRequest {
        resource,
        namespace,
        name,
        subresource,
        verb,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[allow(
        clippy::type_complexity,
        reason = "a tuple to compare with, used in this test only"
    )]
    fn read(
        method: &str,
        path: &str,
        query: &str,
    ) -> Option<(
        String,
        Option<String>,
        Option<String>,
        Option<String>,
        &'static str,
    )> {
        let request = parse(&method.parse().unwrap(), path, &Query::parse(Some(query)))?;
        Some((
            request.resource.qualified(),
            request.namespace,
            request.name,
            request.subresource,
            request.verb,
        ))
    }

    #[test]
    fn paths() {
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(
            read("GET", "/api/v1/namespaces/x/pods/p/log", ""),
            Some(("pods".into(), some("x"), some("p"), some("log"), "get"))
        );
        assert_eq!(
            read("GET", "/api/v1/pods", "watch=true"),
            Some(("pods".into(), None, None, None, "watch"))
        );
        assert_eq!(
            read("PUT", "/api/v1/namespaces/x/finalize", ""),
            Some((
                "namespaces".into(),
                None,
                some("x"),
                some("finalize"),
                "update"
            ))
        );
        assert_eq!(
            read("DELETE", "/apis/apps/v1/namespaces/x/deployments", ""),
            Some((
                "deployments.apps".into(),
                some("x"),
                None,
                None,
                "deletecollection"
            ))
        );
        assert_eq!(read("GET", "/apis/apps/v1/nosuch", ""), None);
        assert_eq!(read("GET", "/api/v1/namespaces/x/nodes", ""), None);
        assert_eq!(read("GET", "/api/v1/namespaces/x/pods/p/nosuch", ""), None);
    }

    #[test]
    fn queries_are_unescaped() {
        let query = Query::parse(Some("labelSelector=a%20in+%28b%29&x=%zz&watch"));
        assert_eq!(query.get("labelSelector"), Some("a in (b)"));
        assert_eq!(query.get("x"), Some("%zz"));
        assert!(query.flag("watch"));
    }
}
