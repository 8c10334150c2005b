//! `up`: how long it takes from `xebec up` to a Ready node, and to a Running pod.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use futures::{StreamExt, pin_mut};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{DeleteParams, PostParams, WatchEvent, WatchParams};

use crate::Effort;
use crate::cluster::BenchCluster;
use crate::row::{Aim, Case, Row};

/// A wait that ends here is a failure.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Starts clusters; each time is from the start of the `xebec` process, certificates and image included where
/// the folder is empty, to the return of `up --detach`, or to the moment the API says that the pod is Running.
pub fn run(effort: Effort) -> Result<Vec<Row>> {
    let rounds = effort.of(7, 2);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("could not start the async runtime")?;
    let (mut fresh, mut again, mut pod) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        let started = Instant::now();
        let mut cluster = BenchCluster::up("up", &[])?;
        fresh.push(started.elapsed().as_secs_f64());
        cluster.down()?;
        let started = Instant::now();
        cluster.start()?;
        again.push(started.elapsed().as_secs_f64());
        // The image is there, the pod is asked for as soon as the node is Ready.
        runtime.block_on(run_pod(&cluster))?;
        pod.push(started.elapsed().as_secs_f64());
        runtime.block_on(remove_pod(&cluster))?;
        cluster.down()?;
        eprintln!(
            "bench: up {}/{rounds}: Ready in {:.2} s, with data {:.2} s, first pod {:.2} s",
            round + 1,
            fresh[round],
            again[round],
            pod[round]
        );
    }
    let case = |case, aim| Case {
        bench: "up",
        case,
        unit: "s",
        aim: Aim::AtMost(aim),
    };
    Ok(vec![
        Row::alone(case("node Ready, empty folder", 1.0), &fresh)?,
        Row::alone(case("node Ready, data of an earlier run", 1.0), &again)?,
        Row::alone(case("first pod Running, image present", 2.0), &pod)?,
    ])
}

/// Creates a pod and waits until the API shows it Running.
async fn run_pod(cluster: &BenchCluster) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(cluster.client().await?, "default");
    let pod: Pod = serde_json::from_value(serde_json::json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "first"},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "demo",
                "image": "xebec.local/demo:latest",
                "imagePullPolicy": "IfNotPresent",
            }],
        },
    }))
    .context("our pod is no Pod")?;
    let created = pods
        .create(&PostParams::default(), &pod)
        .await
        .context("could not create the pod")?;
    let since = created.metadata.resource_version.unwrap_or_default();
    wait(&pods, &since, "Running", |event| {
        matches!(event, WatchEvent::Modified(pod)
            if pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running"))
    })
    .await
}

/// Deletes the pod and waits until it is gone, so that the next `up` has none to start.
async fn remove_pod(cluster: &BenchCluster) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(cluster.client().await?, "default");
    let since = pods.get("first").await.context("the pod is lost")?;
    let since = since.metadata.resource_version.unwrap_or_default();
    pods.delete("first", &DeleteParams::default())
        .await
        .context("could not delete the pod")?;
    wait(&pods, &since, "gone", |event| {
        matches!(event, WatchEvent::Deleted(_))
    })
    .await
}

/// Waits for an event of the pod.
async fn wait(
    pods: &Api<Pod>,
    since: &str,
    what: &str,
    holds: impl Fn(&WatchEvent<Pod>) -> bool,
) -> Result<()> {
    let params = WatchParams::default().fields("metadata.name=first");
    let events = pods
        .watch(&params, since)
        .await
        .context("could not watch the pod")?;
    pin_mut!(events);
    let found = async {
        while let Some(event) = events.next().await.transpose()? {
            if holds(&event) {
                return Ok(());
            }
        }
        bail!("the watch ended before the pod was {what}")
    };
    tokio::time::timeout(TIMEOUT, found)
        .await
        .with_context(|| format!("the pod was not {what} within {TIMEOUT:?}"))?
}
