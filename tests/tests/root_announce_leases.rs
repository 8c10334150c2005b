//! The election of announcing nodes on this project's own API server, in process.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use xebec_agent::announce::leases::Cluster;
use xebec_agent::announce::{Announced, Config, Timing, run};
use xebec_apiserver::{ApiServer, UserInfo};
use xebec_store::{Embedded, Options};

/// How long is waited for what happens within a second where nothing else runs.
const PATIENCE: Duration = Duration::from_secs(10);
const LEASE: &str = "xebec-l2announce-shop-web";

struct Node {
    wanted: watch::Sender<Vec<Announced>>,
    stop: CancellationToken,
    task: JoinHandle<anyhow::Result<()>>,
}

fn start(client: &Client, node: &str) -> Node {
    // Without addresses, nothing is sent anywhere.
    let service = Announced {
        service: ("shop".into(), "web".into()),
        addresses: Vec::new(),
        eligible: true,
    };
    let (wanted, told) = watch::channel(vec![service]);
    let stop = CancellationToken::new();
    let config = Config {
        node: node.into(),
        devices: vec!["lo".into()],
        timing: Timing {
            lease: Duration::from_secs(2),
            renew: Duration::from_millis(500),
            retry: Duration::from_millis(200),
        },
    };
    let task = tokio::spawn(run(
        Cluster::new(client.clone()),
        config,
        told,
        stop.clone(),
    ));
    Node { wanted, stop, task }
}

async fn until(
    leases: &Api<Lease>,
    within: Duration,
    passes: impl Fn(Option<&LeaseSpec>) -> bool,
) -> Option<LeaseSpec> {
    let began = Instant::now();
    loop {
        let spec = leases
            .get_opt(LEASE)
            .await
            .unwrap()
            .and_then(|one| one.spec);
        if passes(spec.as_ref()) {
            return spec;
        }
        assert!(began.elapsed() < within, "{spec:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn holder(spec: Option<&LeaseSpec>) -> Option<&str> {
    spec?.holder_identity.as_deref()
}

#[tokio::test]
async fn leases_of_the_api_server_elect_one_node_and_follow_its_end() {
    let directory = tempfile::tempdir().unwrap();
    let store = Embedded::open(directory.path(), Options::default()).unwrap();
    let shutdown = CancellationToken::new();
    let config = xebec_apiserver::Config {
        service_account_key_pem: rcgen::KeyPair::generate().unwrap().serialize_pem(),
        ..xebec_apiserver::Config::default()
    };
    let server = ApiServer::start(config, store, shutdown.clone())
        .await
        .unwrap();
    let user = UserInfo::new("kubernetes-admin", &["system:masters"]);
    let client = Client::new(server.in_process(user), "default");
    let leases: Api<Lease> = Api::namespaced(client.clone(), "kube-system");
    let soon = Duration::from_secs(1);

    let a = start(&client, "a");
    let first = until(&leases, PATIENCE, |spec| holder(spec) == Some("a"))
        .await
        .unwrap();
    assert_eq!(first.lease_transitions, Some(0));
    let b = start(&client, "b");
    // Renewed by its holder, over a change that another hand made.
    let patch = Patch::Merge(serde_json::json!({"metadata": {"annotations": {"seen": "yes"}}}));
    leases
        .patch(LEASE, &PatchParams::default(), &patch)
        .await
        .unwrap();
    let renewed = until(&leases, PATIENCE, |spec| {
        spec.is_some_and(|spec| spec.renew_time > first.renew_time)
    });
    let renewed = renewed.await.unwrap();
    assert_eq!(renewed.acquire_time, first.acquire_time);
    assert_eq!(holder(Some(&renewed)), Some("a"));
    let annotations = leases
        .get(LEASE)
        .await
        .unwrap()
        .metadata
        .annotations
        .unwrap();
    assert_eq!(annotations["seen"], "yes");

    // Given up, taken by the other at once.
    a.stop.cancel();
    a.task.await.unwrap().unwrap();
    let second = until(&leases, PATIENCE, |spec| holder(spec) == Some("b"))
        .await
        .unwrap();
    assert_eq!(second.lease_transitions, Some(1));

    // Killed, taken when it has run out.
    let a = start(&client, "a");
    tokio::time::sleep(soon).await;
    b.task.abort();
    let began = Instant::now();
    let third = until(&leases, PATIENCE, |spec| holder(spec) == Some("a"))
        .await
        .unwrap();
    assert_eq!(third.lease_transitions, Some(2));
    assert!(began.elapsed() > soon, "{:?}", began.elapsed());

    // Taken away by an operator, made again; taken away with its Service.
    leases
        .delete(LEASE, &DeleteParams::default())
        .await
        .unwrap();
    until(&leases, PATIENCE, |spec| holder(spec) == Some("a")).await;
    a.wanted.send_replace(Vec::new());
    until(&leases, PATIENCE, |spec| spec.is_none()).await;
    a.stop.cancel();
    a.task.await.unwrap().unwrap();
    shutdown.cancel();
}
