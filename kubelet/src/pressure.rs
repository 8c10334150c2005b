//! Whether the node runs out of memory or disk, by fixed eviction thresholds.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::statvfs::statvfs;
use tracing::warn;

/// `memory.available<100Mi`, `nodefs.available<5%`, `nodefs.inodesFree<5%`: upstream's defaults, but for the disk,
/// where k3s's 5 % suit a machine that is not a node alone (upstream: 10 %), and 5 GiB are enough however large the
/// disk is. There is no default for
/// `pid.available`, so that PIDPressure never holds unless someone configures it.
const LEAST_MEMORY: u64 = 100 << 20;
const LEAST_DISK_PERCENT: u64 = 5;
const LEAST_DISK: u64 = 5 << 30;
const LEAST_INODES_PERCENT: u64 = 5;
/// A pressure that ends is reported for a while longer, so that pods do not come and go.
const HOLDS_FOR: Duration = Duration::from_secs(300);

/// What the node is short of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pressure {
    pub memory: bool,
    pub disk: bool,
}

/// When each was last seen.
#[derive(Default)]
pub(crate) struct Gauge {
    memory: Option<Instant>,
    disk: Option<Instant>,
}

impl Gauge {
    /// Reads the machine.
    pub(crate) fn read(&mut self, root: &Path) -> Result<Pressure> {
        let meminfo =
            std::fs::read_to_string("/proc/meminfo").context("could not read /proc/meminfo")?;
        let disk = statvfs(root)
            .with_context(|| format!("could not ask for the space of {}", root.display()))?;
        let now = Pressure {
            memory: is_short_of_memory(&meminfo),
            disk: (is_below(disk.blocks_available(), disk.blocks(), LEAST_DISK_PERCENT)
                && disk.blocks_available() * disk.fragment_size() < LEAST_DISK)
                || is_below(disk.files_available(), disk.files(), LEAST_INODES_PERCENT),
        };
        let before = self.held(Instant::now());
        if now.memory && !before.memory {
            warn!("memory is short: the node takes no pods that ask for none (BestEffort)");
        }
        if now.disk && !before.disk {
            let free = (disk.blocks_available() * disk.fragment_size()) >> 20;
            let root = root.display().to_string();
            warn!(
                root,
                free_mib = free,
                "the disk is nearly full: the node takes no pods until there is room"
            );
        }
        Ok(self.hold(now, Instant::now()))
    }

    fn hold(&mut self, seen: Pressure, now: Instant) -> Pressure {
        if seen.memory {
            self.memory = Some(now);
        }
        if seen.disk {
            self.disk = Some(now);
        }
        self.held(now)
    }

    fn held(&self, now: Instant) -> Pressure {
        let held = |last: Option<Instant>| last.is_some_and(|last| now < last + HOLDS_FOR);
        Pressure {
            memory: held(self.memory),
            disk: held(self.disk),
        }
    }
}

/// What is free, and the file pages that nobody has used for a while: all but the working set.
fn is_short_of_memory(meminfo: &str) -> bool {
    let kib = |name: &str| -> Option<u64> {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix(" kB")?.trim().parse().ok()
    };
    match (kib("MemFree:"), kib("Inactive(file):")) {
        (Some(free), Some(inactive)) => (free + inactive) * 1024 < LEAST_MEMORY,
        _ => false,
    }
}

/// Filesystems without a fixed number of inodes show 0 of 0.
fn is_below(left: u64, all: u64, percent: u64) -> bool {
    all > 0 && u128::from(left) * 100 < u128::from(all) * u128::from(percent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds() {
        let memory = |free: u64, inactive: u64| {
            is_short_of_memory(&format!(
                "MemTotal:  8000000 kB\nMemFree:  {free} kB\nMemAvailable: 9 kB\nInactive(file): {inactive} kB\n"
            ))
        };
        assert!(memory(51_199, 51_200) && !memory(51_200, 51_200));
        assert!(is_below(9, 100, 10) && !is_below(10, 100, 10) && !is_below(0, 0, 5));
    }

    #[test]
    fn pressure_is_held_for_five_minutes() {
        let (mut gauge, start) = (Gauge::default(), Instant::now());
        let none = Pressure::default();
        let memory = Pressure {
            memory: true,
            disk: false,
        };
        assert_eq!(gauge.hold(none, start), none);
        assert_eq!(gauge.hold(memory, start), memory);
        assert_eq!(gauge.hold(none, start + Duration::from_secs(299)), memory);
        assert_eq!(gauge.hold(none, start + Duration::from_secs(300)), none);
    }

    #[test]
    fn this_machine_can_be_read() {
        Gauge::default().read(Path::new("/")).unwrap();
    }
}
