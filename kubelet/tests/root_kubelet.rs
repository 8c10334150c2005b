//! The kubelet with the real container runtime against the real API server: restarts, probes, ends.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod harness;

use k8s_openapi::api::core::v1::Pod;
use serde_json::json;

use harness::{Node, condition, container, is_running, not_root, phase, shell, waiting};

#[tokio::test(flavor = "multi_thread")]
async fn restart_policies() {
    if not_root() {
        return;
    }
    let node = Node::start(21051).await;
    let never = json!({"restartPolicy": "Never"});
    node.pod("done", shell("exit 0"), never.clone()).await;
    node.pod("failed", shell("exit 3"), never).await;
    let on_failure = json!({"restartPolicy": "OnFailure"});
    node.pod("again", shell("echo try; exit 4"), on_failure)
        .await;
    node.pod("always", shell("sleep 0.2; exit 0"), json!({}))
        .await;
    node.until_succeeded("done").await;
    let failed = node
        .until("failed", "Failed", |pod| phase(pod) == "Failed")
        .await;
    let ended = container(&failed).state.unwrap().terminated.unwrap();
    assert_eq!(
        (ended.exit_code, ended.reason.as_deref()),
        (3, Some("Error"))
    );
    for name in ["again", "always"] {
        let pod = node
            .until(name, "in CrashLoopBackOff", |pod| {
                let waiting = container(pod).state.and_then(|s| s.waiting);
                waiting.and_then(|w| w.reason).as_deref() == Some("CrashLoopBackOff")
            })
            .await;
        assert_eq!(
            (phase(&pod), container(&pod).restart_count),
            ("Running", 1),
            "{name}"
        );
        let last = container(&pod).last_state.unwrap().terminated.unwrap();
        assert_eq!(last.exit_code, if name == "again" { 4 } else { 0 });
    }
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_a_container_from_running_is_said() {
    if not_root() {
        return;
    }
    let node = Node::start(21052).await;
    let strict = json!({"securityContext": {"runAsNonRoot": true}});
    node.pod("as-root", shell("exit 0"), strict.clone()).await;
    let mut user = strict;
    user["securityContext"]["runAsUser"] = json!(1000);
    user["restartPolicy"] = json!("Never");
    node.pod("as-user", shell("id -u > /dev/termination-log"), user)
        .await;
    node.pod("no-image", json!({"image": "localhost/none:1"}), json!({}))
        .await;
    node.pod("no-command", json!({"command": ["/none"]}), json!({}))
        .await;
    let env = json!({"env": [{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "none", "key": "a"}}}]});
    node.pod("no-config", env, json!({})).await;
    let pulls = json!({"image": "127.0.0.1:1/none:1", "imagePullPolicy": "IfNotPresent"});
    node.pod("no-registry", pulls, json!({})).await;

    let ended = node.until_succeeded("as-user").await;
    let ended = container(&ended).state.unwrap().terminated.unwrap();
    assert_eq!(ended.message.as_deref(), Some("1000\n"));
    for (name, reason, part) in [
        (
            "as-root",
            "CreateContainerConfigError",
            "container has runAsNonRoot and image will run as root",
        ),
        (
            "no-image",
            "ErrImageNeverPull",
            "is not present with pull policy of Never",
        ),
        ("no-command", "RunContainerError", "/none"),
        (
            "no-config",
            "CreateContainerConfigError",
            "couldn't find key a in ConfigMap default/none",
        ),
        (
            "no-registry",
            "ImagePullBackOff",
            "Back-off pulling image \"127.0.0.1:1/none:1\": ErrImagePull: ",
        ),
    ] {
        let pod = node
            .until(name, reason, |pod| waiting(pod).0 == reason)
            .await;
        assert!(
            waiting(&pod).1.contains(part),
            "{name}: {}",
            waiting(&pod).1
        );
        // What was made and did not start has ended already, in the runtime's eyes.
        let wanted = if reason == "RunContainerError" {
            "Running"
        } else {
            "Pending"
        };
        assert_eq!(phase(&pod), wanted, "{name}");
    }
    let events = node.events("as-root").await;
    assert!(
        events
            .iter()
            .any(|e| e.starts_with("Failed: Error: container has runAsNonRoot")),
        "{events:?}"
    );
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sub_paths_stay_in_their_volume() {
    if not_root() {
        return;
    }
    let node = Node::start(21053).await;
    std::fs::create_dir(node.path("host")).unwrap();
    std::fs::write(node.path("secret"), "secret").unwrap();
    std::os::unix::fs::symlink(node.path("secret"), node.path("host/out")).unwrap();
    let volumes = json!({"restartPolicy": "Never", "volumes": [
        {"name": "v", "emptyDir": {}}, {"name": "host", "hostPath": {"path": node.path("host")}},
    ]});
    let mount =
        |volume: &str, sub: &str| json!([{"name": volume, "mountPath": "/data", "subPath": sub}]);
    let mut good = shell("echo hello > /data/file; cat /data/file > /dev/termination-log");
    good["volumeMounts"] = mount("v", "a/b");
    node.pod("within", good, volumes.clone()).await;
    let mut bad = shell("cat /data");
    bad["volumeMounts"] = mount("host", "out");
    node.pod("out", bad, volumes).await;
    let ended = node.until_succeeded("within").await;
    let ended = container(&ended).state.unwrap().terminated.unwrap();
    assert_eq!(ended.message.as_deref(), Some("hello\n"));
    let pod = node
        .until("out", "refused", |pod| {
            waiting(pod).0 == "CreateContainerConfigError"
        })
        .await;
    let wanted = "failed to prepare subPath for volumeMount \"host\" of container \"c\": subpath \"out\" not within volume path";
    assert_eq!(waiting(&pod).1, wanted);
    assert!(node.path("secret").exists());
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_ends_is_told_so_and_heard_until_it_has() {
    if not_root() {
        return;
    }
    let mut node = Node::start(21054).await;
    let deaf = "trap '' TERM; echo up; while true; do sleep 0.1; done";
    let long = json!({"terminationGracePeriodSeconds": 60});
    node.pod("deaf", shell(deaf), long.clone()).await;
    node.pod("forced", shell(deaf), long).await;
    std::fs::create_dir(node.path("out")).unwrap();
    let out = json!({"volumes": [{"name": "out", "hostPath": {"path": node.path("out")}}], "terminationGracePeriodSeconds": 30});
    let mut hooked =
        shell("trap 'echo term >> /out/said; exit 0' TERM; while true; do sleep 0.1; done");
    hooked["volumeMounts"] = json!([{"name": "out", "mountPath": "/out"}]);
    hooked["lifecycle"] = json!({
        "postStart": {"exec": {"command": ["sh", "-c", "echo start >> /out/said"]}},
        "preStop": {"exec": {"command": ["sh", "-c", "touch /out/not-ready; sleep 3; echo stop >> /out/said"]}},
    });
    hooked["readinessProbe"] = json!({"exec": {"command": ["test", "!", "-e", "/out/not-ready"]}, "periodSeconds": 1, "failureThreshold": 1});
    node.pod("hooked", hooked, out).await;
    for name in ["deaf", "forced", "hooked"] {
        node.until(name, "Running", is_running).await;
    }
    node.until("hooked", "Ready", |pod| condition(pod, "Ready") == "True")
        .await;

    // Ready is what the pod itself says of it, until its end.
    node.delete("hooked", None).await;
    node.until("hooked", "not ready while it runs", |pod| {
        pod.metadata.deletion_timestamp.is_some()
            && condition(pod, "Ready") == "False"
            && is_running(pod)
    })
    .await;
    node.until_gone("hooked").await;
    let said = std::fs::read_to_string(node.path("out/said")).unwrap();
    assert_eq!(said, "start\nstop\nterm\n");

    // A long grace is cut short by a second delete, and by one that takes the object away.
    node.delete("deaf", None).await;
    node.delete("forced", None).await;
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    assert!(node.api::<Pod>().get_opt("deaf").await.unwrap().is_some());
    node.delete("deaf", Some(2)).await;
    node.delete("forced", Some(0)).await;
    let took = node.until_gone("deaf").await;
    assert!(took.as_secs() < 6, "{took:?}");
    let left = || node.path("kubelet/pods").read_dir().unwrap().count();
    let started = std::time::Instant::now();
    while left() > 0 {
        assert!(started.elapsed().as_secs() < 6, "the forced pod stays");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }

    // A kubelet that is ended leaves its pods, and the next one takes them up.
    node.pod("stays", shell("sleep 1000"), json!({})).await;
    let before = node.until("stays", "Running", is_running).await;
    std::fs::create_dir_all(node.path("kubelet/pods/gone-pod/volumes")).unwrap();
    node.stop_kubelet().await;
    node.start_kubelet();
    let started = std::time::Instant::now();
    while node.path("kubelet/pods/gone-pod").exists() {
        assert!(started.elapsed().as_secs() < 6, "the orphan's folder stays");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let after = node.until("stays", "Running", is_running).await;
    assert_eq!(
        container(&before).container_id,
        container(&after).container_id
    );
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_deleted_while_its_end_is_tidied_up_leaves_nothing() {
    if not_root() {
        return;
    }
    let node = Node::start(21055).await;
    for round in 0..6 {
        let name = format!("done-{round}");
        let once = json!({"restartPolicy": "Never"});
        node.pod(&name, shell("exit 0"), once).await;
        node.until_succeeded(&name).await;
        // Nobody tells of it a second time.
        node.delete(&name, Some(0)).await;
    }
    node.end().await;
}
