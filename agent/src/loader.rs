//! Loads the eBPF programs, attaches them, and keeps them attached beyond the agent's life by pinned links.

use std::path::Path;

use anyhow::{Context, Result};
use aya::maps::{HashMap, MapData};
use aya::programs::links::FdLink;
use aya::programs::{CgroupAttachMode, CgroupSockAddr};
use aya::{Ebpf, EbpfLoader};
use xebec_dataplane_common::{Address, BackendKey, FrontendKey, FrontendValue};

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
    "xebec_recvmsg4",
    "xebec_sendmsg4",
    "xebec_connect4",
];

/// Programs that are loaded and not yet attached.
pub struct Loaded {
    ebpf: Ebpf,
}

/// The maps of Services.
pub struct ServiceMaps {
    frontends: HashMap<MapData, [u8; 8], [u8; 8]>,
    backends: HashMap<MapData, [u8; 8], [u8; 8]>,
}

impl Loaded {
    /// Loads every program; the kernel checks them.
    pub fn new() -> Result<Self> {
        let mut ebpf = EbpfLoader::new()
            .load(object()?)
            .context("the kernel refused the eBPF maps (is this root?)")?;
        for name in SOCKET_HOOKS {
            socket_hook(&mut ebpf, name)?
                .load()
                .with_context(|| format!("the kernel refused the eBPF program {name}"))?;
        }
        Ok(Self { ebpf })
    }

    /// The maps of Services, once.
    pub fn service_maps(&mut self) -> Result<ServiceMaps> {
        let mut take = |name: &str| -> Result<HashMap<MapData, [u8; 8], [u8; 8]>> {
            let map = self
                .ebpf
                .take_map(name)
                .with_context(|| format!("the eBPF object has no map {name}"))?;
            HashMap::try_from(map)
                .with_context(|| format!("the eBPF map {name} has another layout"))
        };
        Ok(ServiceMaps {
            frontends: take("FRONTENDS")?,
            backends: take("BACKENDS")?,
        })
    }

    /// Attaches the socket hooks to a cgroup, then lets go of those of an agent before this one: at no moment is none attached.
    pub fn attach(mut self, cgroup: &Path, pins: &Path) -> Result<()> {
        let directory = std::fs::File::open(cgroup)
            .with_context(|| format!("could not open {}", cgroup.display()))?;
        let before = pinned(pins)?;
        let stamp = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| since.as_nanos());
        for name in SOCKET_HOOKS {
            let program = socket_hook(&mut self.ebpf, name)?;
            let link = program
                .attach(&directory, CgroupAttachMode::Single)
                .with_context(|| format!("could not attach {name} to {}", cgroup.display()))?;
            let link = program
                .take_link(link)
                .with_context(|| format!("could not keep the link of {name}"))?;
            let link = FdLink::try_from(link)
                .with_context(|| format!("this kernel attaches {name} without a link"))?;
            link.pin(pins.join(format!("{name}-{stamp}")))
                .with_context(|| format!("could not pin the link of {name}"))?;
        }
        for path in before {
            std::fs::remove_file(&path)
                .with_context(|| format!("could not remove {}", path.display()))?;
        }
        Ok(())
    }
}

fn socket_hook<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut CgroupSockAddr> {
    let program = ebpf
        .program_mut(name)
        .with_context(|| format!("the eBPF object has no program {name}"))?;
    program
        .try_into()
        .with_context(|| format!("the eBPF program {name} is of another kind"))
}

/// What is pinned in a folder, which is made where it is missing.
fn pinned(dir: &Path) -> Result<Vec<std::path::PathBuf>> {
    std::fs::create_dir_all(dir).with_context(|| format!("could not make {}", dir.display()))?;
    let entries =
        std::fs::read_dir(dir).with_context(|| format!("could not list {}", dir.display()))?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

/// Mounts a BPF filesystem of our own, where pins lie, unless it is there from before.
pub fn mount(dir: &Path) -> Result<()> {
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

impl ServiceMaps {
    /// Writes a set of backends, which nothing refers to yet.
    pub fn add_set(&mut self, set: u32, backends: &[Address]) -> Result<()> {
        for (slot, backend) in backends.iter().enumerate() {
            let key = BackendKey {
                set,
                slot: slot as u32,
            };
            self.backends
                .insert(key.to_bytes(), backend.to_bytes(), 0)
                .context("the map of backends is full")?;
        }
        Ok(())
    }

    /// Points a frontend at a set.
    pub fn set_frontend(&mut self, key: FrontendKey, value: FrontendValue) -> Result<()> {
        self.frontends
            .insert(key.to_bytes(), value.to_bytes(), 0)
            .context("the map of frontends is full")
    }

    /// Removes a frontend; one that is not there is no error.
    pub fn remove_frontend(&mut self, key: FrontendKey) -> Result<()> {
        match self.frontends.remove(&key.to_bytes()) {
            Ok(()) | Err(aya::maps::MapError::KeyNotFound) => Ok(()),
            Err(error) => Err(error).context("could not remove a frontend"),
        }
    }

    /// Removes a set that nothing refers to any more.
    pub fn remove_set(&mut self, set: u32, count: u32) -> Result<()> {
        for slot in 0..count {
            match self.backends.remove(&BackendKey { set, slot }.to_bytes()) {
                Ok(()) | Err(aya::maps::MapError::KeyNotFound) => {}
                Err(error) => return Err(error).context("could not remove a backend"),
            }
        }
        Ok(())
    }
}
