//! Flows as they are written to a file.

use super::*;
use export::Options;
use xebec_hubble::flow::FlowFilter;

fn options(dir: &tempfile::TempDir) -> Options {
    Options {
        path: dir.path().join("events.log"),
        longest: 1 << 20,
        backups: 2,
        compress: false,
        allow: Vec::new(),
        deny: Vec::new(),
        fields: Vec::new(),
    }
}

/// The lines of a file once there are so many.
async fn lines(path: &std::path::Path, count: usize) -> Vec<Value> {
    for _ in 0..2_000 {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        if text.lines().count() >= count {
            return text
                .lines()
                .map(|line| serde_json::from_str(line).unwrap())
                .collect();
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{} has no {count} lines", path.display());
}

/// Exports what comes from now on.
async fn export(flows: &Flows, options: Options) -> CancellationToken {
    let shutdown = CancellationToken::new();
    let running = export::run(options.clone(), flows.clone(), shutdown.clone());
    tokio::spawn(async move { running.await.unwrap() });
    while !options.path.exists() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    shutdown
}

#[tokio::test]
async fn what_passes_is_written_as_hubble_writes_it() {
    let dir = tempfile::tempdir().unwrap();
    let flows = flows();
    // What was before is not written.
    take(&flows, event(WEB, API));
    let of_verdict = |verdict: i32| FlowFilter {
        verdict: vec![verdict],
        ..FlowFilter::default()
    };
    let options = Options {
        allow: vec![of_verdict(2)],
        deny: vec![FlowFilter {
            source_pod: vec!["shop/web".into()],
            ..FlowFilter::default()
        }],
        fields: vec!["drop_reason_desc".into(), "destination.pod_name".into()],
        ..options(&dir)
    };
    let shutdown = export(&flows, options.clone()).await;
    take(&flows, event(WEB, API));
    take(&flows, dropped(WEB, API));
    take(&flows, dropped([198, 51, 100, 7], API));
    let lines = lines(&options.path, 2).await;
    shutdown.cancel();
    let flow = json!({"drop_reason_desc": "POLICY_DENIED", "destination": {"pod_name": "api-1"}});
    let line = json!({"flow": flow, "node_name": "here", "time": "2026-01-02T03:04:10Z"});
    assert_eq!(lines, [line.clone(), line]);
    use std::os::unix::fs::PermissionsExt;
    let first = dir.path().join("events.log");
    let mode = std::fs::metadata(first).unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0, "{mode:o}");
}

#[tokio::test]
async fn files_are_no_longer_and_no_more_than_they_may() {
    let dir = tempfile::tempdir().unwrap();
    let flows = flows();
    let options = Options {
        longest: 10_000,
        ..options(&dir)
    };
    let shutdown = export(&flows, options.clone()).await;
    for round in 0..20 {
        let before = flows.store().next();
        for _ in 0..10 {
            take(&flows, event(WEB, API));
        }
        assert_eq!(flows.store().next(), before + 20, "{round}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    shutdown.cancel();
    let mut names: Vec<String> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["events.log", "events.log.1", "events.log.2"]);
    for name in names {
        let text = std::fs::read_to_string(dir.path().join(&name)).unwrap();
        // A chunk of 64 flows may be the one that is too much.
        assert!(text.len() < 10_000 + 64 * 1_500, "{name}: {}", text.len());
        for line in text.lines() {
            serde_json::from_str::<Value>(line).expect("whole lines");
        }
    }
}

#[tokio::test]
async fn what_can_not_be_exported_is_said_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let run = |options: Options| export::run(options, flows(), CancellationToken::new());
    let error = run(Options {
        path: dir.path().join("no/such/folder"),
        ..options(&dir)
    });
    assert!(format!("{:#}", error.await.unwrap_err()).contains("no/such/folder"));
    let error = run(Options {
        fields: vec!["colour".into()],
        ..options(&dir)
    });
    assert!(format!("{:#}", error.await.unwrap_err()).contains("no flow has a \"colour\""));
}
