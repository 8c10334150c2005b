//! JSON patches (RFC 6902), as forgiving as the real server: `replace` and `copy` take a missing key, indices may count
//! from the end, and a missing value is null.

use serde_json::Value;

use super::PatchError;
use crate::Object;

/// Operations that one patch may have.
const MOST_OPERATIONS: usize = 10_000;

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
    for operation in operations {
        apply(&mut result, operation).ok_or_else(rejected)?;
    }
    Ok(result)
}

fn rejected() -> PatchError {
    PatchError::Unprocessable(
        "the server rejected our request due to an error in our request".into(),
    )
}

/// One operation; none where it does not fit.
fn apply(object: &mut Value, operation: &Value) -> Option<()> {
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
            add(object, path?, value)
        }
        "test" => (read(object, path?)? == value()).then_some(()),
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
fn read(object: &mut Value, pointer: &str) -> Option<Value> {
    if pointer.is_empty() {
        return Some(object.clone());
    }
    let (container, last) = parent(object, pointer)?;
    match container {
        Value::Object(map) => Some(map.get(&last).cloned().unwrap_or(Value::Null)),
        Value::Array(items) => items.get(index(&last, items.len())?).cloned(),
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
