//! tc's hooks: attached by links (tcx, Linux 6.6) where the kernel has them, as filters of a `clsact` qdisc elsewhere.

use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use aya::programs::links::{FdLink, Link, LinkOrder, PinnedLink};
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact,
};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType};
use futures::TryStreamExt;
use rtnetlink::packet_route::tc::TcHandle as Parent;

use super::{Loaded, NETWORK_HOOKS, POD_HOOKS, hook, pin_name, pinned};

/// Set to `clsact`, links are not tried.
const CHOICE: &str = "XEBEC_TC";
/// Folder of folders whose names are the numbers of a network namespace and of a device of it whose qdisc is ours.
const QDISCS: &str = "qdiscs";
/// Our filters are the first to see a packet.
const PRIORITY: u16 = 1;

/// How hooks are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// By links, which are pinned and end with their pins.
    Links,
    /// As filters, which end with their device or when they are removed.
    Filters,
}

/// How this kernel attaches hooks, and what tells our filters from others'.
pub(super) struct Attaching {
    way: Option<Way>,
    handle: TcHandle,
}

impl Attaching {
    /// For a BPF filesystem that is mounted already.
    pub(super) fn new(dir: &Path) -> Result<Self> {
        let way = match std::env::var(CHOICE).as_deref() {
            Ok("clsact") => Some(Way::Filters),
            Ok("tcx") => Some(Way::Links),
            Err(std::env::VarError::NotPresent) => None,
            other => anyhow::bail!("{CHOICE} is tcx or clsact, not {other:?}"),
        };
        let qdiscs = dir.join(QDISCS);
        std::fs::create_dir_all(&qdiscs)
            .with_context(|| format!("could not make {}", qdiscs.display()))?;
        Ok(Self {
            way,
            handle: handle(dir)?,
        })
    }
}

/// The number of our filters: the same for every agent that comes to this folder, so that each finds those of the
/// agent before it, and another one for other folders.
fn handle(dir: &Path) -> Result<TcHandle> {
    let path = dir
        .canonicalize()
        .with_context(|| format!("could not look for {}", dir.display()))?;
    // FNV-1a.
    let hash = path
        .as_os_str()
        .as_bytes()
        .iter()
        .fold(0x811c_9dc5_u32, |hash, byte| {
            (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
        });
    // 0 would have the kernel choose, and it keeps the upper half for itself.
    Ok(TcHandle::from((hash & 0x7fff_ffff).max(1)))
}

impl Loaded {
    /// From here on hooks are attached as on kernels without tcx.
    pub fn use_filters(&mut self) {
        self.attaching.way = Some(Way::Filters);
    }

    /// Whether hooks are attached as filters; `None` before the first one.
    pub fn uses_filters(&self) -> Option<bool> {
        self.attaching.way.map(|way| way == Way::Filters)
    }

    /// Attaches hooks to a device. Those of an agent before this one are replaced in place, or, where it attached
    /// them in another way, let go once the new ones are there.
    pub(super) fn attach(
        &mut self,
        links: &str,
        hooks: &[(TcAttachType, &str)],
        device: &str,
    ) -> Result<()> {
        for (place, name) in hooks {
            let pin = self.dir.join(links).join(pin_name(device, name));
            if self.attaching.way != Some(Way::Filters)
                && self.attach_link(&pin, name, device, *place)?
            {
                continue;
            }
            self.attach_filter(name, device, *place)?;
            if pin.exists() {
                std::fs::remove_file(&pin)
                    .with_context(|| format!("could not remove {}", pin.display()))?;
            }
        }
        Ok(())
    }

    /// Attaches by a link; false if this kernel has none for tc.
    fn attach_link(
        &mut self,
        pin: &Path,
        name: &str,
        device: &str,
        place: TcAttachType,
    ) -> Result<bool> {
        let program = hook::<SchedClassifier>(&mut self.ebpf, name)?;
        if pin.exists() {
            let link = PinnedLink::from_pin(pin)
                .with_context(|| format!("could not open {}", pin.display()))?;
            let link = SchedClassifierLink::try_from(FdLink::from(link))
                .with_context(|| format!("{} is another kind of link", pin.display()))?;
            let replaced = program.attach_to_link(link);
            match replaced {
                Ok(link) => {
                    // The pin keeps the link; ours may go.
                    drop(program.take_link(link));
                    return Ok(true);
                }
                // Its device went with its namespace meanwhile.
                Err(error) => {
                    tracing::debug!(%error, device, "a pinned link is of no use any more");
                    std::fs::remove_file(pin)
                        .with_context(|| format!("could not remove {}", pin.display()))?;
                }
            }
        }
        let options = TcAttachOptions::TcxOrder(LinkOrder::default());
        let link = match program.attach_with_options(device, place, options) {
            Err(error) if self.attaching.way.is_none() && is_unknown(&error) => {
                tracing::info!("this kernel has no tcx (Linux 6.6 has): tc's hooks are filters");
                self.attaching.way = Some(Way::Filters);
                return Ok(false);
            }
            outcome => {
                outcome.with_context(|| format!("could not attach {name} to {device} by tcx"))?
            }
        };
        self.attaching.way = Some(Way::Links);
        let link = program
            .take_link(link)
            .with_context(|| format!("could not keep the link of {name}"))?;
        let link = FdLink::try_from(link)
            .with_context(|| format!("this kernel attaches {name} without a link"))?;
        link.pin(pin)
            .with_context(|| format!("could not pin the link of {name} on {device}"))?;
        // An agent that was told to use filters may have been here before.
        remove_filter(device, place, self.attaching.handle)?;
        Ok(true)
    }

    /// Attaches as a filter, or replaces the program of the filter that is there.
    fn attach_filter(&mut self, name: &str, device: &str, place: TcAttachType) -> Result<()> {
        let handle = self.attaching.handle;
        let program = hook::<SchedClassifier>(&mut self.ebpf, name)?;
        let there = SchedClassifierLink::attached(device, place, PRIORITY, handle, None)
            .with_context(|| format!("there is no device {device}"))?;
        let link = match program.attach_to_link(there) {
            Err(error) if is_missing(&error) => {
                add_qdisc(&self.dir, device)?;
                let options = NlOptions {
                    priority: PRIORITY,
                    handle,
                    classid: None,
                };
                program.attach_with_options(device, place, TcAttachOptions::Netlink(options))
            }
            outcome => outcome,
        };
        let link = link
            .map_err(plain)
            .with_context(|| format!("could not attach {name} to {device} as a filter"))?;
        let link = program
            .take_link(link)
            .with_context(|| format!("could not keep the filter of {name}"))?;
        // Dropped, it would remove the filter.
        std::mem::forget(link);
        Ok(())
    }

    /// Lets go of the network's filters on all devices but these.
    pub(super) fn keep_filters(&self, devices: &BTreeSet<&str>) -> Result<()> {
        if self.attaching.way == Some(Way::Filters) {
            for device in all_devices()? {
                if !devices.contains(device.as_str()) {
                    for (place, _) in NETWORK_HOOKS {
                        remove_filter(&device, *place, self.attaching.handle)?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Makes a device's `clsact` qdisc, unless it has one.
fn add_qdisc(dir: &Path, device: &str) -> Result<()> {
    match qdisc_add_clsact(device) {
        Ok(()) => {
            let index = nix::net::if_::if_nametoindex(device)
                .with_context(|| format!("there is no device {device}"))?;
            let note = dir.join(QDISCS).join(format!("{}-{index}", namespace()?));
            std::fs::create_dir_all(&note)
                .with_context(|| format!("could not make {}", note.display()))
        }
        // Somebody else's: it stays when we go.
        Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        Err(TcError::AlreadyAttached) => Ok(()),
        Err(error) => Err(plain(error.into())).with_context(|| {
            format!("could not give {device} a clsact qdisc (the kernel needs CONFIG_NET_SCH_INGRESS and CONFIG_NET_CLS_BPF)")
        }),
    }
}

/// Removes a filter of ours, if it is there.
fn remove_filter(device: &str, place: TcAttachType, handle: TcHandle) -> Result<()> {
    // A device that is gone has none.
    let Ok(link) = SchedClassifierLink::attached(device, place, PRIORITY, handle, None) else {
        return Ok(());
    };
    match link.detach() {
        Err(error) if !is_missing(&error) => {
            Err(plain(error)).with_context(|| format!("could not remove a filter from {device}"))
        }
        _ => Ok(()),
    }
}

/// Removes what a pod's device has of us.
pub(super) fn forget_pod_filters(dir: &Path, device: &str) -> Result<()> {
    // On the way down the filesystem may be gone, and the device with it.
    let Ok(handle) = handle(dir) else {
        return Ok(());
    };
    for (place, _) in POD_HOOKS {
        remove_filter(device, *place, handle)?;
    }
    Ok(())
}

/// Removes what the agents of a BPF filesystem left on the devices of this network namespace besides their links,
/// which end when it is unmounted: filters, and the qdiscs that were made for them if nobody else uses them.
pub fn detach(dir: &Path) -> Result<()> {
    let handle = handle(dir)?;
    for device in all_devices()? {
        for (place, _) in NETWORK_HOOKS.iter().chain(POD_HOOKS) {
            remove_filter(&device, *place, handle)?;
        }
    }
    let notes = dir.join(QDISCS);
    if !notes.exists() {
        return Ok(());
    }
    let here = namespace()?.to_string();
    let (ours, indices): (Vec<PathBuf>, Vec<i32>) = pinned(&notes)?
        .into_iter()
        .filter_map(|note| {
            let (namespace, index) = note.file_name()?.to_str()?.split_once('-')?;
            let index: i32 = index.parse().ok()?;
            (namespace == here).then_some((note.clone(), index))
        })
        .unzip();
    if indices.is_empty() {
        return Ok(());
    }
    // Callers may be in a runtime or in none.
    let thread = std::thread::spawn(move || -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("could not start a runtime")?;
        runtime.block_on(remove_qdiscs(&indices))
    });
    thread
        .join()
        .map_err(|_| anyhow::anyhow!("removing qdiscs panicked"))??;
    for note in ours {
        std::fs::remove_dir(&note)
            .with_context(|| format!("could not remove {}", note.display()))?;
    }
    Ok(())
}

/// Removes the `clsact` qdiscs of devices that have no filter there.
async fn remove_qdiscs(devices: &[i32]) -> Result<()> {
    let handle = crate::link::handle()?;
    for &device in devices {
        let mut filters = handle.traffic_filter(device);
        let (inward, outward) = (filters.get().ingress(), filters.get().egress());
        let inward = inward.execute().try_next().await;
        let outward = outward.execute().try_next().await;
        // Somebody's filter is there, or the device is gone.
        let (Ok(None), Ok(None)) = (inward, outward) else {
            continue;
        };
        let mut removal = handle.qdisc().del(device);
        removal.message_mut().header.parent = Parent::CLSACT;
        match removal.execute().await {
            // The device or its qdisc went before.
            Err(rtnetlink::Error::NetlinkError(error))
                if [libc::ENODEV, libc::ENOENT, libc::EINVAL].contains(&-error.raw_code()) => {}
            outcome => outcome.context("could not remove a clsact qdisc")?,
        }
    }
    Ok(())
}

/// The number of this thread's network namespace.
fn namespace() -> Result<u64> {
    let path = "/proc/thread-self/ns/net";
    let file = std::fs::metadata(path).with_context(|| format!("could not look at {path}"))?;
    Ok(file.ino())
}

fn all_devices() -> Result<Vec<String>> {
    let devices = nix::net::if_::if_nameindex().context("could not list devices")?;
    Ok(devices
        .into_iter()
        .map(|device| device.name().to_string_lossy().into_owned())
        .collect())
}

/// Whether the kernel does not know links for tc.
fn is_unknown(error: &ProgramError) -> bool {
    matches!(error, ProgramError::SyscallError(error)
        if matches!(error.io_error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)))
}

/// The system's number of what went wrong with netlink.
fn code(error: &ProgramError) -> Option<i32> {
    match error {
        ProgramError::NetlinkError(error) => error.raw_os_error(),
        ProgramError::TcError(TcError::NetlinkError(error)) => error.raw_os_error(),
        _ => None,
    }
}

/// Whether there is no such filter, no qdisc for it (EINVAL), or no device.
fn is_missing(error: &ProgramError) -> bool {
    matches!(
        code(error),
        Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)
    )
}

/// The errors of netlink name themselves, but not their cause.
fn plain(error: ProgramError) -> anyhow::Error {
    match code(&error) {
        Some(code) => std::io::Error::from_raw_os_error(code).into(),
        None => error.into(),
    }
}
