//! Larger maps for Services: the programs are loaded again with them, share all other maps with those that run, and
//! take their place link by link.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use aya::maps::MapData;
use aya::{Ebpf, EbpfLoader};
use xebec_dataplane_common::LAYOUT;
use xebec_dataplane_common::flow::aggregate_shift;
use xebec_dataplane_common::table::WAYS;

use super::{Aggregation, By, Loaded, Xdp, hook, object, pinned};
use crate::maps::{EVENTS, Room, ServiceMaps, flow_table, places};
use crate::network::Device;

/// Folder of maps that the next agent adopts.
const ADOPTED: &str = "maps";
/// Folder of all others, pinned for programs that are loaded later, and for the next agent to see their sizes.
const CURRENT: &str = "current";
/// Folder of maps that are about to take the place of others.
const NEXT: &str = "next";
/// The map of backends, which the next agent adopts.
const BACKENDS: &str = "BACKENDS";

/// How large the maps of Services are at first, and at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// At first: 3 MB of the kernel's memory.
    pub least: Room,
    /// At most: 130 MB.
    pub most: Room,
    /// Entries of the table of flows, which does not grow: a translated flow takes two, and what was silent longest
    /// goes when it is full. It counts where no agent before this one left its table.
    pub flows: u32,
    /// Entries of the table of which client has which backend (`sessionAffinity`), which goes by the same rules.
    pub affinities: u32,
}

/// [`Sizes::flows`] by default: 36 MB of the kernel's memory.
pub const FLOWS: u32 = 262_144;
/// [`Sizes::affinities`] by default: 7 MB of the kernel's memory.
pub const AFFINITIES: u32 = 65_536;

impl Default for Sizes {
    fn default() -> Self {
        Self {
            least: Room {
                frontends: 1 << 16,
                chunks: 1 << 14,
                backends: 1 << 15,
                ranges: 1 << 16,
            },
            most: Room {
                frontends: 1 << 20,
                chunks: 1 << 20,
                backends: 1 << 21,
                ranges: 1 << 20,
            },
            flows: FLOWS,
            affinities: AFFINITIES,
        }
    }
}

impl Sizes {
    /// What maps of these sizes grow to so that all of this fits: each that is too small is doubled until it is not,
    /// or until it is as large as it may be. None where nothing grows.
    pub fn grown(&self, now: Room, need: Room) -> Option<Room> {
        let grown = |now: u32, need: u32, most: u32| {
            let mut size = now.max(1);
            while size < need && size < most {
                size = size.saturating_mul(2).min(most);
            }
            size.max(now)
        };
        let room = Room {
            frontends: grown(now.frontends, need.frontends, self.most.frontends),
            chunks: grown(now.chunks, need.chunks, self.most.chunks),
            backends: grown(now.backends, need.backends, self.most.backends),
            ranges: grown(now.ranges, need.ranges, self.most.ranges),
        };
        (room != now).then_some(room)
    }
}

/// Which maps take the place of smaller ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// That of backends. Programs before and after share the rest.
    Backends(Room),
    /// Frontends, slots and source ranges. Programs before and after share the backends.
    Tables(Room),
}

impl Step {
    fn sizes(self) -> Vec<(&'static str, u32)> {
        match self {
            Self::Backends(room) => vec![(BACKENDS, room.backends)],
            Self::Tables(room) => vec![
                ("FRONTENDS", room.frontends),
                ("SLOTS", room.chunks),
                ("RANGES", room.ranges),
            ],
        }
    }
}

/// Where maps are pinned.
#[derive(Clone, Debug)]
pub(super) struct Pins {
    adopted: PathBuf,
    current: PathBuf,
    next: PathBuf,
    /// How events are put together, and for how many ticks flows are silent, as a power of two.
    aggregation: (u32, u32),
}

impl Pins {
    pub(super) fn new(dir: &Path, aggregation: Aggregation) -> Result<Self> {
        let level = aggregation as u32;
        let new = Self {
            adopted: dir.join(format!("{ADOPTED}-{LAYOUT}")),
            current: dir.join(format!("{CURRENT}-{LAYOUT}")),
            next: dir.join(format!("{NEXT}-{LAYOUT}")),
            aggregation: (level, aggregate_shift(level)),
        };
        for dir in [&new.adopted, &new.current, &new.next] {
            std::fs::create_dir_all(dir)
                .with_context(|| format!("could not make {}", dir.display()))?;
        }
        Ok(new)
    }

    /// The sizes of the maps of the agent before this one, or those to begin with.
    fn sizes(&self, sizes: Sizes) -> Room {
        let size = |name: &str, least: u32, most: u32| {
            let there = MapData::from_pin(self.current.join(name));
            let info = there.and_then(|map| map.info());
            info.map_or(least, |info| {
                info.max_entries().clamp(least, most.max(least))
            })
        };
        let Sizes { least, most, .. } = sizes;
        Room {
            frontends: size("FRONTENDS", least.frontends, most.frontends),
            chunks: size("SLOTS", least.chunks, most.chunks),
            backends: least.backends,
            ranges: size("RANGES", least.ranges, most.ranges),
        }
    }

    /// What loads programs, with all that each time is the same.
    fn loader(&self) -> Result<EbpfLoader<'_>> {
        let mut loader = EbpfLoader::new();
        loader.default_map_pin_directory(&self.adopted);
        loader.map_max_entries(EVENTS, places()?);
        loader.override_global("AGGREGATION", &self.aggregation.0, true);
        loader.override_global("SILENCE", &self.aggregation.1, true);
        Ok(loader)
    }

    /// Loads the programs of a new agent. What packets and sockets made, and backends, are those of the agent before
    /// it, if there was one with the same layout; all other maps are new, and as large as they were.
    pub(super) fn load(&self, sizes: Sizes) -> Result<(Ebpf, Option<String>)> {
        let room = self.sizes(sizes);
        for dir in [&self.current, &self.next] {
            clear(dir)?;
        }
        let mut loader = self.loader()?;
        loader.map_max_entries("FLOWS", sizes.flows.div_ceil(WAYS as u32));
        loader.map_max_entries("AFFINITIES", sizes.affinities);
        let sizes = [Step::Backends(room), Step::Tables(room)];
        for (name, size) in sizes.into_iter().flat_map(Step::sizes) {
            loader.map_max_entries(name, size);
        }
        let mut loaded = Loaded::load(&mut loader)?;
        flow_table::shape(&mut loaded.0)?;
        for (name, map) in loaded.0.maps() {
            // Constants have names with dots, which no pin can have.
            if !name.contains('.') && !self.adopted.join(name).exists() {
                let path = self.current.join(name);
                map.pin(&path)
                    .with_context(|| format!("could not pin {}", path.display()))?;
            }
        }
        self.clear_others()?;
        Ok(loaded)
    }

    /// Takes away the folders of other layouts: programs that are attached keep their maps without them. Not before the
    /// kernel has taken the new programs: where it refuses them, the agent before this one can go on with its own.
    fn clear_others(&self) -> Result<()> {
        let ours = [&self.adopted, &self.current, &self.next];
        let dir = self.adopted.parent();
        for folder in pinned(dir.context("the maps' folder is in no other")?)? {
            let name = folder.file_name().and_then(|name| name.to_str());
            let kind = name.and_then(|name| name.split_once('-'));
            let of_maps = kind.is_some_and(|(kind, _)| [ADOPTED, CURRENT, NEXT].contains(&kind));
            if of_maps && !ours.contains(&&folder) {
                clear(&folder)?;
                std::fs::remove_dir(&folder)
                    .with_context(|| format!("could not remove {}", folder.display()))?;
            }
        }
        Ok(())
    }

    /// Where a map's pin is in the end.
    fn place(&self, name: &str) -> PathBuf {
        let dir = if name == BACKENDS {
            &self.adopted
        } else {
            &self.current
        };
        dir.join(name)
    }
}

fn clear(dir: &Path) -> Result<()> {
    for path in pinned(dir)? {
        std::fs::remove_file(&path)
            .with_context(|| format!("could not remove {}", path.display()))?;
    }
    Ok(())
}

/// What is attached, so that other programs can take its place.
#[derive(Default)]
pub(super) struct Attached {
    pub(super) pods: std::collections::BTreeSet<String>,
    pub(super) network: Option<(Vec<Device>, Xdp)>,
    pub(super) cgroup: Option<PathBuf>,
}

/// Programs that are loaded and attached to nothing yet.
pub struct Grown {
    ebpf: Ebpf,
    without_express: Option<String>,
    step: Step,
}

impl Loaded {
    /// Loads the programs once more, with larger maps of Services, and gives these maps. Those that are attached go on
    /// as they are.
    pub fn grown(&self, step: Step) -> Result<(Grown, ServiceMaps)> {
        clear(&self.pins.next)?;
        let sizes = step.sizes();
        let current = pinned(&self.pins.current)?;
        let mut loader = self.pins.loader()?;
        for path in &current {
            if let Some(name) = path.file_name().and_then(|name| name.to_str()) {
                loader.map_pin_path(name, path);
            }
        }
        for (name, size) in &sizes {
            loader.map_max_entries(name, *size);
            loader.map_pin_path(name, self.pins.next.join(name));
        }
        let (mut ebpf, without_express) = Self::load(&mut loader)
            .with_context(|| format!("could not load the programs with larger maps ({step:?})"))?;
        let maps = ServiceMaps::new(&mut ebpf)?;
        let grown = Grown {
            ebpf,
            without_express,
            step,
        };
        Ok((grown, maps))
    }

    /// Has these programs take the place of those that are attached, each in one step; their maps are filled. Gives
    /// who does the XDP hook's work on each device of the network. After an error some have taken it and some have not:
    /// the next agent has to attach its own everywhere.
    pub async fn replace(&mut self, grown: Grown) -> Result<Vec<By>> {
        let before = std::mem::replace(&mut self.ebpf, grown.ebpf);
        self.without_express = grown.without_express;
        let attached = std::mem::take(&mut self.attached);
        for device in attached.pods {
            match self.attach_pod(&device) {
                // It went meanwhile.
                Err(_) if nix::net::if_::if_nametoindex(device.as_str()).is_err() => {}
                outcome => outcome?,
            }
        }
        let mut by = Vec::new();
        if let Some((mut devices, xdp)) = attached.network {
            devices.retain(|device| nix::net::if_::if_nametoindex(device.name.as_str()).is_ok());
            by = self.attach_network(&devices, xdp).await?;
        }
        if let Some(cgroup) = attached.cgroup {
            self.attach_sockets(&cgroup)?;
        }
        for (name, _) in grown.step.sizes() {
            let (from, to) = (self.pins.next.join(name), self.pins.place(name));
            std::fs::rename(&from, &to).with_context(|| {
                format!("could not move {} to {}", from.display(), to.display())
            })?;
        }
        drop(before);
        Ok(by)
    }

    /// Loads every program of the object; the kernel checks them. Says why there is no XDP, if so.
    fn load(loader: &mut EbpfLoader<'_>) -> Result<(Ebpf, Option<String>)> {
        let mut ebpf = loader
            .load(object()?)
            .context("the kernel refused the eBPF maps (is this root?)")?;
        for name in super::SOCKET_HOOKS {
            let program = hook::<aya::programs::CgroupSockAddr>(&mut ebpf, name)?;
            super::checked(name, || program.load())?;
        }
        let end = hook::<aya::programs::CgroupSock>(&mut ebpf, super::SOCKET_END)?;
        super::checked(super::SOCKET_END, || end.load())?;
        for (_, name) in super::POD_HOOKS.iter().chain(super::NETWORK_HOOKS) {
            let program = hook::<aya::programs::SchedClassifier>(&mut ebpf, name)?;
            super::checked(name, || program.load())?;
        }
        let without_express = Self::load_express(&mut ebpf)?;
        Ok((ebpf, without_express))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_doubled_until_all_fits_and_no_further_than_they_may() {
        let sizes = Sizes::default();
        let now = sizes.least;
        assert_eq!(sizes.grown(now, now), None);
        let need = Room {
            frontends: 100_001,
            chunks: 100_000,
            backends: 1_000_001,
            ranges: 0,
        };
        let grown = Room {
            frontends: 1 << 17,
            chunks: 1 << 17,
            backends: 1 << 20,
            ..now
        };
        assert_eq!(sizes.grown(now, need), Some(grown));
        assert_eq!(sizes.grown(grown, need), None);
        let endless = Room {
            chunks: u32::MAX,
            ..need
        };
        let most = Room {
            chunks: sizes.most.chunks,
            ..grown
        };
        assert_eq!(sizes.grown(grown, endless), Some(most));
        assert_eq!(sizes.grown(most, endless), None);
        // A map that is larger than it may be stays so.
        let odd = Room {
            ranges: sizes.most.ranges + 7,
            ..most
        };
        assert_eq!(sizes.grown(odd, endless), None);
    }
}
