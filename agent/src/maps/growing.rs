//! Hash maps that grow. Programs ask them through a map of maps with one place: when one is full, a larger one is filled
//! and put in its place, and a packet sees the one or the other, whole.

use std::ops::ControlFlow;

use anyhow::{Context, Result, ensure};
use aya::maps::{ArrayOfMaps, MapData};

use super::table::Table;
use super::{batch, take};

/// Entries that there is room for at first.
const LEAST: u32 = 1_024;

/// A hash map that grows.
pub(crate) struct Growing {
    name: &'static str,
    place: ArrayOfMaps<MapData, MapData>,
    table: Table,
    sizes: (usize, usize),
    most: u32,
}

impl Growing {
    /// An empty one in the place of this name, which may hold `most` entries.
    pub fn new(
        ebpf: &mut aya::Ebpf,
        name: &'static str,
        sizes: (usize, usize),
        most: u32,
    ) -> Result<Self> {
        Self::in_place(take(ebpf, name)?, name, sizes, most)
    }

    fn in_place(
        mut place: ArrayOfMaps<MapData, MapData>,
        name: &'static str,
        sizes: (usize, usize),
        most: u32,
    ) -> Result<Self> {
        let table = made(name, sizes, LEAST.min(most))?;
        put(&mut place, name, &table)?;
        Ok(Self {
            name,
            place,
            table,
            sizes,
            most,
        })
    }

    /// How many entries it may hold.
    pub fn most(&self) -> usize {
        self.most as usize
    }

    /// Writes entries whose keys and values lie side by side; the map grows if they do not fit.
    pub fn update(&mut self, keys: &[u8], values: &[u8]) -> Result<()> {
        loop {
            match self.table.update(keys, values) {
                // What was written of them is written again.
                Err(error) if error.raw_os_error() == Some(libc::E2BIG) => self.grow()?,
                outcome => {
                    return outcome.with_context(|| format!("could not write to {}", self.name));
                }
            }
        }
    }

    /// Removes entries whose keys lie side by side, as far as they are there.
    pub fn remove_all(&mut self, keys: &[u8]) -> Result<()> {
        let removed = self.table.remove_all(keys);
        removed.with_context(|| format!("could not remove entries of {}", self.name))
    }

    /// Puts a map that is twice as large in its place.
    fn grow(&mut self) -> Result<()> {
        let (name, now) = (self.name, self.table.capacity());
        ensure!(
            now < self.most,
            "{name} is full: it may hold {} entries",
            self.most
        );
        let mut larger = made(name, self.sizes, now.saturating_mul(2).min(self.most))?;
        let mut copied = Ok(());
        let map = self.table.data().context("could not open a map again")?;
        batch::walk(&map, |keys, values, _| {
            copied = larger.update(keys, values);
            match copied {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        })?;
        copied.with_context(|| format!("could not copy {name} to a larger map"))?;
        put(&mut self.place, name, &larger)?;
        tracing::debug!(name, from = now, to = larger.capacity(), "a map grew");
        self.table = larger;
        Ok(())
    }
}

fn made(name: &str, (key, value): (usize, usize), capacity: u32) -> Result<Table> {
    Table::inner(name, key, value, capacity)
        .with_context(|| format!("the kernel gives no room for {capacity} entries of {name}"))
}

/// From here on programs see this one.
fn put(place: &mut ArrayOfMaps<MapData, MapData>, name: &str, table: &Table) -> Result<()> {
    let map = table.data().context("could not open a map again")?;
    place
        .set(0, &map, 0)
        .with_context(|| format!("could not put a map in the place of {name}"))
}
