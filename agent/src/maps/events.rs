//! Events of flows and their counters. Each CPU writes its own ring; they are read as one, in the order of time.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use anyhow::{Context, Result};
use aya::maps::{ArrayOfMaps, Map, MapData, PerCpuArray, RingBuf};
use bytemuck::must_cast;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use xebec_dataplane_common::flow::{AT_MESSAGE, Counters, Event};

use super::table::Table;
use super::take;

/// The map of rings.
pub(crate) const EVENTS: &str = "EVENTS";
/// Bytes of all rings together, as long as none is larger than [`LARGEST`] or smaller than [`SMALLEST`].
const ALL: usize = 16 << 20;
/// Bytes of the ring of a CPU: room for 7,700 events.
const LARGEST: usize = 1 << 20;
/// The same of a machine with very many.
const SMALLEST: usize = 1 << 17;
/// How many events of a ring are read at once.
const AT_ONCE: usize = 256;

/// What a program told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// What happened.
    pub event: Event,
    /// What was said, if that is what it is about.
    pub message: Option<Box<[u8]>>,
}

impl From<Event> for Report {
    fn from(event: Event) -> Self {
        Self {
            event,
            message: None,
        }
    }
}

/// Events of flows and their counters.
pub struct FlowMaps {
    rings: Rings,
    counters: Counting,
    ready: VecDeque<Report>,
}

impl FlowMaps {
    pub(crate) fn new(ebpf: &mut aya::Ebpf) -> Result<Self> {
        Ok(Self {
            rings: Rings::new(take(ebpf, EVENTS)?)?,
            counters: Counting(take(ebpf, "COUNTERS")?),
            ready: VecDeque::new(),
        })
    }

    /// The oldest event that was not taken yet, without what was said.
    pub fn next_event(&mut self) -> Option<Event> {
        self.next_report().map(|report| report.event)
    }

    /// The oldest event that was not taken yet.
    pub fn next_report(&mut self) -> Option<Report> {
        if self.ready.is_empty() {
            let mut read = Vec::new();
            self.rings.read(u64::MAX, &mut read);
            self.ready = read.into();
        }
        self.ready.pop_front()
    }

    /// Reads some events until a moment that is over (ns of the monotonic clock), in the order of their times.
    pub fn read(&mut self, until: u64, into: &mut Vec<Report>) {
        self.rings.read(until, into);
    }

    /// The counters of all CPUs together.
    pub fn count(&self) -> Result<Counters> {
        self.counters.all()
    }

    /// Its two parts.
    pub(crate) fn split(self) -> (Rings, Counting) {
        (self.rings, self.counters)
    }
}

/// The counters of all CPUs.
pub(crate) struct Counting(PerCpuArray<MapData, [u8; size_of::<Counters>()]>);

impl Counting {
    /// Their sums.
    pub fn all(&self) -> Result<Counters> {
        let values = self.0.get(&0, 0).context("could not read the counters")?;
        Ok(values.iter().fold(Counters::default(), |sum, one| {
            let one: Counters = must_cast(*one);
            Counters {
                produced: sum.produced + one.produced,
                lost: sum.lost + one.lost,
                aggregated: sum.aggregated + one.aggregated,
                forwarded: sum.forwarded + one.forwarded,
                dropped: sum.dropped + one.dropped,
                translated: sum.translated + one.translated,
                translated_early: sum.translated_early + one.translated_early,
                refused: sum.refused + one.refused,
                no_port: sum.no_port + one.no_port,
                held: sum.held + one.held,
                unheld: sum.unheld + one.unheld,
            }
        }))
    }
}

/// How many rings there can be: one for each CPU that this machine may have.
pub(crate) fn places() -> Result<u32> {
    let cpus = aya::util::nr_cpus().map_err(|(file, error)| {
        anyhow::Error::new(error).context(format!("could not read {file}"))
    })?;
    u32::try_from(cpus).context("too many CPUs")
}

/// The rings.
pub(crate) struct Rings {
    rings: Vec<Ring>,
    /// Tells that one of them has events.
    ready: Epoll,
    /// Programs write to what stands here.
    _places: ArrayOfMaps<MapData, MapData>,
}

struct Ring {
    events: RingBuf<MapData>,
    /// What was read of it before its turn.
    ahead: VecDeque<Report>,
}

impl Rings {
    /// New ones in these places. CPUs that the machine may have, but does not have now, share the others'.
    fn new(mut places: ArrayOfMaps<MapData, MapData>) -> Result<Self> {
        let online = aya::util::online_cpus().map_err(|(file, error)| {
            anyhow::Error::new(error).context(format!("could not read {file}"))
        })?;
        let ready = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .context("could not make an epoll for events of flows")?;
        let bytes = bytes_of_each(online.len());
        let mut rings = Vec::with_capacity(online.len());
        let put = |places: &mut ArrayOfMaps<_, _>, cpu: u32, table: &Table| {
            let map = table.data().context("could not open a ring again")?;
            places
                .set(cpu, &map, 0)
                .with_context(|| format!("could not give CPU {cpu} its ring"))
        };
        let mut tables = Vec::with_capacity(online.len());
        for _ in &online {
            let table = Table::ring("xebec_events", bytes as u32)
                .context("the kernel gives no room for events of flows")?;
            let map = table.data().context("could not open a ring again")?;
            let events = RingBuf::try_from(Map::RingBuf(map)).context("could not map a ring")?;
            let wanted = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
            ready
                .add(&events, EpollEvent::new(wanted, 0))
                .context("could not wait for events of flows")?;
            rings.push(Ring {
                events,
                ahead: VecDeque::new(),
            });
            tables.push(table);
        }
        for cpu in 0..places.len() {
            let own = online.iter().position(|one| *one == cpu);
            let ring = own.unwrap_or(cpu as usize % tables.len().max(1));
            if let Some(table) = tables.get(ring) {
                put(&mut places, cpu, table)?;
            }
        }
        Ok(Self {
            rings,
            ready,
            _places: places,
        })
    }

    /// Reads some events until a moment (ns of the monotonic clock), in the order of their times. It must be over: while
    /// one ring is read, others are written.
    pub fn read(&mut self, mut until: u64, into: &mut Vec<Report>) {
        // What is later than the last event of a ring that has more may be later than one of those, too.
        for Ring { events, ahead } in &mut self.rings {
            while ahead.len() < AT_ONCE
                && let Some(event) = next(events)
            {
                ahead.push_back(event);
            }
            if let (AT_ONCE, Some(last)) = (ahead.len(), ahead.back()) {
                until = until.min(last.event.time);
            }
        }
        for Ring { ahead, .. } in &mut self.rings {
            let early = ahead.iter().take_while(|one| one.event.time <= until);
            let turn = early.count();
            into.extend(ahead.drain(..turn));
        }
        into.sort_by_key(|report| report.event.time);
    }

    /// Whether some that were read are of a later moment.
    pub fn has_later(&self) -> bool {
        self.rings.iter().any(|ring| !ring.ahead.is_empty())
    }

    /// From here on who waits is woken by the next event; to be called before reading.
    pub fn rest(&self) {
        let mut woken = [EpollEvent::empty(); 32];
        // It can fail only where it waits.
        while self
            .ready
            .wait(&mut woken, EpollTimeout::ZERO)
            .is_ok_and(|found| found == woken.len())
        {}
    }
}

impl AsRawFd for Rings {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl AsFd for Rings {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ready.0.as_fd()
    }
}

/// Bytes of the ring of each CPU.
fn bytes_of_each(cpus: usize) -> usize {
    let share = ALL / cpus.max(1);
    // The kernel wants powers of two.
    let power = (share + 1).next_power_of_two() / 2;
    power.clamp(SMALLEST, LARGEST)
}

/// The oldest event of a ring.
fn next(ring: &mut RingBuf<MapData>) -> Option<Report> {
    loop {
        let item = ring.next()?;
        let Some((event, rest)) = item.split_at_checked(size_of::<Event>()) else {
            continue;
        };
        let event: Event = bytemuck::pod_read_unaligned(event);
        let message = rest.get(..usize::from(event.length));
        return Some(Report {
            event,
            message: message.filter(|_| event.at == AT_MESSAGE).map(Into::into),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_of_many_cpus_are_smaller_and_powers_of_two() {
        for (cpus, bytes) in [
            (1, LARGEST),
            (16, LARGEST),
            (17, LARGEST / 2),
            (48, LARGEST / 4),
            (64, LARGEST / 4),
            (1_024, SMALLEST),
        ] {
            assert_eq!(bytes_of_each(cpus), bytes, "{cpus}");
        }
    }
}
