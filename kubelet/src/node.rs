//! The Node object and its Lease: registered once, renewed every ten seconds, its status written on change.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures::StreamExt;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::{
    ContainerImage, DaemonEndpoint, Node, NodeAddress, NodeCondition, NodeDaemonEndpoints,
    NodeSpec, NodeStatus, NodeSystemInfo,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config::Config;
use crate::pressure::{Gauge, Pressure};
use crate::runtime::{Readiness, Runtime};
use crate::status::now;

/// Upstream's rhythm: a lease of 40 s renewed every 10 s, the status at least every 5 min.
const LEASE_SECONDS: i32 = 40;
const RENEW_EVERY: Duration = Duration::from_secs(10);
const STATUS_EVERY: u32 = 30;

/// A runtime that is not ready is asked again after the first of these, then after twice as long, up to the second;
/// once the node has been at it for `START`, up to the third.
const ASK_AGAIN: Duration = Duration::from_millis(25);
const ASK_AGAIN_AT_START: Duration = Duration::from_millis(200);
const ASK_AGAIN_LATER: Duration = Duration::from_secs(1);
const START: Duration = Duration::from_secs(30);
/// For so long a node that was ready before this kubelet began is not called unready because its runtime or network
/// is only beginning, too: its pods run on, and Services would stop sending to them.
const BENEFIT: Duration = Duration::from_secs(10);

/// What the node's status depends on.
#[derive(Clone, PartialEq)]
struct Facts {
    readiness: Readiness,
    pressure: Pressure,
    images: Vec<(Vec<String>, i64)>,
}

/// Registers the node and keeps it fresh until `shutdown`; `told` is told what the runtime says of itself.
pub(crate) async fn run(
    client: kube::Client,
    config: Arc<Config>,
    runtime: Runtime,
    told: watch::Sender<Option<Readiness>>,
    shutdown: CancellationToken,
) -> Result<()> {
    let mut eyes = Eyes {
        config: config.clone(),
        runtime,
        gauge: Gauge::default(),
        told,
    };
    tokio::select! {
        () = shutdown.cancelled() => Ok(()),
        () = keep(client, config, &mut eyes) => Ok(()),
    }
}

/// How the node sees its own state.
struct Eyes {
    config: Arc<Config>,
    runtime: Runtime,
    gauge: Gauge,
    told: watch::Sender<Option<Readiness>>,
}

impl Eyes {
    async fn readiness(&self) -> Readiness {
        let readiness = self.runtime.readiness().await.unwrap_or_else(|error| {
            let down = format!("container runtime is down: {error:#}");
            // Of the network nothing is known then.
            let before = self.told.borrow().clone().unwrap_or_default();
            Readiness {
                runtime: Some(down),
                ..before
            }
        });
        self.told.send_if_modified(|told| {
            let news = told.as_ref() != Some(&readiness);
            *told = Some(readiness.clone());
            news
        });
        readiness
    }

    async fn facts(&mut self) -> Facts {
        let pressure = self.gauge.read(&self.config.root).unwrap_or_else(|error| {
            let error = format!("{error:#}");
            warn!(error, "could not see what the node is short of");
            Pressure::default()
        });
        Facts {
            readiness: self.readiness().await,
            pressure,
            images: self.runtime.list_images().await.unwrap_or_default(),
        }
    }
}

async fn keep(client: kube::Client, config: Arc<Config>, eyes: &mut Eyes) {
    let nodes = Api::<Node>::all(client.clone());
    let leases = Api::<Lease>::namespaced(client, "kube-node-lease");
    let mut node = registered(&nodes, &config, eyes).await;
    let itself = watcher::Config::default().fields(&format!("metadata.name={}", config.node_name));
    let mut changes = std::pin::pin!(watcher(nodes.clone(), itself).default_backoff());
    let mut there = true;
    let mut written: Option<Facts> = None;
    let mut round = 0u32;
    let started = Instant::now();
    let was_ready = is_ready(&node);
    let mut held = false;
    let mut again = ASK_AGAIN;
    let mut ticks = tokio::time::interval(RENEW_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // Until the runtime is ready it is asked again and again, but nothing else is done more often.
        let waits = written.as_ref().map(|facts| &facts.readiness);
        let waits = waits.filter(|readiness| readiness.message().is_some());
        tokio::select! {
            _ = ticks.tick() => {
                round += 1;
                if let Err(error) = renew(&leases, &config, &node).await {
                    let error = format!("{error:#}");
                    warn!(error, "could not renew the node's lease");
                }
            }
            () = tokio::time::sleep(again), if waits.is_some() => {
                let longest = if started.elapsed() < START {
                    ASK_AGAIN_AT_START
                } else {
                    ASK_AGAIN_LATER
                };
                again = (again * 2).min(longest);
                let over = held && started.elapsed() >= BENEFIT;
                if waits == Some(&eyes.readiness().await) && !over {
                    continue;
                }
            }
            Some(change) = changes.next() => {
                let lost = match change {
                    // A fresh list: the node is there if it is in it.
                    Ok(Event::Init) => {
                        there = false;
                        false
                    }
                    Ok(Event::InitApply(_) | Event::Apply(_)) => {
                        there = true;
                        false
                    }
                    Ok(Event::InitDone) => !there,
                    Ok(Event::Delete(_)) => true,
                    Err(error) => {
                        warn!(%error, "the watch of the node failed; trying again");
                        false
                    }
                };
                if !lost {
                    continue;
                }
                warn!(node = config.node_name, "the node was deleted; registering it again");
                node = registered(&nodes, &config, eyes).await;
                written = None;
                ticks.reset_immediately();
            }
        }
        let facts = eyes.facts().await;
        if facts.readiness.message().is_none() {
            again = ASK_AGAIN;
        }
        if was_ready && facts.readiness.message().is_some() && started.elapsed() < BENEFIT {
            (written, held) = (Some(facts), true);
            continue;
        }
        if std::mem::take(&mut held) || written.as_ref() != Some(&facts) || round >= STATUS_EVERY {
            match write_status(&nodes, &config, &eyes.runtime, &facts).await {
                Ok(true) => (written, round) = (Some(facts), 0),
                // A kubelet before this one said the very same within this second: whoever waits for this one's word
                // hears it in the next.
                Ok(false) => {
                    (written, round) = (Some(facts), STATUS_EVERY);
                    ticks.reset_after(Duration::from_secs(1));
                }
                Err(error) => {
                    let error = format!("{error:#}");
                    warn!(error, "could not write the node's status");
                }
            }
        }
    }
}

/// Whether the API says that the node is ready.
fn is_ready(node: &Node) -> bool {
    let status = node.status.as_ref();
    let conditions = status.and_then(|status| status.conditions.as_ref());
    let mut all = conditions.into_iter().flatten();
    all.any(|one| one.type_ == "Ready" && one.status == "True")
}

/// Registers the node, however long that takes.
async fn registered(nodes: &Api<Node>, config: &Config, eyes: &mut Eyes) -> Node {
    loop {
        match register(nodes, config, eyes).await {
            Ok(node) => {
                info!(node = config.node_name, "registered");
                return node;
            }
            Err(error) => {
                let error = format!("{error:#}");
                warn!(error, "could not register the node; trying again");
            }
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

async fn register(nodes: &Api<Node>, config: &Config, eyes: &mut Eyes) -> Result<Node> {
    if let Some(node) = nodes
        .get_opt(&config.node_name)
        .await
        .context("could not read the node")?
    {
        return Ok(node);
    }
    let facts = eyes.facts().await;
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let labels: BTreeMap<String, String> = [
        ("kubernetes.io/hostname", config.node_name.as_str()),
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", arch),
        ("beta.kubernetes.io/os", "linux"),
        ("beta.kubernetes.io/arch", arch),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into();
    let cidrs: Vec<String> = config.pod_cidrs.iter().map(ToString::to_string).collect();
    let node = Node {
        metadata: ObjectMeta {
            name: Some(config.node_name.clone()),
            labels: Some(labels),
            ..ObjectMeta::default()
        },
        spec: Some(NodeSpec {
            pod_cidr: cidrs.first().cloned(),
            pod_cidrs: Some(cidrs).filter(|cidrs| !cidrs.is_empty()),
            ..NodeSpec::default()
        }),
        status: Some(status(config, &eyes.runtime, None, &facts)?),
    };
    nodes
        .create(&PostParams::default(), &node)
        .await
        .context("could not create the node")
}

/// The node's addresses, and its name.
fn addresses(config: &Config) -> Vec<NodeAddress> {
    let address = |type_: &str, address: String| NodeAddress {
        type_: type_.into(),
        address,
    };
    let own = config.node_addresses().into_iter();
    own.map(|ip| address("InternalIP", ip))
        .chain([address("Hostname", config.node_name.clone())])
        .collect()
}

/// Writes the node's status; false if that was already written, word for word.
async fn write_status(
    nodes: &Api<Node>,
    config: &Config,
    runtime: &Runtime,
    facts: &Facts,
) -> Result<bool> {
    let old = nodes
        .get(&config.node_name)
        .await
        .context("could not read the node")?;
    let status = status(config, runtime, old.status.as_ref(), facts)?;
    let mut patch = serde_json::json!({"status": status});
    // The list's merge key is the type, of which two families have two: it is replaced whole, as upstream does.
    if let Some(addresses) = patch["status"]["addresses"].as_array_mut() {
        addresses.push(serde_json::json!({"$patch": "replace"}));
    }
    let new = nodes
        .patch_status(
            &config.node_name,
            &PatchParams::default(),
            &Patch::Strategic(patch),
        )
        .await
        .context("could not patch the node")?;
    Ok(new.metadata.resource_version != old.metadata.resource_version)
}

async fn renew(leases: &Api<Lease>, config: &Config, node: &Node) -> Result<()> {
    let time = Some(MicroTime(Timestamp::now()));
    let patch = serde_json::json!({"spec": {"renewTime": time}});
    match leases
        .patch(
            &config.node_name,
            &PatchParams::default(),
            &Patch::Merge(patch),
        )
        .await
    {
        Err(kube::Error::Api(status)) if status.code == 404 => {}
        other => return other.map(drop).context("could not patch the lease"),
    }
    let owner = OwnerReference {
        api_version: "v1".into(),
        kind: "Node".into(),
        name: config.node_name.clone(),
        uid: node.metadata.uid.clone().unwrap_or_default(),
        ..OwnerReference::default()
    };
    let lease = Lease {
        metadata: ObjectMeta {
            name: Some(config.node_name.clone()),
            owner_references: Some(vec![owner]),
            ..ObjectMeta::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some(config.node_name.clone()),
            lease_duration_seconds: Some(LEASE_SECONDS),
            renew_time: time,
            ..LeaseSpec::default()
        }),
    };
    leases
        .create(&PostParams::default(), &lease)
        .await
        .map(drop)
        .context("could not create the lease")
}

fn status(
    config: &Config,
    runtime: &Runtime,
    old: Option<&NodeStatus>,
    facts: &Facts,
) -> Result<NodeStatus> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let memory_kib: u64 = read("/proc/meminfo")
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemTotal:")?
                .trim()
                .strip_suffix(" kB")?
                .parse()
                .ok()
        })
        .unwrap_or(0);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let disk =
        nix::sys::statvfs::statvfs(&config.root).context("could not ask for the disk's size")?;
    let disk_bytes = disk.blocks() * disk.fragment_size();
    let amount = |cpu: String, memory: u64, disk: u64| -> BTreeMap<String, Quantity> {
        [
            ("cpu", cpu),
            ("memory", format!("{memory}Ki")),
            ("ephemeral-storage", disk.to_string()),
            ("pods", config.max_pods.to_string()),
        ]
        .map(|(name, value)| (name.to_owned(), Quantity(value)))
        .into()
    };
    let condition = |kind: &str, status: &str, reason: &str, message: String| {
        let before = old
            .and_then(|old| old.conditions.as_ref())
            .and_then(|all| all.iter().find(|c| c.type_ == kind && c.status == status));
        NodeCondition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message),
            last_heartbeat_time: Some(now()),
            last_transition_time: before
                .and_then(|c| c.last_transition_time.clone())
                .or_else(|| Some(now())),
        }
    };
    let os = read("/etc/os-release");
    let pretty = os
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="))
        .map(|name| name.trim_matches('"').to_owned());
    let uname = nix::sys::utsname::uname().context("could not read the kernel's version")?;
    let ready = match facts.readiness.message() {
        None => condition(
            "Ready",
            "True",
            "KubeletReady",
            "kubelet is posting ready status".into(),
        ),
        Some(why) => condition("Ready", "False", "KubeletNotReady", why),
    };
    let memory = if facts.pressure.memory {
        condition(
            "MemoryPressure",
            "True",
            "KubeletHasInsufficientMemory",
            "kubelet has insufficient memory available".into(),
        )
    } else {
        condition(
            "MemoryPressure",
            "False",
            "KubeletHasSufficientMemory",
            "kubelet has sufficient memory available".into(),
        )
    };
    let disk_pressure = if facts.pressure.disk {
        condition(
            "DiskPressure",
            "True",
            "KubeletHasDiskPressure",
            "kubelet has disk pressure".into(),
        )
    } else {
        condition(
            "DiskPressure",
            "False",
            "KubeletHasNoDiskPressure",
            "kubelet has no disk pressure".into(),
        )
    };
    Ok(NodeStatus {
        // A hundredth of a core and 64 MiB are kept for the node's own parts.
        capacity: Some(amount(cores.to_string(), memory_kib, disk_bytes)),
        allocatable: Some(amount(
            format!("{}m", cores * 1000 - 10),
            memory_kib.saturating_sub(64 * 1024),
            disk_bytes / 10 * 9,
        )),
        addresses: Some(addresses(config)),
        conditions: Some(vec![
            memory,
            disk_pressure,
            condition(
                "PIDPressure",
                "False",
                "KubeletHasSufficientPID",
                "kubelet has sufficient PID available".into(),
            ),
            ready,
        ]),
        daemon_endpoints: Some(NodeDaemonEndpoints {
            kubelet_endpoint: Some(DaemonEndpoint {
                port: config.port.into(),
            }),
        }),
        images: Some(
            facts
                .images
                .iter()
                .map(|(names, size)| ContainerImage {
                    names: Some(names.clone()),
                    size_bytes: Some(*size),
                })
                .collect(),
        ),
        node_info: Some(NodeSystemInfo {
            architecture: if std::env::consts::ARCH == "x86_64" {
                "amd64".into()
            } else {
                std::env::consts::ARCH.into()
            },
            boot_id: read("/proc/sys/kernel/random/boot_id").trim().to_owned(),
            container_runtime_version: runtime.version.clone(),
            kernel_version: uname.release().to_string_lossy().into_owned(),
            kube_proxy_version: String::new(),
            kubelet_version: concat!("v1.36.0+xebec-", env!("CARGO_PKG_VERSION")).into(),
            machine_id: read("/etc/machine-id").trim().to_owned(),
            operating_system: "linux".into(),
            os_image: pretty.unwrap_or_else(|| "Linux".into()),
            system_uuid: read("/sys/class/dmi/id/product_uuid").trim().to_owned(),
            ..NodeSystemInfo::default()
        }),
        ..NodeStatus::default()
    })
}
