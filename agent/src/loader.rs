//! Loads the eBPF programs, attaches them, and keeps them attached beyond the agent's life by pinned links.

mod express;
mod growth;
pub mod measure;
mod tc;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use aya::Ebpf;
use aya::maps::{HashMap, MapData};
use aya::programs::links::{FdLink, LinkError};
use aya::programs::{
    CgroupAttachMode, CgroupSock, CgroupSockAddr, Program, ProgramError, SchedClassifier,
    TcAttachType,
};

use xebec_dataplane_common::flow::{
    AGGREGATE_LOW, AGGREGATE_MAXIMUM, AGGREGATE_MEDIUM, AGGREGATE_NONE, AGGREGATE_OFF,
};
use xebec_dataplane_common::nat::BACK_BY_TC;

use crate::domains::DomainMaps;
use crate::maps::{FlowMaps, Hits, NetworkMaps, PolicyMaps, ServiceMaps, SocketMap, take};
use crate::network::Device;
pub use express::{By, Xdp};
pub use growth::{AFFINITIES, FLOWS, Grown, Sizes, Step};
pub use tc::detach;

/// Folder of the pinned links of socket hooks.
const CGROUP_LINKS: &str = "links";
/// Folder of the pinned links of pods' devices.
const POD_LINKS: &str = "pods";
/// Folder of the pinned links of devices that lead to the outside.
const NETWORK_LINKS: &str = "network";

/// The object that was built with this agent.
#[cfg(ebpf_object)]
fn object() -> Result<&'static [u8]> {
    Ok(aya::include_bytes_aligned!(concat!(
        env!("OUT_DIR"),
        "/dataplane.o"
    )))
}

/// The object that was built with this agent.
#[cfg(not(ebpf_object))]
fn object() -> Result<&'static [u8]> {
    anyhow::bail!(
        "this executable was built without its eBPF programs; build it with `cargo xtask build`"
    )
}

/// The socket hooks, in the order in which they are attached: what shows translated addresses comes before what translates.
const SOCKET_HOOKS: &[&str] = &[
    "xebec_getpeername4",
    "xebec_getpeername6",
    "xebec_recvmsg4",
    "xebec_recvmsg6",
    "xebec_sendmsg4",
    "xebec_sendmsg6",
    "xebec_connect4",
    "xebec_connect6",
];

/// The hook of a socket's end, which is of another kind.
const SOCKET_END: &str = "xebec_release";

/// The hooks of a pod's device: where they are attached, and their names.
const POD_HOOKS: &[(TcAttachType, &str)] = &[
    (TcAttachType::Ingress, "xebec_from_pod"),
    (TcAttachType::Egress, "xebec_to_pod"),
];

/// The hooks of a device that leads to other nodes and the outside.
const NETWORK_HOOKS: &[(TcAttachType, &str)] = &[
    (TcAttachType::Ingress, "xebec_from_network"),
    (TcAttachType::Egress, "xebec_to_network"),
];

/// Of which packets of flows there are events (`--monitor-aggregation`, with Cilium's names). At all levels but the last
/// there is one for each packet that is dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum Aggregation {
    /// Of each.
    None = AGGREGATE_NONE,
    /// Where a flow begins, is answered and ends, and once in a second.
    Low = AGGREGATE_LOW,
    /// The same, but once in four seconds.
    #[default]
    Medium = AGGREGATE_MEDIUM,
    /// Where it begins and ends, and once in a minute.
    Maximum = AGGREGATE_MAXIMUM,
    /// Of none.
    Off = AGGREGATE_OFF,
}

impl Aggregation {
    /// The one that programs know by this number.
    pub fn of(number: u32) -> Option<Self> {
        let all = [
            Self::None,
            Self::Low,
            Self::Medium,
            Self::Maximum,
            Self::Off,
        ];
        all.into_iter().find(|one| *one as u32 == number)
    }
}

/// Programs that are loaded, and where their links are pinned.
pub struct Loaded {
    ebpf: Ebpf,
    /// The devices that have hooks, by index, and how they send frames back.
    devices: HashMap<MapData, u32, u8>,
    /// A BPF filesystem of our own.
    dir: PathBuf,
    attaching: tc::Attaching,
    pins: growth::Pins,
    attached: growth::Attached,
    /// Why this kernel refuses the XDP program, if it does.
    without_express: Option<String>,
}

/// All maps, each for the part that writes it.
pub struct Maps {
    /// Services.
    pub services: ServiceMaps,
    /// Which sockets Services sent where.
    pub sockets: SocketMap,
    /// How many flows Services got.
    pub hits: Hits,
    /// Endpoints, identities, policy.
    pub policy: PolicyMaps,
    /// Events of flows.
    pub flows: FlowMaps,
    /// Resolvers' answers.
    pub domains: DomainMaps,
    /// Translation.
    pub network: NetworkMaps,
}

impl Loaded {
    /// Loads every program; the kernel checks them. What packets and sockets made is there as the agent before this one
    /// left it, if it had the same layout; everything else is filled anew.
    pub fn new(dir: &Path) -> Result<Self> {
        Self::with_sizes(dir, Sizes::default())
    }

    /// The same, with maps of Services that are so large where no agent before this one needed larger ones.
    pub fn with_sizes(dir: &Path, sizes: Sizes) -> Result<Self> {
        Self::with_aggregation(dir, sizes, Aggregation::default())
    }

    /// The same, with programs that put events together like this.
    pub fn with_aggregation(dir: &Path, sizes: Sizes, aggregation: Aggregation) -> Result<Self> {
        mount(dir)?;
        for links in [CGROUP_LINKS, POD_LINKS, NETWORK_LINKS] {
            let links = dir.join(links);
            std::fs::create_dir_all(&links)
                .with_context(|| format!("could not make {}", links.display()))?;
        }
        let pins = growth::Pins::new(dir, aggregation)?;
        let (mut ebpf, without_express) = pins.load(sizes)?;
        Ok(Self {
            without_express,
            devices: take(&mut ebpf, "DEVICES")?,
            ebpf,
            dir: dir.to_path_buf(),
            attaching: tc::Attaching::new(dir)?,
            pins,
            attached: growth::Attached::default(),
        })
    }

    /// The maps, once.
    pub fn maps(&mut self) -> Result<Maps> {
        Ok(Maps {
            services: ServiceMaps::new(&mut self.ebpf)?,
            sockets: SocketMap::new(&mut self.ebpf)?,
            hits: Hits::new(&mut self.ebpf)?,
            policy: PolicyMaps::new(&mut self.ebpf)?,
            flows: FlowMaps::new(&mut self.ebpf)?,
            domains: DomainMaps::new(&mut self.ebpf)?,
            network: NetworkMaps::new(&mut self.ebpf)?,
        })
    }

    /// Attaches the hooks of a pod's device. Where an agent before this one attached its own, they are replaced
    /// in place: no packet passes unjudged.
    pub fn attach_pod(&mut self, device: &str) -> Result<()> {
        self.attach(POD_LINKS, POD_HOOKS, device)?;
        self.attached.pods.insert(device.to_owned());
        Ok(())
    }

    /// Lets go of the links of a pod's device, which is gone or about to go.
    pub fn detach_pod(&mut self, device: &str) -> Result<()> {
        self.attached.pods.remove(device);
        forget_pod(&self.dir, device)
    }

    /// Attaches the hooks of devices that lead to other nodes and the outside, and lets go of all others. Gives who
    /// does the XDP hook's work on each.
    pub async fn attach_network(&mut self, devices: &[Device], xdp: Xdp) -> Result<Vec<By>> {
        let wanted: Vec<String> = devices
            .iter()
            .flat_map(|device| {
                let tc = NETWORK_HOOKS
                    .iter()
                    .map(|(_, hook)| pin_name(&device.name, hook));
                tc.chain(xdp.pin(device))
            })
            .collect();
        let mut let_go = false;
        for path in pinned(&self.dir.join(NETWORK_LINKS))? {
            if !wanted.iter().any(|name| path.ends_with(name)) {
                std::fs::remove_file(&path)
                    .with_context(|| format!("could not remove {}", path.display()))?;
                let_go = true;
            }
        }
        // Pods' devices have filters at the same places.
        let network = devices.iter().map(|device| device.name.as_str());
        let pods = self.attached.pods.iter().map(String::as_str);
        self.keep_filters(&network.chain(pods).collect())?;
        self.keep_devices(devices)?;
        let mut served = Vec::new();
        for device in devices {
            // tc first: it also has what XDP leaves.
            self.attach(NETWORK_LINKS, NETWORK_HOOKS, &device.name)?;
            let by = self.attach_express(device, xdp, let_go).await?;
            match &by {
                By::Tc(why) => {
                    self.set_device(device, BACK_BY_TC)?;
                    tracing::info!(device = device.name, why, "tc alone translates");
                }
                by => tracing::info!(device = device.name, %by, "XDP translates what is simple"),
            }
            served.push(by);
        }
        self.attached.network = Some((devices.to_vec(), xdp));
        Ok(served)
    }

    /// Tells the programs that a device has hooks, and how it sends frames back.
    fn set_device(&mut self, device: &Device, back: u8) -> Result<()> {
        self.devices
            .insert(device.index, back, 0)
            .context("the map of devices is full")
    }

    /// Takes all other devices out.
    fn keep_devices(&mut self, devices: &[Device]) -> Result<()> {
        let known: Vec<u32> = self
            .devices
            .keys()
            .collect::<Result<_, _>>()
            .context("could not read the map of devices")?;
        for index in known {
            if !devices.iter().any(|device| device.index == index) {
                self.devices
                    .remove(&index)
                    .context("could not take a device out of its map")?;
            }
        }
        Ok(())
    }

    /// Attaches the socket hooks to a cgroup, then lets go of those of an agent before this one: at no moment is none attached.
    pub fn attach_sockets(&mut self, cgroup: &Path) -> Result<()> {
        let pins = self.dir.join(CGROUP_LINKS);
        let directory = std::fs::File::open(cgroup)
            .with_context(|| format!("could not open {}", cgroup.display()))?;
        let before = pinned(&pins)?;
        let stamp = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| since.as_nanos());
        for &name in [SOCKET_END].iter().chain(SOCKET_HOOKS) {
            let link = match name {
                SOCKET_END => {
                    let program = hook::<CgroupSock>(&mut self.ebpf, name)?;
                    let link = program.attach(&directory, CgroupAttachMode::Single);
                    by_descriptor(link.and_then(|link| program.take_link(link)))
                }
                _ => {
                    let program = hook::<CgroupSockAddr>(&mut self.ebpf, name)?;
                    let link = program.attach(&directory, CgroupAttachMode::Single);
                    by_descriptor(link.and_then(|link| program.take_link(link)))
                }
            };
            let link =
                link.with_context(|| format!("could not attach {name} to {}", cgroup.display()))?;
            link.pin(pins.join(format!("{name}-{stamp}")))
                .with_context(|| format!("could not pin the link of {name}"))?;
        }
        for path in before {
            std::fs::remove_file(&path)
                .with_context(|| format!("could not remove {}", path.display()))?;
        }
        self.attached.cgroup = Some(cgroup.to_path_buf());
        Ok(())
    }
}

impl Loaded {
    /// Whether this agent was built with its programs.
    pub const fn built_in() -> bool {
        cfg!(ebpf_object)
    }

    /// A tc program, to be run by `BPF_PROG_TEST_RUN`.
    pub fn classifier(&mut self, name: &str) -> Result<&mut SchedClassifier> {
        hook(&mut self.ebpf, name)
    }
}

/// A link that can be pinned.
fn by_descriptor<L>(link: Result<L, ProgramError>) -> Result<FdLink>
where
    L: TryInto<FdLink, Error = LinkError>,
{
    Ok(link?.try_into()?)
}

/// A program of this name and kind.
fn hook<'a, P>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut P>
where
    &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    let program = ebpf
        .program_mut(name)
        .with_context(|| format!("the eBPF object has no program {name}"))?;
    program
        .try_into()
        .with_context(|| format!("the eBPF program {name} is of another kind"))
}

/// Has the kernel check and take a program. A signal to this process interrupts the check with EAGAIN: it is made again.
fn checked(name: &str, mut load: impl FnMut() -> Result<(), ProgramError>) -> Result<()> {
    let mut tries = 1..TRIES;
    loop {
        match load() {
            Err(error) if interrupted(&error) && tries.next().is_some() => {}
            outcome => {
                return outcome
                    .with_context(|| format!("the kernel refused the eBPF program {name}"));
            }
        }
    }
}

/// How often a check is made that signals interrupt.
const TRIES: usize = 10;

/// Whether a signal interrupted the kernel's check.
fn interrupted(error: &ProgramError) -> bool {
    matches!(error, ProgramError::LoadError { io_error, .. }
        if io_error.kind() == std::io::ErrorKind::WouldBlock)
}

fn pin_name(device: &str, hook: &str) -> String {
    // Devices' names may have dots, those in a BPF filesystem may not.
    format!("{device}-{hook}").replace('.', "_")
}

/// Lets go of the links of a pod's device, which is gone or about to go.
pub fn forget_pod(dir: &Path, device: &str) -> Result<()> {
    for (_, name) in POD_HOOKS {
        let pin = dir.join(POD_LINKS).join(pin_name(device, name));
        match std::fs::remove_file(&pin) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("could not remove {}", pin.display()));
            }
            _ => {}
        }
    }
    tc::forget_pod_filters(dir, device)
}

/// What is pinned in a folder.
fn pinned(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries =
        std::fs::read_dir(dir).with_context(|| format!("could not list {}", dir.display()))?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

/// Mounts a BPF filesystem of our own, where pins lie, unless it is there from before.
fn mount(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("could not make {}", dir.display()))?;
    let there = nix::sys::statfs::statfs(dir)
        .with_context(|| format!("could not look at {}", dir.display()))?;
    if there.filesystem_type() == nix::sys::statfs::BPF_FS_MAGIC {
        return Ok(());
    }
    nix::mount::mount(
        Some("bpf"),
        dir,
        Some("bpf"),
        nix::mount::MsFlags::empty(),
        Some("mode=0700"),
    )
    .with_context(|| {
        format!(
            "could not mount the BPF filesystem on {} (the kernel needs CONFIG_BPF_SYSCALL)",
            dir.display()
        )
    })
}
