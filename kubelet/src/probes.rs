//! Probes: each runs in a task of its own and tells the pod's worker when its verdict changes.

use std::time::Duration;

use anyhow::{Result, bail};
use bytes::Bytes;
use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{Container, HTTPGetAction, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use crate::runtime::Runtime;

/// Which probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Startup,
    Readiness,
    Liveness,
}

/// A probe's verdict changed, or a liveness or startup probe gave up.
#[derive(Clone, Debug)]
pub(crate) struct Verdict {
    pub container_id: String,
    pub container: String,
    pub kind: Kind,
    pub passed: bool,
    /// What the last try said, for events.
    pub message: String,
}

/// What is probed.
#[derive(Clone)]
pub(crate) struct Target {
    pub container: Container,
    pub container_id: String,
    pub pod_ip: String,
}

/// A port by number, or by its name among the container's.
pub(crate) fn port_of(container: &Container, port: &IntOrString) -> Option<u16> {
    match port {
        IntOrString::Int(number) => u16::try_from(*number).ok(),
        IntOrString::String(name) => container
            .ports
            .iter()
            .flatten()
            .find(|port| port.name.as_deref() == Some(name))
            .and_then(|port| u16::try_from(port.container_port).ok())
            .or_else(|| name.parse().ok()),
    }
}

/// Runs one probe until it is aborted; verdicts go to the worker.
pub(crate) async fn run(
    runtime: Runtime,
    target: Target,
    kind: Kind,
    probe: Probe,
    verdicts: mpsc::UnboundedSender<Verdict>,
) {
    let seconds = |value: Option<i32>, default: u64| {
        Duration::from_secs(
            value
                .and_then(|v| u64::try_from(v).ok())
                .filter(|v| *v > 0)
                .unwrap_or(default),
        )
    };
    let (period, timeout) = (
        seconds(probe.period_seconds, 10),
        seconds(probe.timeout_seconds, 1),
    );
    let needed = (
        probe.success_threshold.unwrap_or(1).max(1),
        probe.failure_threshold.unwrap_or(3).max(1),
    );
    tokio::time::sleep(Duration::from_secs(
        probe.initial_delay_seconds.unwrap_or(0).max(0) as u64,
    ))
    .await;
    let mut ticks = tokio::time::interval(period);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut passes, mut failures) = (0, 0);
    let mut told = None;
    loop {
        ticks.tick().await;
        let outcome =
            match tokio::time::timeout(timeout, once(&runtime, &target, &probe, timeout)).await {
                Ok(outcome) => outcome,
                Err(_) => Err(anyhow::anyhow!("no answer within {} s", timeout.as_secs())),
            };
        let message = outcome
            .as_ref()
            .err()
            .map(|error| format!("{error:#}"))
            .unwrap_or_default();
        if outcome.is_ok() {
            (passes, failures) = (passes + 1, 0);
        } else {
            (passes, failures) = (0, failures + 1);
        }
        let verdict = if passes >= needed.0 {
            Some(true)
        } else if failures >= needed.1 {
            Some(false)
        } else {
            None
        };
        // A readiness probe that has said nothing yet means not ready; it is told once, with the reason.
        let first_failure = outcome.is_err() && failures == 1;
        if let Some(passed) = verdict.filter(|passed| told != Some(*passed)).or_else(|| {
            (first_failure && kind == Kind::Readiness && told.is_none()).then_some(false)
        }) {
            told = Some(passed);
            let verdict = Verdict {
                container_id: target.container_id.clone(),
                container: target.container.name.clone(),
                kind,
                passed,
                message,
            };
            if verdicts.send(verdict).is_err() {
                return;
            }
            // A startup probe is over with its first verdict, a liveness probe with its first failure.
            if kind == Kind::Startup || kind == Kind::Liveness && !passed {
                return;
            }
        }
    }
}

async fn once(runtime: &Runtime, target: &Target, probe: &Probe, timeout: Duration) -> Result<()> {
    if let Some(get) = &probe.http_get {
        let port = port_of(&target.container, &get.port);
        let Some(port) = port else {
            bail!("port {:?} is not known", get.port)
        };
        let status = http_get(get, &target.pod_ip, port).await?;
        if !(200..400).contains(&status) {
            bail!("HTTP probe failed with statuscode: {status}");
        }
        return Ok(());
    }
    if let Some(tcp) = &probe.tcp_socket {
        let Some(port) = port_of(&target.container, &tcp.port) else {
            bail!("port {:?} is not known", tcp.port)
        };
        let host = tcp
            .host
            .as_deref()
            .filter(|host| !host.is_empty())
            .unwrap_or(&target.pod_ip);
        TcpStream::connect((host, port)).await?;
        return Ok(());
    }
    if let Some(exec) = &probe.exec {
        let (code, output) = runtime
            .exec_sync(
                &target.container_id,
                exec.command.clone().unwrap_or_default(),
                timeout,
            )
            .await?;
        if code != 0 {
            bail!("{}", String::from_utf8_lossy(&output).trim());
        }
        return Ok(());
    }
    bail!("this kind of probe is not supported by this kubelet")
}

/// One GET; its status.
pub(crate) async fn http_get(get: &HTTPGetAction, pod_ip: &str, port: u16) -> Result<u16> {
    if get
        .scheme
        .as_deref()
        .is_some_and(|scheme| scheme.eq_ignore_ascii_case("https"))
    {
        bail!("HTTPS probes are not supported by this kubelet");
    }
    let host = get
        .host
        .as_deref()
        .filter(|host| !host.is_empty())
        .unwrap_or(pod_ip);
    let stream = TcpStream::connect((host, port)).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let path = get
        .path
        .as_deref()
        .filter(|path| path.starts_with('/'))
        .unwrap_or("/");
    let mut request = http::Request::get(path)
        .header(http::header::HOST, format!("{host}:{port}"))
        .header(http::header::USER_AGENT, "kube-probe/1.36")
        .header(http::header::ACCEPT, "*/*")
        .header(http::header::CONNECTION, "close");
    for header in get.http_headers.iter().flatten() {
        request = request.header(header.name.as_str(), header.value.as_str());
    }
    let response = sender
        .send_request(request.body(Empty::<Bytes>::new())?)
        .await?;
    connection.abort();
    Ok(response.status().as_u16())
}
