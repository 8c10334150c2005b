//! Tests of Services as a whole, against a kernel of plain tables that watches what is written when.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod cases;
mod full;
mod model;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Instant;

use anyhow::{Result, bail};
use ipnet::IpNet;
use serde_json::{Value, json};
use xebec_dataplane_common::service::{Backend, CHUNK, Chunk, Frontend, FrontendKey, Run};

use super::rows::frontend_text;
use super::tables::Tables;
use crate::maps::{Room, ServiceKernel};

/// The kernel's maps.
#[derive(Default)]
pub struct Maps {
    pub room: Room,
    pub frontends: HashMap<FrontendKey, Frontend>,
    pub chunks: BTreeMap<u32, Chunk>,
    pub backends: BTreeMap<u32, Backend>,
    pub ranges: BTreeSet<(u32, IpNet)>,
    pub addresses: BTreeMap<IpAddr, u8>,
    /// Writes of frontends, chunks and backends.
    pub writes: [usize; 3],
    /// How many writes of frontends fail from now on.
    pub fail: usize,
}

/// A kernel that many can look into.
#[derive(Clone, Default)]
pub struct Plain(pub Rc<RefCell<Maps>>);

// SAFETY: tests use it from one thread.
unsafe impl Send for Plain {}

pub const ROOM: Room = Room {
    frontends: 100_000,
    chunks: 1_000_000,
    backends: 1_000_000,
    ranges: 10_000,
};

impl Plain {
    pub fn new(room: Room) -> Self {
        let new = Self::default();
        new.0.borrow_mut().room = room;
        new
    }
}

impl Maps {
    fn chunks_of(run: Run) -> impl Iterator<Item = u32> {
        run.first..run.first + run.count.div_ceil(CHUNK as u32)
    }

    /// What stands in a run.
    pub fn slots(&self, run: Run) -> Vec<u32> {
        let chunks = Self::chunks_of(run).flat_map(|number| self.chunks[&number]);
        chunks.take(run.count as usize).collect()
    }

    /// What a number of a backend that is there stands for.
    fn target(&self, number: u32) -> String {
        let backend = self.backends[&number];
        assert_eq!(backend.generation & 1, 1, "backend {number} is gone");
        let ip = IpAddr::from(backend.address);
        std::net::SocketAddr::new(ip, u16::from_be(backend.port)).to_string()
    }

    /// The backends of a run, in every slot.
    pub fn targets(&self, run: Run) -> Vec<String> {
        let slots = self.slots(run).into_iter();
        slots.map(|number| self.target(number)).collect()
    }

    /// The backends of a run, each once.
    pub fn distinct(&self, run: Run) -> BTreeSet<String> {
        let numbers: HashSet<u32> = self.slots(run).into_iter().collect();
        numbers
            .into_iter()
            .map(|number| self.target(number))
            .collect()
    }

    /// Frontends by their text.
    pub fn named(&self) -> BTreeMap<String, Frontend> {
        let all = self.frontends.iter();
        all.map(|(key, value)| (frontend_text(key), *value))
            .collect()
    }

    /// The backends that clients inside and outside can get, each once.
    pub fn served(&self, frontend: &str) -> Option<(BTreeSet<String>, BTreeSet<String>)> {
        let value = *self.named().get(frontend)?;
        Some((self.distinct(value.inside), self.distinct(value.outside)))
    }
}

impl ServiceKernel for Plain {
    fn room(&self) -> Room {
        self.0.borrow().room
    }

    fn set_backends(&mut self, backends: &[(u32, Backend)]) -> Result<()> {
        let mut maps = self.0.borrow_mut();
        maps.writes[2] += backends.len();
        for (number, backend) in backends {
            assert!(*number > 0 && *number < maps.room.backends);
            if let Some(before) = maps.backends.insert(*number, *backend) {
                let moved = (before.address, before.port) != (backend.address, backend.port);
                assert!(
                    !moved || before.generation & 1 == 0,
                    "{before:?} {backend:?}"
                );
                assert!(before.generation <= backend.generation);
            }
        }
        // Who is gone is named nowhere.
        let gone: BTreeSet<u32> = backends
            .iter()
            .filter(|(_, backend)| backend.generation & 1 == 0)
            .map(|(number, _)| *number)
            .collect();
        if !gone.is_empty() && maps.frontends.len() < 200 {
            for value in maps.frontends.values() {
                for run in [value.inside, value.outside] {
                    assert!(!maps.slots(run).iter().any(|number| gone.contains(number)));
                }
            }
        }
        Ok(())
    }

    fn set_chunks(&mut self, chunks: &[(u32, Chunk)]) -> Result<()> {
        let mut maps = self.0.borrow_mut();
        maps.writes[1] += chunks.len();
        let mut new = BTreeSet::new();
        for (number, chunk) in chunks {
            assert!(*number < maps.room.chunks && new.insert(*number));
            maps.chunks.insert(*number, *chunk);
        }
        if maps.frontends.len() < 200 {
            for value in maps.frontends.values() {
                for run in [value.inside, value.outside] {
                    assert!(!Maps::chunks_of(run).any(|number| new.contains(&number)));
                }
            }
        }
        Ok(())
    }

    fn set_frontends(&mut self, frontends: &[(FrontendKey, Frontend)]) -> Result<()> {
        let mut maps = self.0.borrow_mut();
        if maps.fail > 0 {
            maps.fail -= 1;
            bail!("no");
        }
        maps.writes[0] += frontends.len();
        for (key, value) in frontends {
            // All that it names is there.
            maps.distinct(value.inside);
            maps.distinct(value.outside);
            assert_ne!(value.service, 0);
            maps.frontends.insert(*key, *value);
            assert!(maps.frontends.len() <= maps.room.frontends as usize);
        }
        Ok(())
    }

    fn remove_frontend(&mut self, key: FrontendKey) -> Result<()> {
        self.0.borrow_mut().frontends.remove(&key);
        Ok(())
    }

    fn set_range(&mut self, service: u32, block: IpNet) -> Result<()> {
        let mut maps = self.0.borrow_mut();
        maps.ranges.insert((service, block));
        assert!(maps.ranges.len() <= maps.room.ranges as usize);
        Ok(())
    }

    fn remove_range(&mut self, service: u32, block: IpNet) -> Result<()> {
        assert!(self.0.borrow_mut().ranges.remove(&(service, block)));
        Ok(())
    }

    fn set_node_address(&mut self, address: IpAddr, whose: u8) -> Result<()> {
        self.0.borrow_mut().addresses.insert(address, whose);
        Ok(())
    }

    fn remove_node_address(&mut self, address: IpAddr) -> Result<()> {
        self.0.borrow_mut().addresses.remove(&address);
        Ok(())
    }
}

/// Tables of node `a` over a kernel, and a clock.
pub struct World {
    pub tables: Tables<Plain>,
    pub kernel: Plain,
    pub now: Instant,
}

impl World {
    pub fn new() -> Self {
        Self::with(ROOM)
    }

    pub fn with(room: Room) -> Self {
        let kernel = Plain::new(room);
        Self {
            tables: Tables::new(kernel.clone(), "a", Vec::new()),
            kernel,
            now: Instant::now(),
        }
    }

    pub fn service(&mut self, value: Value) {
        let object = serde_json::from_value(value).unwrap();
        self.tables.set_service(&object);
    }

    pub fn slice(&mut self, value: Value) {
        let object = serde_json::from_value(value).unwrap();
        self.tables.set_slice(&object);
    }

    pub fn sync(&mut self) {
        self.now += std::time::Duration::from_millis(25);
        self.tables.sync(self.now).unwrap();
    }

    /// Reasons of what users were told.
    pub fn told(&mut self) -> Vec<String> {
        let notices = self.tables.take_notices().into_iter();
        notices
            .map(|one| format!("{} {:?}", one.service, one.reason))
            .collect()
    }

    pub fn served(&self, frontend: &str) -> Option<(Vec<String>, Vec<String>)> {
        let (inside, outside) = self.kernel.0.borrow().served(frontend)?;
        Some((inside.into_iter().collect(), outside.into_iter().collect()))
    }

    pub fn flags(&self, frontend: &str) -> u32 {
        self.kernel.0.borrow().named()[frontend].flags
    }

    /// State of a frontend's row, by Service and frontend.
    pub fn state(&self, service: &str, frontend: &str) -> String {
        let rows = self.tables.rows();
        let mut rows = rows.iter();
        let row = rows.find(|row| row["service"] == service && row["frontend"] == frontend);
        row.map_or("", |row| row["state"].as_str().unwrap())
            .to_owned()
    }
}

/// A Service of namespace `n` with one port named `p`.
pub fn service(name: &str, spec: Value) -> Value {
    let mut all = json!({
        "clusterIPs": ["10.96.0.1"],
        "ports": [{"name": "p", "port": 80}],
    });
    let fields = all.as_object_mut().unwrap();
    fields.extend(spec.as_object().unwrap().clone());
    json!({
        "metadata": {"namespace": "n", "name": name, "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": all,
    })
}

/// A slice of IPv4 with port 8080 named `p`; endpoints are address, node and conditions (`r`, `s`, `t`).
pub fn slice(service: &str, name: &str, endpoints: &[(&str, &str, &str)]) -> Value {
    let endpoints: Vec<Value> = endpoints
        .iter()
        .map(|(address, node, state)| {
            json!({
                "addresses": [address], "nodeName": node,
                "conditions": {
                    "ready": state.contains('r'),
                    "serving": state.contains('s') || state.contains('r'),
                    "terminating": state.contains('t'),
                },
            })
        })
        .collect();
    json!({
        "metadata": {
            "namespace": "n", "name": name,
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": "IPv4",
        "endpoints": endpoints,
        "ports": [{"name": "p", "port": 8080, "protocol": "TCP"}],
    })
}
