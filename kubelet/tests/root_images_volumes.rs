//! What pods bring from the API: credentials for their images, and volumes that belong to their group.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod harness;
#[path = "../cri/tests/harness/registry.rs"]
mod registry;

use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use kube::api::PostParams;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use harness::{Node, container, not_root, waiting};
use registry::{Registry, TestImage};

async fn make<K>(node: &Node, object: Value)
where
    K: kube::Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned
        + serde::Serialize,
{
    let object: K = serde_json::from_value(object).unwrap();
    node.api::<K>()
        .create(&PostParams::default(), &object)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn private_images_are_pulled_with_the_pods_secrets() {
    if not_root() {
        return;
    }
    let node = Node::start(21071).await;
    let registry = Registry::start(true);
    let host = registry.host.as_str();
    // "me:secret"
    let new = json!({"auths": {host: {"auth": "bWU6c2VjcmV0"}}});
    // The closer entry is tried first, and is wrong.
    let old = json!({
        format!("http://{host}/v2/"): {"username": "me", "password": "secret"},
        format!("{host}/old"): {"username": "me", "password": "wrong"},
    });
    let elsewhere =
        json!({"auths": {"registry.example": {"username": "me", "password": "secret"}}});
    for (name, kind, key, content) in [
        ("new", "dockerconfigjson", ".dockerconfigjson", new),
        ("old", "dockercfg", ".dockercfg", old),
        (
            "elsewhere",
            "dockerconfigjson",
            ".dockerconfigjson",
            elsewhere,
        ),
    ] {
        let secret = json!({
            "metadata": {"name": name}, "type": format!("kubernetes.io/{kind}"),
            "stringData": {key: content.to_string()},
        });
        make::<Secret>(&node, secret).await;
    }
    for (name, secrets) in [
        ("new", json!([{"name": "elsewhere"}, {"name": "new"}])),
        ("old", json!([{"name": "old"}])),
        ("none", json!([{"name": "missing"}, {"name": "elsewhere"}])),
    ] {
        let repo = format!("{name}/app");
        registry.push(&repo, "v1", &TestImage::shell());
        let image = format!("{host}/{repo}:v1");
        let container = json!({"image": image, "imagePullPolicy": "Always"});
        let more = json!({"imagePullSecrets": secrets, "restartPolicy": "Never"});
        node.pod(name, container, more).await;
    }
    node.until_succeeded("new").await;
    node.until_succeeded("old").await;
    let refused = node
        .until("none", "refused", |pod| {
            waiting(pod).0 == "ImagePullBackOff"
        })
        .await;
    let message = waiting(&refused).1;
    assert!(message.contains("401"), "{message}");
    let said = node.events("none").await;
    let wanted = "FailedToRetrieveImagePullSecret: Unable to retrieve some image pull secrets (missing); attempting to pull the image may not succeed.";
    assert!(said.iter().any(|said| said == wanted), "{said:#?}");
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_belong_to_the_pods_group() {
    if not_root() {
        return;
    }
    let node = Node::start(21072).await;
    make::<Secret>(
        &node,
        json!({"metadata": {"name": "s"}, "stringData": {"key": "S"}}),
    )
    .await;
    make::<ConfigMap>(
        &node,
        json!({"metadata": {"name": "m"}, "data": {"key": "M"}}),
    )
    .await;
    let volumes = json!([
        {"name": "disk", "emptyDir": {}},
        {"name": "memory", "emptyDir": {"medium": "Memory"}},
        {"name": "secret", "secret": {"secretName": "s", "defaultMode": 0o400}},
        {"name": "map", "configMap": {"name": "m", "defaultMode": 0o400}},
        {"name": "projected", "projected": {"defaultMode": 0o400, "sources": [
            {"secret": {"name": "s", "items": [{"key": "key", "path": "sub/key"}]}},
        ]}},
    ]);
    let mounts: Vec<Value> = ["disk", "memory", "secret", "map", "projected"]
        .map(|name| json!({"name": name, "mountPath": format!("/{name}")}))
        .into();
    // What the kubelet has written is the group's to read, and what the pod writes is the group's too.
    let script = "id -u; for d in disk memory; do echo x > /$d/f; stat -c '%g %a' /$d /$d/f; done; \
        cat /secret/key /map/key /projected/sub/key; echo; stat -L -c '%u %g %a' /secret/key /map/key /projected/sub/key";
    let shell = |script: &str| {
        json!({
            "command": ["sh", "-c", format!("umask 022; ({script}) > /dev/termination-log 2>&1")],
            "volumeMounts": mounts,
        })
    };
    let more = |group: Value| {
        json!({
            "volumes": volumes, "restartPolicy": "Never",
            "securityContext": {"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": group},
        })
    };
    node.pod("of-group", shell(script), more(json!(4242))).await;
    // Without a group nobody but root may read such files.
    let refused = "cat /secret/key || cat /map/key || cat /projected/sub/key || echo refused";
    node.pod("of-none", shell(refused), more(Value::Null)).await;
    let said = |pod: &Pod| {
        let ended = container(pod).state.unwrap().terminated.unwrap();
        ended.message.unwrap_or_default()
    };
    let pod = node.until_succeeded("of-group").await;
    assert_eq!(
        said(&pod),
        "1000\n4242 2777\n4242 644\n4242 2777\n4242 644\nSMS\n0 4242 440\n0 4242 440\n0 4242 440\n"
    );
    let pod = node.until_succeeded("of-none").await;
    assert!(said(&pod).ends_with("refused\n"), "{}", said(&pod));
    node.end().await;
}
