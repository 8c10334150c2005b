//! Replays what was recorded of a real API server against this one, and holds the number of scenarios that agree.
//!
//! The recordings are found by `XEBEC_GOLDEN`, or as `../shared/golden` beside the workspace; without them there is
//! nothing to compare and the test says so. `XEBEC_GOLDEN_ONLY=<regex over area/name>` plays a part and prints all
//! of its differences; the floor is not asked then.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

#[path = "golden/normalise.rs"]
mod normalise;
#[path = "golden/scenario.rs"]
mod scenario;
#[path = "support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use regex::Regex;
use serde::Deserialize;
use serde_json::Value;
use xebec_apiserver::Config;

/// How many scenarios of each group agree at least. It may only be raised.
const FLOOR: &[(&str, usize)] = &[
    ("apply", 31),
    ("create", 112),
    ("discovery", 18),
    ("lifecycle", 46),
    ("list", 40),
    ("partial", 35),
    ("patch", 39),
    ("request", 8),
    ("semantics", 22),
    ("table", 43),
    ("validation", 264),
    ("watch", 8),
];
/// Lines of differences that are shown of one scenario, and of one group.
const SHOWN: (usize, usize) = (12, 60);

fn golden() -> Option<PathBuf> {
    let directory = match std::env::var_os("XEBEC_GOLDEN") {
        Some(given) => PathBuf::from(given),
        // Tests run in their package's folder.
        None => PathBuf::from("../../../shared/golden"),
    };
    let recorded = directory.join("recorded");
    recorded.is_dir().then_some(recorded)
}

/// The differences of two values, one line each.
fn differences(recorded: &Value, got: &Value, at: &str, out: &mut Vec<String>) {
    match (recorded, got) {
        (Value::Object(a), Value::Object(b)) => {
            let keys: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for key in keys {
                let at = format!("{at}/{key}");
                match (a.get(key), b.get(key)) {
                    (Some(a), Some(b)) => differences(a, b, &at, out),
                    (Some(a), None) => out.push(format!("{at}: missing {a}")),
                    (None, Some(b)) => out.push(format!("{at}: unexpected {b}")),
                    (None, None) => {}
                }
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (index, (a, b)) in a.iter().zip(b).enumerate() {
                differences(a, b, &format!("{at}/{index}"), out);
            }
        }
        _ if recorded == got => {}
        (Value::Number(a), Value::Number(b)) if a.as_f64() == b.as_f64() => {}
        _ => out.push(format!(
            "{at}:\n        recorded {recorded}\n        got      {got}"
        )),
    }
}

/// Every scenario of a group with its recording, by name.
fn scenarios(group: &Path) -> Vec<(Value, Value)> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(group)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "yaml"))
        .collect();
    files.sort();
    let mut all = Vec::new();
    let fingerprint = Regex::new(normalise::FINGERPRINT).unwrap();
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        let Ok(recording) = std::fs::read_to_string(file.with_extension("json")) else {
            continue;
        };
        let recording = fingerprint.replace_all(&recording, "X509SHA256=<fingerprint>");
        let recording: Value = serde_json::from_str(&recording).unwrap();
        for document in serde_yaml_ng::Deserializer::from_str(&text) {
            let mut yaml = serde_yaml_ng::Value::deserialize(document).unwrap();
            yaml.apply_merge().unwrap();
            let scenario: Value = serde_json::to_value(yaml).unwrap();
            let name = scenario["name"].as_str().unwrap_or_default();
            if let Some(recorded) = recording.get(name) {
                all.push((scenario.clone(), recorded.clone()));
            }
        }
    }
    all
}

/// Plays a group against a server of its own: how many agree, of how many, and the differences of the others.
async fn group(directory: PathBuf, only: Option<Regex>) -> (usize, usize, String) {
    let area = directory
        .file_name()
        .unwrap()
        .to_string_lossy()
        .into_owned();
    let temporary = tempfile::tempdir().unwrap();
    let config = Config {
        advertise_address: [10, 200, 0, 1].into(),
        service_account_issuer: "https://kubernetes.default.svc".into(),
        storage_protection: true,
        ..Config::default()
    };
    let cluster = support::Cluster::start(temporary.path(), 0, config).await;
    let clients = scenario::clients(&cluster);
    let (mut agree, mut total, mut report, mut shown) = (0, 0, String::new(), 0);
    for (scenario, recorded) in scenarios(&directory) {
        let name = format!("{area}/{}", scenario["name"].as_str().unwrap());
        if only.as_ref().is_some_and(|only| !only.is_match(&name)) {
            continue;
        }
        total += 1;
        let got = Value::from(scenario::Run::new(&clients, &scenario).play().await);
        let mut lines = Vec::new();
        differences(&recorded, &got, "", &mut lines);
        if lines.is_empty() {
            agree += 1;
            continue;
        }
        writeln!(report, "{name}").unwrap();
        let most = if only.is_some() { usize::MAX } else { SHOWN.0 };
        for line in lines.iter().take(most) {
            if only.is_none() && shown >= SHOWN.1 {
                break;
            }
            shown += 1;
            writeln!(report, "    {line}").unwrap();
        }
    }
    (agree, total, report)
}

#[tokio::test(flavor = "multi_thread")]
async fn recorded_scenarios_agree() {
    let Some(golden) = golden() else {
        println!("skipped: no recordings at ../shared/golden nor at XEBEC_GOLDEN");
        return;
    };
    let only = std::env::var("XEBEC_GOLDEN_ONLY")
        .ok()
        .map(|text| Regex::new(&text).unwrap());
    let mut running = BTreeMap::new();
    for (area, floor) in FLOOR {
        let task = tokio::spawn(group(golden.join(area), only.clone()));
        running.insert(*area, (*floor, task));
    }
    let mut fallen = Vec::new();
    let mut table = String::new();
    for (area, (floor, task)) in running {
        let (agree, total, report) = task.await.unwrap();
        if total == 0 {
            continue;
        }
        print!("{report}");
        writeln!(
            table,
            "{area:12} {agree:4} of {total:4} agree, floor {floor}"
        )
        .unwrap();
        if only.is_none() && agree < floor {
            fallen.push(format!("{area}: {agree} < {floor}"));
        }
    }
    print!("{table}");
    assert!(fallen.is_empty(), "fewer agree than before: {fallen:?}");
}
