//! Which destinations outside the cluster see pods' own addresses: ip-masq-agent's configuration, followed as it changes.

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use ipnet::IpNet;
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use serde::Deserialize;
use serde::de::{Deserializer, Visitor};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Where ip-masq-agent's configuration is mounted.
pub const DEFAULT_PATH: &str = "/etc/config/ip-masq-agent";

/// Private addresses (RFC 1918).
const PRIVATE: [&str; 3] = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"];
/// Addresses reserved for other uses (RFC 6598, 6890, 5737, 7526, 2544, 1112).
const RESERVED: [&str; 8] = [
    "100.64.0.0/10",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "240.0.0.0/4",
];
/// Link-local addresses (RFC 3927, RFC 4291).
const LINK_LOCAL: [&str; 2] = ["169.254.0.0/16", "fe80::/10"];
/// How many blocks a file may have unless it says so: more are rather a mistake.
const LIMIT: usize = 64;

/// What a file says; what it leaves out is as by default.
#[derive(Debug, Default, Deserialize)]
#[serde(
    deny_unknown_fields,
    default,
    expecting = "a mapping with nonMasqueradeCIDRs, cidrLimit, masqLinkLocal, masqLinkLocalIPv6 or resyncInterval"
)]
struct File {
    #[serde(rename = "nonMasqueradeCIDRs")]
    blocks: Option<Vec<Block>>,
    #[serde(rename = "cidrLimit")]
    limit: Option<usize>,
    #[serde(rename = "masqLinkLocal")]
    link_local: Option<bool>,
    #[serde(rename = "masqLinkLocalIPv6")]
    link_local6: Option<bool>,
    #[serde(rename = "resyncInterval")]
    resync: Option<Interval>,
}

/// What holds now.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Settings {
    /// Towards these, pods keep their addresses; in order, none twice.
    blocks: Vec<IpNet>,
    /// How often the file is read without a sign of a change; only where it asks for that.
    resync: Option<Duration>,
}

impl Settings {
    /// What a file with this text means.
    fn parse(text: &str, all_reserved: bool) -> Result<Self> {
        // The original takes for JSON what begins like it; YAML would refuse its tabs.
        let file = if text.trim_start().starts_with('{') {
            serde_json::from_str(text)?
        } else if blank(text) {
            File::default()
        } else {
            serde_yaml_ng::from_str(text)?
        };
        Self::of(file, all_reserved)
    }

    fn of(file: File, all_reserved: bool) -> Result<Self> {
        let listed = file.blocks.unwrap_or_default();
        let limit = file.limit.unwrap_or(LIMIT);
        anyhow::ensure!(
            listed.len() <= limit,
            "nonMasqueradeCIDRs has {} blocks, but no more than {limit} are allowed: set cidrLimit higher",
            listed.len()
        );
        let mut blocks: BTreeSet<IpNet> = listed.into_iter().map(|block| block.0).collect();
        if blocks.is_empty() {
            let reserved = RESERVED.iter().filter(|_| all_reserved);
            blocks.extend(PRIVATE.iter().chain(reserved).copied().filter_map(known));
        }
        let masqueraded = [file.link_local, file.link_local6];
        for (block, masqueraded) in LINK_LOCAL.into_iter().zip(masqueraded) {
            if !masqueraded.unwrap_or(false) {
                blocks.extend(known(block));
            }
        }
        Ok(Self {
            blocks: blocks.into_iter().collect(),
            resync: file.resync.map(|interval| interval.0),
        })
    }
}

/// One of the blocks named in this file.
fn known(block: &str) -> Option<IpNet> {
    block.parse().ok()
}

/// Nothing but comments and the marks of an empty document.
fn blank(text: &str) -> bool {
    text.lines()
        .map(str::trim)
        .all(|line| line.is_empty() || line.starts_with('#') || line == "---")
}

/// A block whose address is its first one.
#[derive(Debug)]
struct Block(IpNet);

impl<'de> Deserialize<'de> for Block {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Block;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a block of addresses like 10.0.0.0/8 or fd00::/8")
            }

            // Errors made here, and not later, carry the line that they are of.
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Block, E> {
                let block: IpNet = text.parse().map_err(|_| {
                    E::custom(format!(
                        "CIDR {text:?} could not be parsed: write it like 10.0.0.0/8 or fd00::/8"
                    ))
                })?;
                if block.addr() != block.network() {
                    return Err(E::custom(format!(
                        "CIDR {text:?} is not aligned to a CIDR block: ip {}, network {}",
                        block.addr(),
                        block.trunc()
                    )));
                }
                if let IpAddr::V6(address) = block.addr()
                    && address.to_ipv4_mapped().is_some()
                {
                    return Err(E::custom(format!(
                        "CIDR {text:?} is an IPv4 block in IPv6 form: write it in IPv4 form"
                    )));
                }
                Ok(Block(block))
            }
        }
        deserializer.deserialize_str(Text)
    }
}

/// A length of time as Go writes it.
#[derive(Debug)]
struct Interval(Duration);

impl<'de> Deserialize<'de> for Interval {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Interval;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a length of time like 60s or 1m30s")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Interval, E> {
                let length = duration(text).ok_or_else(|| {
                    E::custom(format!(
                        "{text:?} is no length of time: write it like 60s or 1m30s"
                    ))
                })?;
                if length < Duration::from_secs(1) {
                    return Err(E::custom(format!(
                        "{text:?} is too short: the file is read at most once a second"
                    )));
                }
                Ok(Interval(length))
            }
        }
        deserializer.deserialize_str(Text)
    }
}

/// Numbers, each with its unit; not negative.
fn duration(text: &str) -> Option<Duration> {
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Some(Duration::ZERO);
    }
    let mut seconds = 0.0_f64;
    loop {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest.get(..end)?.parse().ok()?;
        rest = rest.get(end..)?;
        let unit = rest
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(rest.len());
        seconds += number
            * match rest.get(..unit)? {
                "h" => 3_600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                "us" | "µs" | "μs" => 1e-6,
                "ns" => 1e-9,
                _ => return None,
            };
        rest = rest.get(unit..)?;
        if rest.is_empty() {
            return Duration::try_from_secs_f64(seconds).ok();
        }
    }
}

/// Follows a file.
pub struct Follower {
    path: PathBuf,
    all_reserved: bool,
    now: Settings,
    /// What was last complained of, so that it is said once.
    complaint: Option<String>,
    blocks: watch::Sender<Vec<IpNet>>,
}

/// Reads the file and yields the blocks towards which pods keep their addresses, and what follows it from here on.
/// With `all_reserved`, all reserved IPv4 addresses are among them where the file lists none, not private ones alone.
pub fn follow(path: &Path, all_reserved: bool) -> Result<(watch::Receiver<Vec<IpNet>>, Follower)> {
    let now = Settings::of(File::default(), all_reserved)?;
    let (blocks, receiver) = watch::channel(now.blocks.clone());
    let mut follower = Follower {
        path: path.to_owned(),
        all_reserved,
        now,
        complaint: None,
        blocks,
    };
    follower.read();
    Ok((receiver, follower))
}

impl Follower {
    /// Follows the file until `shutdown`.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<()> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)
            .context("could not watch for changes of files")?;
        // SAFETY: `InotifyFd` owns its descriptor and gives the same one for as long as it lives.
        let mut events = unsafe { AsyncFd::register(InotifyFd(inotify)) }
            .context("could not watch for changes of files")?;
        let mut watched = HashSet::new();
        loop {
            // Folders come and go, so what is watched is found anew each time. The file is read after that: a change
            // in between is seen, or tells of itself.
            // Once more where they changed: one may be made while its parent is looked at.
            while watch_folders(&events.get_ref().0, &self.path, &mut watched)? {}
            self.read();
            let resync = async {
                match self.now.resync {
                    Some(interval) => tokio::time::sleep(interval).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                () = resync => {}
                ready = events.readable_mut() => {
                    let mut guard = ready.context("could not wait for changes of files")?;
                    // What changed does not matter. A lost watch does: its folder is gone.
                    while let Ok(told) = guard.get_inner().0.read_events() {
                        for event in told {
                            if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                                watched.remove(&event.wd);
                            }
                        }
                    }
                    guard.clear_ready();
                }
            }
        }
    }

    /// Reads the file; what cannot be read or means nothing changes nothing.
    fn read(&mut self) {
        let path = self.path.display().to_string();
        let read = match std::fs::read_to_string(&self.path) {
            Ok(text) => Settings::parse(&text, self.all_reserved),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Settings::of(File::default(), self.all_reserved)
            }
            Err(error) => Err(error.into()),
        };
        let settings = match read {
            Ok(settings) => settings,
            Err(error) => {
                let complaint = format!("{error:#}");
                if self.complaint.as_ref() != Some(&complaint) {
                    warn!(
                        "could not take the masquerading configuration {path}: {complaint}; what held before goes on"
                    );
                    self.complaint = Some(complaint);
                }
                return;
            }
        };
        self.complaint = None;
        if settings == self.now {
            return;
        }
        self.now = settings;
        let blocks = &self.now.blocks;
        self.blocks.send_if_modified(|told| {
            let news = told != blocks;
            if news {
                info!(
                    "pods keep their addresses towards {} blocks, as {path} says",
                    blocks.len()
                );
                told.clone_from(blocks);
            }
            news
        });
    }
}

/// Watches the folders in which a change may be one of the file: that of its name and of what the name leads to (a
/// mounted ConfigMap is swapped by its links), or the nearest one that is there. Tells whether they are others now.
fn watch_folders(
    inotify: &Inotify,
    path: &Path,
    watched: &mut HashSet<WatchDescriptor>,
) -> Result<bool> {
    let flags = AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_MOVED_FROM
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_CLOSE_WRITE
        | AddWatchFlags::IN_ATTRIB
        | AddWatchFlags::IN_DELETE_SELF
        | AddWatchFlags::IN_MOVE_SELF;
    let mut wanted = HashSet::new();
    let real = std::fs::canonicalize(path).ok();
    for path in [Some(path), real.as_deref()].into_iter().flatten() {
        for folder in path.ancestors().skip(1) {
            let folder = if folder.as_os_str().is_empty() {
                Path::new(".")
            } else {
                folder
            };
            match inotify.add_watch(folder, flags) {
                Ok(descriptor) => {
                    wanted.insert(descriptor);
                    break;
                }
                Err(Errno::ENOENT | Errno::ENOTDIR) => {}
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("could not watch {}", folder.display()));
                }
            }
        }
    }
    for left in watched.difference(&wanted) {
        // It may be gone already.
        let _ = inotify.rm_watch(*left);
    }
    let changed = *watched != wanted;
    *watched = wanted;
    Ok(changed)
}

struct InotifyFd(Inotify);

impl AsFd for InotifyFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for InotifyFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

#[cfg(test)]
mod tests;
