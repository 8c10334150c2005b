//! A pod's status, from what the runtime has and what the probes say.

use k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStateRunning, ContainerStateTerminated,
    ContainerStateWaiting, ContainerStatus, HostIP, Pod, PodCondition, PodIP, PodStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use xebec_cri_api::v1;

use crate::runtime::{PodState, RESTARTS};

/// What the worker knows of one container beyond the runtime.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known {
    /// Why it is not running, where the runtime has nothing of it: `ImagePullBackOff` and so on.
    pub waiting: Option<(String, String)>,
    /// The startup probe has passed, or there is none.
    pub started: bool,
    /// The readiness probe has passed, or there is none.
    pub ready: bool,
}

/// Nanoseconds since the epoch as the API shows times; none for 0.
fn time(nanos: i64) -> Option<Time> {
    if nanos == 0 {
        return None;
    }
    Timestamp::from_second(nanos / 1_000_000_000).ok().map(Time)
}

fn terminated(container: &v1::ContainerStatus, runtime_name: &str) -> ContainerStateTerminated {
    let reason = match (container.reason.as_str(), container.exit_code) {
        ("", 0) => "Completed",
        ("", _) => "Error",
        (reason, _) => reason,
    };
    ContainerStateTerminated {
        container_id: Some(format!("{runtime_name}://{}", container.id)),
        exit_code: container.exit_code,
        finished_at: time(container.finished_at),
        message: Some(container.message.clone()).filter(|message| !message.is_empty()),
        reason: Some(reason.to_owned()),
        signal: None,
        started_at: time(container.started_at),
    }
}

/// Restarts before this container, as its annotation says.
pub(crate) fn restarts(container: &v1::ContainerStatus) -> i32 {
    container
        .annotations
        .get(RESTARTS)
        .and_then(|text| text.parse().ok())
        .unwrap_or(0)
}

/// One container's status.
pub(crate) fn container_status(
    spec: &Container,
    state: &PodState,
    known: &Known,
    runtime_name: &str,
    init: bool,
    creating: &str,
) -> ContainerStatus {
    let latest = state.latest(&spec.name);
    let mut status = ContainerStatus {
        name: spec.name.clone(),
        image: spec.image.clone().unwrap_or_default(),
        image_id: String::new(),
        started: Some(false),
        ..ContainerStatus::default()
    };
    let waiting = |reason: &str, message: Option<String>| ContainerState {
        waiting: Some(ContainerStateWaiting {
            reason: Some(reason.to_owned()),
            message,
        }),
        ..ContainerState::default()
    };
    let not_yet = || match &known.waiting {
        Some((reason, message)) => waiting(reason, Some(message.clone()).filter(|m| !m.is_empty())),
        None => waiting(creating, None),
    };
    let Some(container) = latest else {
        status.state = Some(not_yet());
        return status;
    };
    status.container_id = Some(format!("{runtime_name}://{}", container.id));
    status.image_id = container.image_ref.clone();
    status.restart_count = restarts(container);
    let ended = |container: &v1::ContainerStatus| ContainerState {
        terminated: Some(terminated(container, runtime_name)),
        ..ContainerState::default()
    };
    status.last_state = state
        .previous(&spec.name)
        .filter(|previous| previous.state() == v1::ContainerState::ContainerExited)
        .map(ended);
    match container.state() {
        v1::ContainerState::ContainerRunning => {
            status.state = Some(ContainerState {
                running: Some(ContainerStateRunning {
                    started_at: time(container.started_at),
                }),
                ..ContainerState::default()
            });
            status.started = Some(known.started);
            status.ready = known.ready && known.started;
        }
        v1::ContainerState::ContainerExited => match &known.waiting {
            // It is to run again: what it waits for shows as its state, how it ended as the last one.
            Some((reason, message)) => {
                status.state = Some(waiting(reason, Some(message.clone())));
                status.last_state = Some(ended(container));
            }
            None => {
                status.state = Some(ended(container));
                status.ready = init && container.exit_code == 0;
            }
        },
        _ => status.state = Some(not_yet()),
    }
    status
}

/// Whether an init container runs beside the others (KEP-753).
pub(crate) fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// What a status is made from besides the containers.
pub(crate) struct Facts<'a> {
    pub pod: &'a Pod,
    pub state: &'a PodState,
    pub node_ips: Vec<String>,
    pub runtime_name: &'a str,
    pub known: &'a dyn Fn(&str) -> Known,
    /// The pod as a whole is over: phase, reason, message.
    pub over: Option<(&'static str, String, String)>,
}

/// The pod's whole status; times of conditions are kept from the old one where they did not change.
pub(crate) fn pod_status(facts: &Facts<'_>) -> PodStatus {
    let (pod, state) = (facts.pod, facts.state);
    let Some(spec) = &pod.spec else {
        return PodStatus::default();
    };
    let old = pod.status.clone().unwrap_or_default();
    // What a container shows that nothing is known of yet.
    let creating = if spec.init_containers.iter().flatten().next().is_some() {
        "PodInitializing"
    } else {
        "ContainerCreating"
    };
    let each = |containers: &[Container], init: bool| -> Vec<ContainerStatus> {
        let status = |c: &Container| {
            let known = (facts.known)(&c.name);
            container_status(c, state, &known, facts.runtime_name, init, creating)
        };
        containers.iter().map(status).collect()
    };
    let init_specs = spec.init_containers.clone().unwrap_or_default();
    let inits = each(&init_specs, true);
    let containers = each(&spec.containers, false);
    let done = |status: &ContainerStatus| {
        status
            .state
            .as_ref()
            .and_then(|s| s.terminated.as_ref())
            .is_some_and(|t| t.exit_code == 0)
    };
    let initialized = init_specs.iter().zip(&inits).all(|(c, status)| {
        if is_sidecar(c) {
            status.started == Some(true)
        } else {
            done(status)
        }
    });
    let policy = spec.restart_policy.as_deref().unwrap_or("Always");
    let ended: Vec<i32> = containers
        .iter()
        .filter_map(|c| c.state.as_ref()?.terminated.as_ref().map(|t| t.exit_code))
        .collect();
    let init_failed = policy == "Never"
        && inits.iter().any(|status| {
            status
                .state
                .as_ref()
                .and_then(|s| s.terminated.as_ref())
                .is_some_and(|t| t.exit_code != 0)
        });
    // One that has never run; one that is to run again shows how it ended before.
    let new = |status: &ContainerStatus| {
        let waits = |state: &ContainerState| state.waiting.is_some();
        let ended = |state: &ContainerState| state.terminated.is_some();
        status.state.as_ref().is_some_and(waits) && !status.last_state.as_ref().is_some_and(ended)
    };
    let all_ended = ended.len() == containers.len() && !containers.is_empty();
    let mut phase = if init_failed {
        "Failed"
    } else if all_ended && policy != "Always" {
        if ended.iter().all(|code| *code == 0) {
            "Succeeded"
        } else if policy == "Never" {
            "Failed"
        } else {
            "Running"
        }
    } else if containers.iter().any(new) {
        "Pending"
    } else {
        "Running"
    };
    let (mut reason, mut message) = (None, None);
    if let Some((over, why, text)) = &facts.over {
        phase = over;
        reason = Some(why.clone()).filter(|why| !why.is_empty());
        message = Some(text.clone()).filter(|text| !text.is_empty());
    }
    let finished = matches!(phase, "Succeeded" | "Failed");
    let unready: Vec<&str> = containers
        .iter()
        .filter(|c| !c.ready)
        .map(|c| c.name.as_str())
        .collect();
    let gates_open = spec.readiness_gates.iter().flatten().all(|gate| {
        old.conditions
            .iter()
            .flatten()
            .any(|c| c.type_ == gate.condition_type && c.status == "True")
    });
    let not_ready: Option<(&str, String)> = if phase == "Succeeded" {
        Some(("PodCompleted", String::new()))
    } else if phase == "Failed" {
        Some(("PodFailed", String::new()))
    } else if !unready.is_empty() {
        Some((
            "ContainersNotReady",
            format!("containers with unready status: [{}]", unready.join(" ")),
        ))
    } else {
        None
    };
    let not_initialized = (!initialized && !finished).then(|| {
        let names: Vec<&str> = inits
            .iter()
            .filter(|status| !done(status))
            .map(|status| status.name.as_str())
            .collect();
        (
            "ContainersNotInitialized",
            format!("containers with incomplete status: [{}]", names.join(" ")),
        )
    });
    let gate_closed =
        (!gates_open && not_ready.is_none()).then(|| ("ReadinessGatesNotReady", String::new()));
    let ready_to_start = state.ready_sandbox().is_some();
    let mut conditions: Vec<PodCondition> = old
        .conditions
        .iter()
        .flatten()
        .filter(|c| {
            ![
                "PodReadyToStartContainers",
                "Initialized",
                "Ready",
                "ContainersReady",
            ]
            .contains(&c.type_.as_str())
        })
        .cloned()
        .collect();
    let mut add = |kind: &str, problem: Option<(&str, String)>, holds: bool| {
        let status = if problem.is_none() && holds {
            "True"
        } else {
            "False"
        };
        let before = old
            .conditions
            .iter()
            .flatten()
            .find(|c| c.type_ == kind && c.status == status);
        let (reason, message) = problem.unwrap_or_default();
        conditions.push(PodCondition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            reason: Some(reason.to_owned()).filter(|r| !r.is_empty()),
            message: Some(message).filter(|m| !m.is_empty()),
            last_transition_time: before
                .and_then(|c| c.last_transition_time.clone())
                .or_else(|| Some(now())),
            ..PodCondition::default()
        });
    };
    add("PodReadyToStartContainers", None, ready_to_start);
    add("Initialized", not_initialized, true);
    add("Ready", not_ready.clone().or(gate_closed), true);
    add("ContainersReady", not_ready, true);
    if !conditions.iter().any(|c| c.type_ == "PodScheduled") {
        conditions.push(PodCondition {
            type_: "PodScheduled".into(),
            status: "True".into(),
            last_transition_time: Some(now()),
            ..PodCondition::default()
        });
    }
    let host_network = spec.host_network.unwrap_or(false);
    let network = state
        .sandboxes
        .first()
        .and_then(|sandbox| sandbox.network.as_ref());
    let ips: Vec<String> = if host_network {
        facts.node_ips.clone()
    } else {
        sandbox_ips(network, &facts.node_ips)
    };
    // What an ended pod had for an address is worth knowing still.
    let ips = if ips.is_empty() {
        old.pod_ips
            .iter()
            .flatten()
            .map(|ip| ip.ip.clone())
            .collect()
    } else {
        ips
    };
    PodStatus {
        phase: Some(phase.to_owned()),
        reason,
        message,
        conditions: Some(conditions),
        host_ip: facts.node_ips.first().cloned(),
        host_ips: Some(
            facts
                .node_ips
                .iter()
                .map(|ip| HostIP { ip: ip.clone() })
                .collect(),
        ),
        pod_ip: ips.first().cloned(),
        pod_ips: Some(ips.into_iter().map(|ip| PodIP { ip }).collect::<Vec<_>>())
            .filter(|ips| !ips.is_empty()),
        start_time: old.start_time.or_else(|| Some(now())),
        init_container_statuses: Some(inits).filter(|inits| !inits.is_empty()),
        container_statuses: Some(containers),
        qos_class: old.qos_class,
        ..PodStatus::default()
    }
}

/// The addresses that a sandbox was given; the first is of the family of the node's first.
pub(crate) fn sandbox_ips(
    network: Option<&v1::PodSandboxNetworkStatus>,
    node_ips: &[String],
) -> Vec<String> {
    let v6 = |ip: &String| ip.contains(':');
    let primary = node_ips.first().is_some_and(v6);
    let told = network.into_iter().flat_map(|network| {
        let more = network.additional_ips.iter().map(|ip| &ip.ip);
        std::iter::once(&network.ip).chain(more)
    });
    let mut ips: Vec<String> = told.filter(|ip| !ip.is_empty()).cloned().collect();
    ips.sort_by_key(|ip| v6(ip) != primary);
    ips
}

/// This second.
pub(crate) fn now() -> Time {
    Time(Timestamp::from_second(Timestamp::now().as_second()).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::CONTAINER_NAME;

    fn pod(policy: &str) -> Pod {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p"},
            "spec": {"restartPolicy": policy, "containers": [{"name": "a", "image": "i"}, {"name": "b", "image": "i"}]},
        })).unwrap()
    }

    fn container(name: &str, state: v1::ContainerState, exit_code: i32) -> v1::ContainerStatus {
        v1::ContainerStatus {
            id: format!("id-{name}"),
            state: state as i32,
            exit_code,
            created_at: 1,
            started_at: 1_000_000_000,
            labels: [(CONTAINER_NAME.to_owned(), name.to_owned())].into(),
            ..Default::default()
        }
    }

    fn phase(policy: &str, containers: Vec<v1::ContainerStatus>) -> (String, String) {
        let (pod, state) = (
            pod(policy),
            PodState {
                sandboxes: vec![],
                containers,
            },
        );
        let known = |_: &str| Known {
            waiting: None,
            started: true,
            ready: true,
        };
        let status = pod_status(&Facts {
            pod: &pod,
            state: &state,
            node_ips: vec!["1.2.3.4".into()],
            runtime_name: "xebec",
            known: &known,
            over: None,
        });
        let ready = status
            .conditions
            .unwrap()
            .into_iter()
            .find(|c| c.type_ == "Ready")
            .unwrap()
            .status;
        (status.phase.unwrap(), ready)
    }

    #[test]
    fn what_a_container_waits_for_is_its_state() {
        let (pod, created) = (
            pod("Always"),
            container("a", v1::ContainerState::ContainerCreated, 0),
        );
        let state = PodState {
            sandboxes: vec![],
            containers: vec![created],
        };
        let known = |name: &str| Known {
            waiting: (name == "a").then(|| ("RunContainerError".into(), "no such file".into())),
            ..Known::default()
        };
        let status = pod_status(&Facts {
            pod: &pod,
            state: &state,
            node_ips: vec!["1.2.3.4".into()],
            runtime_name: "xebec",
            known: &known,
            over: None,
        });
        let waiting: Vec<_> = status
            .container_statuses
            .unwrap()
            .into_iter()
            .map(|c| c.state.unwrap().waiting.unwrap())
            .map(|w| (w.reason.unwrap(), w.message))
            .collect();
        assert_eq!(
            waiting[0],
            ("RunContainerError".into(), Some("no such file".into()))
        );
        assert_eq!(waiting[1], ("ContainerCreating".into(), None));
        assert_eq!(status.phase.as_deref(), Some("Pending"));
    }

    #[test]
    fn phases() {
        use v1::ContainerState::{ContainerExited as Exited, ContainerRunning as Running};
        let is = |phase: &str, ready: &str| (phase.to_owned(), ready.to_owned());
        assert_eq!(phase("Always", vec![]), is("Pending", "False"));
        assert_eq!(
            phase(
                "Always",
                vec![container("a", Running, 0), container("b", Running, 0)]
            ),
            is("Running", "True")
        );
        assert_eq!(
            phase(
                "Always",
                vec![container("a", Exited, 0), container("b", Exited, 0)]
            ),
            is("Running", "False")
        );
        assert_eq!(
            phase(
                "Never",
                vec![container("a", Exited, 0), container("b", Exited, 0)]
            ),
            is("Succeeded", "False")
        );
        assert_eq!(
            phase(
                "Never",
                vec![container("a", Exited, 0), container("b", Exited, 3)]
            ),
            is("Failed", "False")
        );
        assert_eq!(
            phase(
                "OnFailure",
                vec![container("a", Exited, 0), container("b", Exited, 3)]
            ),
            is("Running", "False")
        );
        assert_eq!(
            phase(
                "Never",
                vec![container("a", Exited, 1), container("b", Running, 0)]
            ),
            is("Running", "False")
        );
    }

    #[test]
    fn a_pod_has_its_addresses_in_the_nodes_order() {
        let ips = |sandbox: &[&str], node: &[&str], host_network: bool| {
            let mut pod = pod("Always");
            pod.spec.as_mut().unwrap().host_network = Some(host_network);
            let network = v1::PodSandboxNetworkStatus {
                ip: sandbox[0].into(),
                additional_ips: sandbox[1..]
                    .iter()
                    .map(|ip| v1::PodIp { ip: (*ip).into() })
                    .collect(),
            };
            let state = PodState {
                sandboxes: vec![v1::PodSandboxStatus {
                    network: Some(network),
                    ..Default::default()
                }],
                containers: vec![],
            };
            let status = pod_status(&Facts {
                pod: &pod,
                state: &state,
                node_ips: node.iter().map(|ip| (*ip).to_owned()).collect(),
                runtime_name: "xebec",
                known: &|_: &str| Known::default(),
                over: None,
            });
            let pods: Vec<String> = status
                .pod_ips
                .unwrap()
                .into_iter()
                .map(|one| one.ip)
                .collect();
            let hosts: Vec<String> = status
                .host_ips
                .unwrap()
                .into_iter()
                .map(|one| one.ip)
                .collect();
            assert_eq!(status.pod_ip.as_ref(), pods.first());
            assert_eq!(status.host_ip.as_ref(), hosts.first());
            assert_eq!(hosts, node);
            pods
        };
        let (node4, node6) = ("192.0.2.1", "fd00::1");
        let own = ["10.0.0.5", "fd00:1::5"];
        assert_eq!(ips(&own, &[node4, node6], false), own);
        assert_eq!(ips(&own, &[node6, node4], false), ["fd00:1::5", "10.0.0.5"]);
        assert_eq!(ips(&["10.0.0.5"], &[node4], false), ["10.0.0.5"]);
        assert_eq!(ips(&[""], &[node4, node6], true), [node4, node6]);
    }
}
