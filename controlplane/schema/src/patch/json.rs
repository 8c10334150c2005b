//! JSON patches (RFC 6902), as forgiving as the real server: `replace` and `copy` take a missing key, indices may count
//! from the end, and a missing value is null.

use serde_json::Value;

use super::PatchError;
use crate::Object;

/// Operations that one patch may have.
const MOST_OPERATIONS: usize = 10_000;
/// Bytes by which all copies of one patch may make an object larger: each could double it.
const MOST_COPIED: usize = 3 * 1024 * 1024;

/// Applies a JSON patch.
pub fn json_patch(object: &Object, patch: &[u8]) -> Result<Object, PatchError> {
    let operations = super::parse(patch)?;
    let Some(operations) = operations.as_array() else {
        return Err(PatchError::Malformed(format!(
            "error decoding patch: json: cannot unmarshal {} into Go value of type jsonpatch.Patch",
            super::json_kind(&operations)
        )));
    };
    if operations.len() > MOST_OPERATIONS {
        return Err(PatchError::TooLarge(format!(
            "The allowed maximum operations in a JSON patch is {MOST_OPERATIONS}, got {}",
            operations.len()
        )));
    }
    let mut result = object.clone();
    let mut copied = 0;
    for operation in operations {
        apply(&mut result, operation, &mut copied).ok_or_else(rejected)?;
    }
    Ok(result)
}

static NULL: Value = Value::Null;

fn rejected() -> PatchError {
    PatchError::Unprocessable(
        "the server rejected our request due to an error in our request".into(),
    )
}

/// Roughly the bytes of a value.
fn weight(value: &Value) -> usize {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 8,
        Value::String(text) => text.len() + 8,
        Value::Array(items) => items.iter().map(weight).sum::<usize>() + 8,
        Value::Object(map) => {
            let entries = map.iter().map(|(key, value)| key.len() + 8 + weight(value));
            entries.sum::<usize>() + 8
        }
    }
}

/// One operation; none where it does not fit. `copied`: what was copied before.
fn apply(object: &mut Value, operation: &Value, copied: &mut usize) -> Option<()> {
    let value = || operation.get("value").cloned().unwrap_or(Value::Null);
    let path = operation["path"].as_str();
    let from = operation["from"].as_str();
    match operation["op"].as_str()? {
        "add" => add(object, path?, value()),
        "remove" => remove(object, path?).map(drop),
        "replace" => replace(object, path?, value()),
        "move" => {
            let value = remove(object, from?)?;
            add(object, path?, value)
        }
        "copy" => {
            let value = read(object, from?)?;
            *copied += weight(value);
            let value = (*copied <= MOST_COPIED).then(|| value.clone())?;
            add(object, path?, value)
        }
        "test" => (read(object, path?)? == operation.get("value").unwrap_or(&NULL)).then_some(()),
        _ => None,
    }
}

/// The container that a pointer's last part is in, and that part.
fn parent<'a>(object: &'a mut Value, pointer: &str) -> Option<(&'a mut Value, String)> {
    let (way, last) = pointer.rsplit_once('/')?;
    let mut current = object;
    for part in way.split('/').skip(1) {
        let part = unescape(part);
        current = match current {
            Value::Object(map) => map.get_mut(&part)?,
            Value::Array(items) => {
                let at = index(&part, items.len())?;
                items.get_mut(at)?
            }
            _ => return None,
        };
    }
    Some((current, unescape(last)))
}

fn unescape(part: &str) -> String {
    part.replace("~1", "/").replace("~0", "~")
}

/// An index, counted from the end where it is negative.
fn index(text: &str, length: usize) -> Option<usize> {
    let number: i64 = text.parse().ok()?;
    let number = if number < 0 {
        number + i64::try_from(length).ok()?
    } else {
        number
    };
    usize::try_from(number).ok()
}

/// The value there; a key that a map does not have is null.
fn read<'a>(object: &'a mut Value, pointer: &str) -> Option<&'a Value> {
    if pointer.is_empty() {
        return Some(object);
    }
    let (container, last) = parent(object, pointer)?;
    match container {
        Value::Object(map) => Some(map.get(&last).unwrap_or(&NULL)),
        Value::Array(items) => items.get(index(&last, items.len())?),
        _ => None,
    }
}

fn add(object: &mut Value, pointer: &str, value: Value) -> Option<()> {
    if pointer.is_empty() {
        *object = value;
        return Some(());
    }
    let (container, last) = parent(object, pointer)?;
    match container {
        Value::Object(map) => {
            map.insert(last, value);
        }
        Value::Array(items) if last == "-" => items.push(value),
        Value::Array(items) => {
            let at = index(&last, items.len() + 1).filter(|at| *at <= items.len())?;
            items.insert(at, value);
        }
        _ => return None,
    }
    Some(())
}

fn remove(object: &mut Value, pointer: &str) -> Option<Value> {
    let (container, last) = parent(object, pointer)?;
    match container {
        Value::Object(map) => map.remove(&last),
        Value::Array(items) => {
            let at = index(&last, items.len()).filter(|at| *at < items.len())?;
            Some(items.remove(at))
        }
        _ => None,
    }
}

fn replace(object: &mut Value, pointer: &str, value: Value) -> Option<()> {
    if pointer.is_empty() {
        *object = value;
        return Some(());
    }
    let (container, last) = parent(object, pointer)?;
    match container {
        Value::Object(map) => {
            map.insert(last, value);
        }
        Value::Array(items) => {
            let at = index(&last, items.len())?;
            *items.get_mut(at)? = value;
        }
        _ => return None,
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn patched(operation: Value) -> Result<Value, PatchError> {
        let object = json!({"a": [1, 2], "b": {"c": 1, "~/": 5}});
        json_patch(&object, json!([operation]).to_string().as_bytes())
    }

    #[test]
    fn copies_cannot_double_an_object_without_end() {
        let copy = |from: &str, path: &str| json!({"op": "copy", "from": from, "path": path});
        let mut patch = vec![json!({"op": "add", "path": "/d", "value": {"a": "x".repeat(1000)}})];
        patch.extend((0..60).map(|number| copy("/d", &format!("/d/{number}"))));
        let refused = json_patch(&json!({}), json!(patch).to_string().as_bytes());
        assert_eq!(refused.unwrap_err(), rejected());
        let few = &patch[..5];
        assert!(json_patch(&json!({}), json!(few).to_string().as_bytes()).is_ok());
    }

    #[test]
    fn operations() {
        let a = |operation: Value| patched(operation).unwrap()["a"].clone();
        assert_eq!(
            a(json!({"op": "add", "path": "/a/1", "value": 9})),
            json!([1, 9, 2])
        );
        assert_eq!(
            a(json!({"op": "add", "path": "/a/-", "value": 9})),
            json!([1, 2, 9])
        );
        assert_eq!(a(json!({"op": "remove", "path": "/a/-1"})), json!([1]));
        assert_eq!(
            a(json!({"op": "move", "from": "/b/c", "path": "/a/0"})),
            json!([1, 1, 2])
        );
        assert_eq!(
            a(json!({"op": "copy", "from": "/b/~0~1", "path": "/a"})),
            json!(5)
        );
        assert_eq!(
            a(json!({"op": "copy", "from": "/b/x", "path": "/a"})),
            json!(null)
        );
        assert_eq!(a(json!({"op": "add", "path": "/a"})), json!(null));
        let replaced = patched(json!({"op": "replace", "path": "/b/new", "value": 1}));
        assert_eq!(replaced.unwrap()["b"]["new"], 1);
        assert!(patched(json!({"op": "test", "path": "/b/c", "value": 1})).is_ok());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for operation in [
            json!({"op": "test", "path": "/b/c", "value": 2}),
            json!({"op": "add", "path": "/a/7", "value": 2}),
            json!({"op": "add", "path": "/a/x", "value": 2}),
            json!({"op": "replace", "path": "/a/2", "value": 2}),
            json!({"op": "remove", "path": "/b/x"}),
            json!({"op": "move", "from": "/b/x", "path": "/b/y"}),
            json!({"op": "add", "path": "/x/y", "value": 2}),
            json!({"op": "explode", "path": "/b"}),
            json!({"path": "/b"}),
            json!({"op": "remove", "path": ""}),
        ] {
            let error = patched(operation.clone());
            assert!(
                matches!(error, Err(PatchError::Unprocessable(_))),
                "{operation}"
            );
        }
        assert!(matches!(
            json_patch(&json!({}), b"{}"),
            Err(PatchError::Malformed(_))
        ));
    }
}
