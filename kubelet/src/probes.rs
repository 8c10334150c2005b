//! Probes: each runs in a task of its own and tells the pod's worker when its verdict changes.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::{Container, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use crate::runtime::Runtime;

mod grpc;
pub(crate) mod http;
mod tls;

/// How a kubelet names itself to those that it asks.
const USER_AGENT: &str = "kube-probe/1.36";

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
        let outcome = once(&runtime, &target, &probe, timeout).await;
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

/// One try, within its time.
async fn once(runtime: &Runtime, target: &Target, probe: &Probe, limit: Duration) -> Result<()> {
    let known = |port: &IntOrString| {
        port_of(&target.container, port).with_context(|| match port {
            IntOrString::Int(number) => format!("invalid port number: {number}"),
            IntOrString::String(name) => format!("couldn't find port: {name:?}"),
        })
    };
    if let Some(get) = &probe.http_get {
        let port = known(&get.port)?;
        let asked = tokio::time::timeout(limit, http::get(get, &target.pod_ip, port)).await;
        let Ok(status) = asked else {
            let url = http::shown(get, &target.pod_ip, port);
            bail!(
                "Get {url:?}: context deadline exceeded (Client.Timeout exceeded while awaiting headers)"
            );
        };
        let status = status?;
        if !(200..400).contains(&status) {
            bail!("HTTP probe failed with statuscode: {status}");
        }
        return Ok(());
    }
    if let Some(tcp) = &probe.tcp_socket {
        let port = known(&tcp.port)?;
        let host = tcp.host.as_deref().filter(|host| !host.is_empty());
        let host = host.unwrap_or(&target.pod_ip);
        return match tokio::time::timeout(limit, connect(host, port)).await {
            Ok(connected) => connected.map(drop),
            Err(_) => bail!("dial tcp {}: i/o timeout", address(host, port)),
        };
    }
    if let Some(grpc) = &probe.grpc {
        let port = known(&IntOrString::Int(grpc.port))?;
        let service = grpc.service.as_deref().unwrap_or_default();
        return grpc::check(&target.pod_ip, port, service, limit).await;
    }
    if let Some(exec) = &probe.exec {
        let command = exec.command.clone().unwrap_or_default();
        let shown = command.join(" ");
        // The runtime keeps the time, and ends the command with it; it is not waited for without end.
        let exec = runtime.exec_sync(&target.container_id, command, limit);
        let patience = limit + Duration::from_secs(5);
        let (code, output) = match tokio::time::timeout(patience, exec).await {
            Ok(outcome) => outcome?,
            Err(_) => bail!(
                "command {shown:?} timed out: no answer within {} s",
                patience.as_secs()
            ),
        };
        if code != 0 {
            bail!("{}", String::from_utf8_lossy(&output).trim());
        }
        return Ok(());
    }
    bail!("the probe says not what to do")
}

/// `host:port`, with IPv6 addresses in brackets.
fn address(host: &str, port: u16) -> String {
    if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

async fn connect(host: &str, port: u16) -> Result<TcpStream> {
    TcpStream::connect((host, port)).await.map_err(|error| {
        let what = match error.kind() {
            std::io::ErrorKind::ConnectionRefused => "connect: connection refused".to_owned(),
            _ => error.to_string(),
        };
        anyhow::anyhow!("dial tcp {}: {what}", address(host, port))
    })
}
