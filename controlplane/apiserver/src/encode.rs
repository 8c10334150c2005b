//! Objects as stored bytes, and stored bytes as answers without decoding them.
//!
//! Stored objects begin `{"apiVersion":…,"kind":…,"metadata":{`, in this order, and have no resource version:
//! that is the store's revision, and is put in as they go out.

use bytes::{BufMut, Bytes, BytesMut};
use serde_json::Value;
use serde_json::value::RawValue;
use xebec_schema::Object;
use xebec_schema::table::Resource;
use xebec_store::{KeyValue, Revision};

/// The stored form.
pub(crate) fn store(object: &Object) -> Bytes {
    let mut out = BytesMut::with_capacity(1024).writer();
    let mut write = || -> Result<(), serde_json::Error> {
        use std::io::Write;
        let mut first = true;
        let leading = ["apiVersion", "kind", "metadata"];
        let map = object.as_object();
        let rest = map
            .into_iter()
            .flatten()
            .map(|(key, _)| key.as_str())
            .filter(|key| !leading.contains(key));
        for key in leading.into_iter().chain(rest) {
            let Some(value) = object.get(key) else {
                continue;
            };
            out.write_all(if first { b"{" } else { b"," })
                .map_err(serde_json::Error::io)?;
            first = false;
            serde_json::to_writer(&mut out, key)?;
            out.write_all(b":").map_err(serde_json::Error::io)?;
            if key == "metadata" && value.get("resourceVersion").is_some() {
                let mut metadata = value.clone();
                if let Some(metadata) = metadata.as_object_mut() {
                    metadata.remove("resourceVersion");
                }
                serde_json::to_writer(&mut out, &metadata)?;
            } else {
                serde_json::to_writer(&mut out, value)?;
            }
        }
        out.write_all(if first { b"{}" } else { b"}" })
            .map_err(serde_json::Error::io)
    };
    // Writing JSON into memory can't fail: every key is a string.
    write().expect("a JSON value is written to memory");
    out.into_inner().freeze()
}

/// Where `resourceVersion` goes: behind the metadata's opening brace, which is the first of its kind by the stored order.
fn metadata_at(stored: &[u8]) -> Option<usize> {
    const MARK: &[u8] = b"\"metadata\":{";
    stored
        .windows(MARK.len())
        .position(|window| window == MARK)
        .map(|at| at + MARK.len())
}

/// An object as it goes out.
pub(crate) fn with_revision(stored: &[u8], revision: Revision) -> Bytes {
    let mut out = BytesMut::with_capacity(stored.len() + 48);
    push_with_revision(&mut out, stored, revision);
    out.freeze()
}

fn push_with_revision(out: &mut BytesMut, stored: &[u8], revision: Revision) {
    let Some(at) = metadata_at(stored) else {
        out.extend_from_slice(stored);
        return;
    };
    out.extend_from_slice(&stored[..at]);
    out.extend_from_slice(format!("\"resourceVersion\":\"{revision}\"").as_bytes());
    if stored.get(at) != Some(&b'}') {
        out.put_u8(b',');
    }
    out.extend_from_slice(&stored[at..]);
}

/// An object's `meta.k8s.io/v1` PartialObjectMetadata as it goes out; `None` if the object can't be read.
pub(crate) fn partial(stored: &[u8], revision: Revision) -> Option<Bytes> {
    let parts: std::collections::BTreeMap<&str, &RawValue> = serde_json::from_slice(stored).ok()?;
    let metadata = parts.get("metadata")?;
    let object = format!(
        "{{\"apiVersion\":\"meta.k8s.io/v1\",\"kind\":\"PartialObjectMetadata\",\"metadata\":{metadata}}}"
    );
    Some(with_revision(object.as_bytes(), revision))
}

/// An object as a value, with its resource version.
pub(crate) fn parse(kv: &KeyValue) -> Result<Object, serde_json::Error> {
    let mut object: Object = serde_json::from_slice(&kv.value)?;
    object["metadata"]["resourceVersion"] = kv.mod_revision.to_string().into();
    Ok(object)
}

/// The head of a list up to its items.
pub(crate) struct ListHead<'a> {
    pub resource: &'a Resource,
    pub revision: Revision,
    pub next: Option<String>,
    pub remaining: Option<usize>,
}

/// A list of stored objects; items do not repeat their kind, as the real server's do not.
pub(crate) fn list<'a>(head: &ListHead<'_>, items: impl Iterator<Item = &'a KeyValue>) -> Bytes {
    let mut out = BytesMut::new();
    let mut metadata = serde_json::json!({"resourceVersion": head.revision.to_string()});
    if let Some(next) = &head.next {
        metadata["continue"] = next.clone().into();
        if let Some(remaining) = head.remaining {
            metadata["remainingItemCount"] = remaining.into();
        }
    }
    let text = format!(
        "{{\"kind\":\"{}\",\"apiVersion\":\"{}\",\"metadata\":{metadata},\"items\":[",
        head.resource.list_kind(),
        head.resource.api_version()
    );
    out.extend_from_slice(text.as_bytes());
    let prefix = format!(
        "{{\"apiVersion\":\"{}\",\"kind\":\"{}\",",
        head.resource.api_version(),
        head.resource.kind
    );
    for (index, kv) in items.enumerate() {
        if index > 0 {
            out.put_u8(b',');
        }
        match kv.value.strip_prefix(prefix.as_bytes()) {
            Some(rest) => {
                out.put_u8(b'{');
                push_with_revision(&mut out, rest, kv.mod_revision);
            }
            None => push_with_revision(&mut out, &kv.value, kv.mod_revision),
        }
    }
    out.extend_from_slice(b"]}\n");
    out.freeze()
}

/// One watch event around an object that is encoded already.
pub(crate) fn event(kind: &str, object: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(object.len() + 40);
    out.extend_from_slice(b"{\"type\":\"");
    out.extend_from_slice(kind.as_bytes());
    out.extend_from_slice(b"\",\"object\":");
    out.extend_from_slice(object);
    out.extend_from_slice(b"}\n");
    out.freeze()
}

/// A value in JSON or YAML.
pub(crate) fn value(value: &Value, yaml: bool) -> Bytes {
    if yaml {
        return serde_yaml_ng::to_string(value).unwrap_or_default().into();
    }
    // Writing JSON into memory can't fail: every key is a string.
    let mut text = serde_json::to_vec(value).expect("a JSON value is written to memory");
    text.push(b'\n');
    text.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_revision_goes_in_and_out_without_decoding() {
        let object = json!({
            "apiVersion": "v1", "kind": "ConfigMap", "data": {"x": "\"metadata\":{"},
            "metadata": {"name": "a", "resourceVersion": "9"},
        });
        let stored = store(&object);
        assert!(
            stored.starts_with(
                b"{\"apiVersion\":\"v1\",\"kind\":\"ConfigMap\",\"metadata\":{\"name\""
            )
        );
        let out: Value = serde_json::from_slice(&with_revision(&stored, 42)).unwrap();
        assert_eq!(
            out["metadata"],
            json!({"name": "a", "resourceVersion": "42"})
        );
        assert_eq!(out["data"], object["data"]);
        let partial: Value = serde_json::from_slice(&partial(&stored, 42).unwrap()).unwrap();
        assert_eq!(
            partial,
            xebec_schema::convert::partial_metadata(&out),
            "as from the decoded object"
        );
    }
}
