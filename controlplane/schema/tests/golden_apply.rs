//! Replays recorded requests (creates, patches, applies) without a server and compares who owns which field.
//!
//! Skipped with a line where the recordings are not there.

#![allow(
    clippy::unwrap_used,
    reason = "a recording that can't be read is a failed test"
)]

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Value, json};
use xebec_schema::apply::{ApplyError, ApplyOptions, apply, track_update};
use xebec_schema::decode::{self, FieldValidation, Media};
use xebec_schema::table::{self, Resource};
use xebec_schema::{Object, defaults, patch, strategy};

const NOW: &str = "2026-01-01T00:00:00Z";

/// Steps whose answers agree at least; only ever raised.
const FLOORS: &[(&str, usize)] = &[("apply", 83), ("lifecycle", 64), ("patch", 78)];

struct Target {
    resource: &'static Resource,
    name: Option<String>,
    subresource: String,
}

fn target(path: &str) -> Option<Target> {
    let mut parts = path.trim_start_matches('/').split('/').peekable();
    let group = if parts.next()? == "api" {
        ""
    } else {
        parts.next()?
    };
    let version = parts.next()?;
    let mut plural = parts.next()?;
    if plural == "namespaces" && path.matches('/').count() > 4 {
        parts.next()?;
        plural = parts.next()?;
    }
    let resource = table::resource(group, version, plural)?;
    Some(Target {
        resource,
        name: parts.next().map(str::to_owned),
        subresource: parts.next().unwrap_or_default().to_owned(),
    })
}

/// One request's answer: the object, or the message of a conflict. `None`: not something that needs no server.
fn run(step: &Value, stored: &mut HashMap<String, Object>) -> Option<Result<Object, String>> {
    let path = step["path"].as_str()?;
    if step.get("bodyFrom").is_some() {
        return None;
    }
    let target = target(path)?;
    if !matches!(target.subresource.as_str(), "" | "status") {
        return None;
    }
    let resource = target.resource;
    if step["method"] == "DELETE" && step["body"].is_null() {
        let key = format!("{}/{}/{}", resource.group, resource.plural, target.name?);
        return stored.remove(&key).map(Ok);
    }
    let body = match &step["body"] {
        Value::String(text) => text.clone(),
        body => body.to_string(),
    };
    let method = step["method"].as_str()?;
    let media = step["headers"]["Content-Type"]
        .as_str()
        .unwrap_or("application/json");
    let (yaml, ty) = (media.ends_with("yaml"), resource.type_id);
    let parse = || {
        let media = if yaml { Media::Yaml } else { Media::Json };
        decode::decode(body.as_bytes(), media, ty, FieldValidation::Ignore)
            .ok()
            .map(|decoded| decoded.object)
    };
    let name = match &target.name {
        Some(name) => name.clone(),
        None => parse()?["metadata"]["name"].as_str()?.to_owned(),
    };
    let key = format!("{}/{}/{name}", resource.group, resource.plural);
    let live = stored.get(&key).cloned();
    let force = step["query"]["force"] == "true" || step["query"]["force"] == true;
    let options = ApplyOptions {
        manager: step["query"]["fieldManager"]
            .as_str()
            .unwrap_or("golden-replay"),
        force,
        api_version: &resource.api_version(),
        subresource: &target.subresource,
        now: NOW,
    };
    let finish = |mut object: Object, track: bool| {
        if decode::conform(&mut object, ty).is_err() {
            return Value::Null;
        }
        defaults::set_defaults(resource, &mut object);
        if track {
            track_update(live.as_ref(), &mut object, ty, &options);
        }
        match (&live, target.subresource.as_str()) {
            (Some(live), "") => strategy::prepare_for_update(resource, live, &mut object),
            (Some(live), _) => strategy::prepare_for_status_update(resource, live, &mut object),
            (None, _) => strategy::prepare_for_create(resource, &mut object),
        }
        object
    };
    let object = match (method, media) {
        ("POST", _) => finish(parse()?, true),
        ("PUT", _) => finish(parse()?, true),
        ("PATCH", "application/apply-patch+yaml") => {
            match apply(live.as_ref(), &parse()?, ty, &options) {
                Ok(object) => finish(object, false),
                Err(error @ ApplyError::Conflicts(_)) => return Some(Err(error.to_string())),
                Err(ApplyError::Invalid(_)) => return None,
            }
        }
        ("PATCH", "application/merge-patch+json") => finish(
            patch::merge_patch(live.as_ref()?, body.as_bytes()).ok()?,
            true,
        ),
        ("PATCH", "application/strategic-merge-patch+json") => finish(
            patch::strategic_merge_patch(live.as_ref()?, body.as_bytes(), ty).ok()?,
            true,
        ),
        ("PATCH", "application/json-patch+json") => finish(
            patch::json_patch(live.as_ref()?, body.as_bytes()).ok()?,
            true,
        ),
        _ => return None,
    };
    if step["query"].get("dryRun").is_none() {
        stored.insert(key, object.clone());
    }
    Some(Ok(object))
}

/// Owners without the time's value.
fn owners(object: &Object) -> Value {
    let mut fields = object["metadata"]["managedFields"].clone();
    for entry in fields.as_array_mut().into_iter().flatten() {
        if let Some(time) = entry.get_mut("time") {
            *time = json!("<time>");
        }
    }
    fields
}

fn replay(area: &str) {
    let folder = Path::new("../../../shared/golden/recorded").join(area);
    let Ok(entries) = std::fs::read_dir(&folder) else {
        println!("skipped: no recordings of {area}");
        return;
    };
    let (mut passed, mut failed) = (0, Vec::new());
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths.iter().filter(|path| {
        path.extension()
            .is_some_and(|extension| extension == "yaml")
    }) {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let scenario: Value = serde_yaml_ng::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let recorded: Value =
            serde_json::from_slice(&std::fs::read(path.with_extension("json")).unwrap()).unwrap();
        let answers = &recorded[&name];
        let mut stored = HashMap::new();
        for (at, step) in scenario["steps"]
            .as_array()
            .into_iter()
            .flatten()
            .enumerate()
        {
            let answer = &answers[at];
            let refused = answer["status"]
                .as_u64()
                .is_none_or(|code| code >= 400 && code != 409);
            if step["method"] == "GET" {
                continue;
            }
            // What a server refuses for other reasons, and what needs one, ends the scenario.
            let Some(result) = (!refused).then(|| run(step, &mut stored)).flatten() else {
                break;
            };
            let agrees = match &result {
                Err(message) => answer["body"]["message"] == message.as_str(),
                Ok(object) => {
                    answer["status"] != 409
                        && owners(object) == owners(&answer["body"])
                        && ["data", "spec"]
                            .iter()
                            .all(|key| area != "apply" || object[key] == answer["body"][key])
                }
            };
            if agrees {
                passed += 1;
            } else {
                let (ours, theirs) = match result {
                    Err(message) => (Value::from(message), answer["body"]["message"].clone()),
                    Ok(object) if owners(&object) == owners(&answer["body"]) => {
                        (object["spec"].clone(), answer["body"]["spec"].clone())
                    }
                    Ok(object) => (owners(&object), owners(&answer["body"])),
                };
                failed.push(format!(
                    "{area}/{name} step {at}:\n  ours   {ours}\n  theirs {theirs}"
                ));
                break;
            }
        }
    }
    println!(
        "{area}: {passed} steps agree, {} scenarios differ\n{}",
        failed.len(),
        failed.join("\n")
    );
    let floor = FLOORS
        .iter()
        .find(|(one, _)| *one == area)
        .map_or(0, |(_, floor)| *floor);
    assert!(
        passed >= floor,
        "{passed} steps of {area} agree; it has been {floor}"
    );
}

#[test]
fn applies() {
    replay("apply");
}

#[test]
fn lifecycles() {
    replay("lifecycle");
}

#[test]
fn patches() {
    replay("patch");
}
