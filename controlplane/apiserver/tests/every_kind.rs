//! Every stored kind through the in-process service: create, get, list, watch, patch, delete; bad input.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::sync::Arc;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tower_service::Service;
use xebec_apiserver::{ApiServer, Config, InProcess, UserInfo};
use xebec_schema::table::{self, Resource};
use xebec_store::{Embedded, Options};

async fn server(directory: &std::path::Path) -> Arc<ApiServer> {
    let key = rcgen::KeyPair::generate().unwrap().serialize_pem();
    let config = Config {
        service_account_key_pem: key,
        ..Config::default()
    };
    let store = Embedded::open(directory, Options::default()).unwrap();
    ApiServer::start(config, store, CancellationToken::new())
        .await
        .unwrap()
}

fn admin(server: &Arc<ApiServer>) -> InProcess {
    server.in_process(UserInfo::new("kubernetes-admin", &["system:masters"]))
}

async fn ask(
    client: &mut InProcess,
    method: &str,
    path: &str,
    media: &str,
    body: impl Into<Bytes>,
) -> (StatusCode, Value) {
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("content-type", media)
        .body(Full::new(body.into()))
        .unwrap();
    let response = client.call(request).await.unwrap();
    let status = response.status();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (
        status,
        serde_json::from_slice(&body)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&body).into_owned())),
    )
}

fn collection(resource: &Resource) -> String {
    let root = if resource.group.is_empty() {
        "/api/v1".into()
    } else {
        format!("/apis/{}/{}", resource.group, resource.version)
    };
    if resource.namespaced {
        format!("{root}/namespaces/default/{}", resource.plural)
    } else {
        format!("{root}/{}", resource.plural)
    }
}

/// What a kind can't be made without.
fn minimal(resource: &Resource) -> Value {
    let mut object = json!({"apiVersion": resource.api_version(), "kind": resource.kind, "metadata": {"name": "minimal"}});
    let labels = json!({"app": "x"});
    let template = json!({"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
    let more = match resource.kind {
        "Pod" => json!({"spec": template["spec"]}),
        "Deployment" | "ReplicaSet" | "DaemonSet" | "StatefulSet" => {
            json!({"spec": {"selector": {"matchLabels": labels}, "template": template, "serviceName": "x"}})
        }
        "ReplicationController" => json!({"spec": {"selector": labels, "template": template}}),
        "Job" => {
            json!({"spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}}})
        }
        "CronJob" => {
            json!({"spec": {"schedule": "* * * * *", "jobTemplate": {"spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}}}}})
        }
        "PodTemplate" => json!({"template": template}),
        "Service" => json!({"spec": {"ports": [{"port": 80}]}}),
        "EndpointSlice" => json!({"addressType": "IPv4", "endpoints": []}),
        "IPAddress" => json!({"spec": {"parentRef": {"resource": "services", "name": "x"}}}),
        "ServiceCIDR" => json!({"spec": {"cidrs": ["192.0.2.0/24"]}}),
        "PriorityClass" => json!({"value": 5}),
        "StorageClass" => json!({"provisioner": "x"}),
        "RuntimeClass" => json!({"handler": "x"}),
        "Event" if resource.group.is_empty() => {
            json!({"involvedObject": {"namespace": "default"}})
        }
        "Event" => json!({
            "regarding": {"namespace": "default"}, "type": "Normal", "reason": "Seen", "action": "Look",
            "eventTime": "2026-01-02T03:04:05.000000Z",
            "reportingController": "example.com/c", "reportingInstance": "i",
        }),
        "ClusterRoleBinding" | "RoleBinding" => {
            json!({"roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "x"}})
        }
        "ControllerRevision" => json!({"revision": 1}),
        "HorizontalPodAutoscaler" => {
            json!({"spec": {"maxReplicas": 2, "scaleTargetRef": {"kind": "Deployment", "name": "x"}}})
        }
        _ => json!({}),
    };
    for (key, value) in more.as_object().into_iter().flatten() {
        object[key] = value.clone();
    }
    object
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_kind_is_created_read_listed_watched_patched_and_deleted() {
    let directory = tempfile::tempdir().unwrap();
    let server = server(directory.path()).await;
    let mut client = admin(&server);
    const JSON: &str = "application/json";
    let account = json!({"metadata": {"name": "default"}}).to_string();
    assert_eq!(
        ask(
            &mut client,
            "POST",
            "/api/v1/namespaces/default/serviceaccounts",
            JSON,
            account
        )
        .await
        .0,
        StatusCode::CREATED
    );
    let mut failed = Vec::new();
    for resource in table::resources()
        .iter()
        .filter(|resource| resource.is_stored())
    {
        let path = collection(resource);
        let mut object = minimal(resource);
        let name = if resource.kind == "IPAddress" {
            "192.0.2.7"
        } else {
            "minimal"
        };
        object["metadata"]["name"] = name.into();
        let (status, made) = ask(&mut client, "POST", &path, JSON, object.to_string()).await;
        if status != StatusCode::CREATED {
            failed.push(format!("create {path}: {status} {}", made["message"]));
            continue;
        }
        let one = format!("{path}/{name}");
        let (status, got) = ask(&mut client, "GET", &one, JSON, "").await;
        if status != StatusCode::OK
            || got["metadata"]["uid"] != made["metadata"]["uid"]
            || got["kind"] != resource.kind
        {
            failed.push(format!("get {path}: {status} {got}"));
        }
        let (_, list) = ask(
            &mut client,
            "GET",
            &format!("{path}?fieldSelector=metadata.name%3D{name}"),
            JSON,
            "",
        )
        .await;
        if list["items"].as_array().map(Vec::len) != Some(1) || list["kind"] != resource.list_kind()
        {
            failed.push(format!("list {path}: {list}"));
        }
        let patch = json!({"metadata": {"labels": {"patched": "yes"}}}).to_string();
        let (status, patched) = ask(
            &mut client,
            "PATCH",
            &one,
            "application/merge-patch+json",
            patch,
        )
        .await;
        if status != StatusCode::OK || patched["metadata"]["labels"]["patched"] != "yes" {
            failed.push(format!("patch {path}: {status} {}", patched["message"]));
        }
        // Some kinds leave their dependents behind, and wait for that, where the delete does not say.
        let delete = format!("{one}?propagationPolicy=Background");
        let (status, gone) = ask(&mut client, "DELETE", &delete, JSON, "").await;
        if status != StatusCode::OK {
            failed.push(format!("delete {path}: {status} {}", gone["message"]));
        }
        let from = made["metadata"]["resourceVersion"].as_str().unwrap();
        let watch = format!("{path}?watch=1&resourceVersion={from}&timeoutSeconds=1");
        let request = Request::get(&watch).body(Full::new(Bytes::new())).unwrap();
        let body = client.call(request).await.unwrap().into_body();
        let mut events = Vec::new();
        let mut body = body;
        let wanted = if resource.kind == "Namespace" {
            ["MODIFIED", "MODIFIED"]
        } else {
            ["MODIFIED", "DELETED"]
        };
        while events.len() < 2 {
            let Some(Ok(frame)) = body.frame().await else {
                break;
            };
            // One frame may hold several events, each a line.
            for line in frame
                .into_data()
                .unwrap_or_default()
                .split(|byte| *byte == b'\n')
            {
                if !line.is_empty() {
                    let event: Value = serde_json::from_slice(line).unwrap_or_default();
                    events.push(event["type"].as_str().unwrap_or_default().to_owned());
                }
            }
        }
        if events != wanted {
            failed.push(format!("watch {path}: {events:?}"));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_input_is_refused_and_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let server = server(directory.path()).await;
    let mut client = admin(&server);
    let path = "/api/v1/namespaces/default/configmaps";
    let cases: [(&str, Vec<u8>, u16); 9] = [
        ("application/json", b"{\"kind\":".to_vec(), 400),
        ("application/yaml", b"a: [1, }".to_vec(), 400),
        (
            "application/json",
            br#"{"apiVersion":"v1","kind":"Nonsense","metadata":{"name":"a"}}"#.to_vec(),
            400,
        ),
        (
            "application/json",
            br#"{"apiVersion":"v9","kind":"ConfigMap","metadata":{"name":"a"}}"#.to_vec(),
            400,
        ),
        ("application/json", vec![b' '; 10 << 20], 413),
        (
            "application/vnd.kubernetes.protobuf",
            b"k9s\0".to_vec(),
            400,
        ),
        (
            "application/vnd.kubernetes.protobuf",
            b"k8s\0\x12\x7f".to_vec(),
            400,
        ),
        ("application/cbor", b"\xd9\xd9\xf7\xa0".to_vec(), 415),
        (
            "application/json",
            br#"{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"Not A Name"}}"#.to_vec(),
            422,
        ),
    ];
    for (media, body, code) in cases {
        let shown = String::from_utf8_lossy(&body[..body.len().min(60)]).into_owned();
        let (status, answer) = ask(&mut client, "POST", path, media, body).await;
        assert_eq!(
            (status.as_u16(), answer["kind"].as_str()),
            (code, Some("Status")),
            "{shown}: {answer}"
        );
    }
    let (_, list) = ask(&mut client, "GET", path, "application/json", "").await;
    assert_eq!(list["items"], json!([]));
}

#[tokio::test]
async fn others_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let server = server(directory.path()).await;
    let mut stranger = server.in_process(UserInfo::new("jane", &[]));
    let (status, answer) = ask(
        &mut stranger,
        "GET",
        "/api/v1/namespaces/default/pods",
        "application/json",
        "",
    )
    .await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert_eq!(
        answer["message"],
        "pods is forbidden: User \"jane\" cannot list resource \"pods\" in API group \"\" in the namespace \"default\""
    );
    let mut nobody = server.in_process(UserInfo::anonymous());
    assert_eq!(
        ask(&mut nobody, "GET", "/version", "application/json", "")
            .await
            .0,
        StatusCode::OK
    );
    assert_eq!(
        ask(&mut nobody, "GET", "/apis", "application/json", "")
            .await
            .0,
        StatusCode::FORBIDDEN
    );
}
