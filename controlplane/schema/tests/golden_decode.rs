//! Decodes recorded request bodies and compares the errors and warnings with the recorded answers.
//!
//! Skipped with a line where the recordings are not there.

use std::path::Path;

use serde_json::Value;
use xebec_schema::decode::{self, FieldValidation, Media};
use xebec_schema::table::{self, Resource};

/// Steps that agree at least; only ever raised.
const FLOOR: usize = 167;

/// The resource of a collection's path.
fn resource(path: &str) -> Option<&'static Resource> {
    let mut parts = path.trim_start_matches('/').split('/');
    let group = if parts.next()? == "api" {
        ""
    } else {
        parts.next()?
    };
    let version = parts.next()?;
    let rest: Vec<&str> = parts.collect();
    match rest.as_slice() {
        ["namespaces", _, plural] | [plural] => table::resource(group, version, plural),
        _ => None,
    }
}

#[test]
fn errors_and_warnings_are_the_real_servers() {
    let folder = Path::new("../../../shared/golden/recorded");
    let Ok(areas) = std::fs::read_dir(folder) else {
        println!("skipped: no recordings");
        return;
    };
    let mut paths: Vec<_> = areas
        .flatten()
        .filter_map(|area| std::fs::read_dir(area.path()).ok())
        .flat_map(|files| files.flatten().map(|file| file.path()))
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "yaml")
        })
        .collect();
    paths.sort();
    let (mut passed, mut failed) = (0, Vec::new());
    for path in &paths {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let Ok(scenario) = serde_yaml_ng::from_slice::<Value>(&std::fs::read(path).unwrap()) else {
            continue;
        };
        let Ok(recorded) = std::fs::read(path.with_extension("json")) else {
            continue;
        };
        let recorded: Value = serde_json::from_slice(&recorded).unwrap();
        for (at, step) in scenario["steps"]
            .as_array()
            .into_iter()
            .flatten()
            .enumerate()
        {
            let answer = &recorded[&name][at];
            let Some(resource) = step["path"]
                .as_str()
                .and_then(resource)
                .filter(|_| step["method"] == "POST")
            else {
                continue;
            };
            if step.get("body").is_none()
                || step["body"]
                    .as_str()
                    .is_some_and(|text| text.contains("${"))
            {
                continue;
            }
            let body = step["body"]
                .as_str()
                .map_or_else(|| step["body"].to_string(), str::to_owned);
            let media = match step["headers"]["Content-Type"].as_str() {
                None | Some("application/json") => Media::Json,
                Some("application/yaml") => Media::Yaml,
                Some(_) => continue,
            };
            let validation = match step["query"]["fieldValidation"].as_str() {
                Some("Strict") => FieldValidation::Strict,
                Some("Ignore") => FieldValidation::Ignore,
                _ => FieldValidation::Warn,
            };
            let message = answer["body"]["message"].as_str().unwrap_or_default();
            let lead = format!(
                "{} in version {:?} cannot be handled as a {}: ",
                resource.kind, resource.version, resource.kind
            );
            let theirs = message.strip_prefix(&lead);
            let warned = answer["headers"]["Warning"].to_string();
            let agrees = match (
                decode::decode(body.as_bytes(), media, resource.type_id, validation),
                theirs,
            ) {
                (Err(error), Some(theirs)) if error.0 == theirs => true,
                (Err(error), Some(theirs)) => {
                    failed.push(format!(
                        "{name} step {at}:\n  ours   {error}\n  theirs {theirs}"
                    ));
                    false
                }
                (Ok(decoded), Some(theirs)) => {
                    failed.push(format!(
                        "{name} step {at}:\n  ours   decoded {:?}\n  theirs {theirs}",
                        decoded.warnings
                    ));
                    false
                }
                (Err(error), None)
                    if answer["status"]
                        .as_u64()
                        .is_some_and(|code| code < 300 || code == 422) =>
                {
                    failed.push(format!(
                        "{name} step {at}:\n  ours   {error}\n  theirs {message}"
                    ));
                    false
                }
                (Err(_), None) => continue,
                (Ok(decoded), None)
                    if answer["status"].as_u64().is_none_or(|code| code >= 300)
                        || decoded.warnings.is_empty() =>
                {
                    continue;
                }
                (Ok(decoded), None) => {
                    let quoted = |text: &String| {
                        warned.contains(
                            &serde_json::to_string(text)
                                .unwrap_or_default()
                                .trim_matches('"')
                                .replace('\\', "\\\\"),
                        ) || warned.replace('\\', "").contains(&text.replace('\\', ""))
                    };
                    let all = decoded.warnings.iter().all(quoted);
                    if !all {
                        failed.push(format!(
                            "{name} step {at}:\n  ours   {:?}\n  theirs {warned}",
                            decoded.warnings
                        ));
                    }
                    all
                }
            };
            passed += usize::from(agrees);
        }
    }
    println!(
        "{passed} steps agree, {} differ\n{}",
        failed.len(),
        failed.join("\n")
    );
    assert!(passed >= FLOOR, "{passed} steps agree; it has been {FLOOR}");
}
