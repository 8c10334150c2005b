//! `pods/ephemeralcontainers`: containers that are added to a running pod, and nothing else through this path.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tower_service::Service;
use xebec_apiserver::{ApiServer, Config, InProcess, UserInfo};
use xebec_store::{Embedded, Options};

const PODS: &str = "/api/v1/namespaces/default/pods";
const PATCH: &str = "application/strategic-merge-patch+json";

async fn ask(client: &mut InProcess, method: &str, path: &str, body: &Value) -> (u16, Value) {
    let media = if method == "PATCH" {
        PATCH
    } else {
        "application/json"
    };
    let text = if body.is_null() {
        String::new()
    } else {
        body.to_string()
    };
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("content-type", media)
        .body(Full::new(Bytes::from(text)))
        .unwrap();
    let response = client.call(request).await.unwrap();
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&body).unwrap())
}

#[tokio::test]
async fn ephemeral_containers_are_added_by_their_own_path_only() {
    let directory = tempfile::tempdir().unwrap();
    let config = Config {
        service_account_key_pem: rcgen::KeyPair::generate().unwrap().serialize_pem(),
        ..Config::default()
    };
    let store = Embedded::open(directory.path(), Options::default()).unwrap();
    let server = ApiServer::start(config, store, CancellationToken::new())
        .await
        .unwrap();
    let client = &mut server.in_process(UserInfo::new("kubernetes-admin", &["system:masters"]));
    let account = json!({"metadata": {"name": "default"}});
    let accounts = "/api/v1/namespaces/default/serviceaccounts";
    assert_eq!(ask(client, "POST", accounts, &account).await.0, 201);
    let pod =
        json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "image": "i:1"}]}});
    assert_eq!(ask(client, "POST", PODS, &pod).await.0, 201);
    let (pod, path) = (format!("{PODS}/p"), format!("{PODS}/p/ephemeralcontainers"));
    let with = |container: Value| json!({"spec": {"ephemeralContainers": [container]}});

    // What else is sent along is left as it was.
    let mut patch = with(json!({"name": "debug", "image": "b:1", "targetContainerName": "c"}));
    patch["spec"]["containers"] = json!([{"name": "c", "image": "other:1"}]);
    patch["metadata"] = json!({"labels": {"a": "b"}});
    let (status, changed) = ask(client, "PATCH", &path, &patch).await;
    assert_eq!(status, 200, "{changed}");
    assert_eq!(changed["spec"]["ephemeralContainers"][0]["name"], "debug");
    assert_eq!(
        changed["spec"]["ephemeralContainers"][0]["imagePullPolicy"],
        "IfNotPresent"
    );
    assert_eq!(changed["spec"]["containers"][0]["image"], "i:1");
    assert!(changed["metadata"]["labels"].is_null(), "{changed}");
    assert_eq!(changed["metadata"]["generation"], 2);
    assert_eq!(
        ask(client, "GET", &path, &Value::Null).await.1["spec"],
        changed["spec"]
    );

    let field = |answer: &Value| answer["details"]["causes"][0]["field"].clone();
    for (container, at) in [
        (
            json!({"name": "debug", "image": "b:2"}),
            "spec.ephemeralContainers",
        ),
        (
            json!({"name": "c", "image": "b:1"}),
            "spec.ephemeralContainers[0].name",
        ),
        (
            json!({"name": "e", "image": "b:1", "ports": [{"containerPort": 1}]}),
            "spec.ephemeralContainers[0].ports",
        ),
        (
            json!({"name": "e", "image": "b:1", "targetContainerName": "no"}),
            "spec.ephemeralContainers[0].targetContainerName",
        ),
    ] {
        let (status, answer) = ask(client, "PATCH", &path, &with(container)).await;
        assert_eq!(
            status,
            StatusCode::UNPROCESSABLE_ENTITY.as_u16(),
            "{answer}"
        );
        assert_eq!(field(&answer), at, "{answer}");
    }
    let (status, answer) = ask(client, "PUT", &path, &{
        let mut without = changed.clone();
        without["spec"]["ephemeralContainers"] = Value::Null;
        without
    })
    .await;
    assert_eq!(
        (status, field(&answer)),
        (422, json!("spec.ephemeralContainers"))
    );
    let (status, answer) = ask(
        client,
        "PATCH",
        &pod,
        &with(json!({"name": "x", "image": "x:1"})),
    )
    .await;
    assert_eq!((status, field(&answer)), (422, json!("spec")));
}
