//! Changes for the kernel, in the order in which nothing is ever half visible.

use std::time::Instant;

use anyhow::Result;
use hashbrown::HashMap;
use ipnet::IpNet;
use xebec_dataplane_common::service::{Backend, Chunk, Frontend, FrontendKey, Run};

use super::backends::Backends;
use super::extents::Extents;
use super::slots::chunk_count;
use crate::maps::ServiceKernel;

/// Changes that were decided and not yet written.
#[derive(Default)]
pub struct Batch {
    pub chunks: Vec<(u32, Chunk)>,
    /// What frontends become; none for those that go.
    fronts: HashMap<FrontendKey, Option<Frontend>>,
    /// How many of them go.
    removals: usize,
    /// Blocks of sources, and whether they are let in.
    pub ranges: HashMap<(u32, IpNet), bool>,
    /// Runs that no frontend will name.
    pub freed: Vec<Run>,
    /// Backends that a port lets go of.
    pub released: Vec<u32>,
    /// Those of them that a port of UDP parts from: its number, and the backend's.
    pub parted: Vec<(u32, u32)>,
}

fn write_backends(kernel: &mut impl ServiceKernel, backends: &mut Backends) -> Result<()> {
    let changed = backends.take_changed();
    let entries = changed
        .iter()
        .map(|number| (*number, backends.entry(*number)));
    let entries: Vec<(u32, Backend)> = entries.collect();
    if entries.is_empty() {
        return Ok(());
    }
    let outcome = kernel.set_backends(&entries);
    if outcome.is_err() {
        backends.change_again(changed);
    }
    outcome
}

impl Batch {
    /// How much there is to write, roughly.
    pub fn weight(&self) -> usize {
        self.chunks.len() + self.fronts.len() + self.released.len()
    }

    /// Has a frontend become this, or go.
    pub fn set_front(&mut self, key: FrontendKey, value: Option<Frontend>) {
        self.removals += usize::from(value.is_none());
        if let Some(None) = self.fronts.insert(key, value) {
            self.removals -= 1;
        }
    }

    /// How many frontends go.
    pub fn removals(&self) -> usize {
        self.removals
    }

    /// All but what goes last.
    fn write(&self, kernel: &mut impl ServiceKernel, backends: &mut Backends) -> Result<()> {
        write_backends(kernel, backends)?;
        if !self.chunks.is_empty() {
            kernel.set_chunks(&self.chunks)?;
        }
        for ((service, block), _) in self.ranges.iter().filter(|(_, there)| **there) {
            kernel.set_range(*service, *block)?;
        }
        let set = self
            .fronts
            .iter()
            .filter_map(|(key, value)| Some((*key, (*value)?)));
        let set: Vec<(FrontendKey, Frontend)> = set.collect();
        if !set.is_empty() {
            kernel.set_frontends(&set)?;
        }
        for (key, _) in self.fronts.iter().filter(|(_, value)| value.is_none()) {
            kernel.remove_frontend(*key)?;
        }
        for ((service, block), _) in self.ranges.iter().filter(|(_, there)| !**there) {
            kernel.remove_range(*service, *block)?;
        }
        Ok(())
    }

    /// Writes everything: what is named before what names it, and the other way round when it goes. After an error
    /// the batch is as it was, to be written again.
    pub fn flush(
        &mut self,
        kernel: &mut impl ServiceKernel,
        backends: &mut Backends,
        extents: &mut Extents,
        now: Instant,
    ) -> Result<()> {
        self.write(kernel, backends)?;
        let done = std::mem::take(self);
        for number in done.released {
            backends.release(number, now);
        }
        for (service, number) in done.parted {
            backends.part(service, number);
        }
        for run in done.freed {
            extents.give_back(run.first, chunk_count(run.count as usize), now);
        }
        write_backends(kernel, backends)
    }
}
