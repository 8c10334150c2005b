//! Maps as the kernel holds them, by their names: what the agent never reads or empties, tests do.

use std::marker::PhantomData;
use std::ops::{ControlFlow, Deref};
use std::os::fd::{AsFd, AsRawFd};

use aya::maps::{MapData, MapFd, MapInfo};
use bytemuck::{AnyBitPattern, NoUninit};
use xebec_agent::maps::flow_table::{FLOWS, FlowTable, SHAPE};
use xebec_dataplane_common::flow::{Flow, FlowKey};

/// Commands of bpf(2).
const LOOKUP: libc::c_long = 1;
const UPDATE: libc::c_long = 2;
const DELETE: libc::c_long = 3;
const NEXT_KEY: libc::c_long = 4;

/// Attributes of these commands (`union bpf_attr`).
#[repr(C)]
struct Element {
    fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The table of flows.
pub struct Flows(FlowTable);

impl Deref for Flows {
    type Target = FlowTable;

    fn deref(&self) -> &FlowTable {
        &self.0
    }
}

impl Flows {
    /// The one among the maps with these numbers.
    pub fn find(numbers: &[u32]) -> Option<Self> {
        let open = |name: &str| {
            let mut all = numbers
                .iter()
                .map(|number| MapInfo::from_id(*number).unwrap());
            let info = all.find(|info| info.name_as_str() == Some(name))?;
            Some(MapData::from_id(info.id()).unwrap())
        };
        let table = FlowTable::new(&open(FLOWS)?, open(SHAPE)?);
        Some(Self(table.unwrap()))
    }

    /// All entries.
    pub fn entries(&self) -> Vec<(FlowKey, Flow)> {
        let mut all = Vec::new();
        self.each(|key, flow| {
            all.push((*key, *flow));
            ControlFlow::Continue(())
        });
        all
    }

    /// Removes all entries.
    pub fn clear(&self) {
        self.retain(|_, _| false);
    }
}

/// A map of keys and values of these kinds.
pub struct Table<K, V> {
    fd: MapFd,
    kinds: PhantomData<(K, V)>,
}

impl<K, V> Table<K, V> {
    fn call(&self, command: libc::c_long, key: *const u8, value: *mut u8) -> bool {
        let element = Element {
            fd: self.fd.as_fd().as_raw_fd() as u32,
            pad: 0,
            key: key as u64,
            value: value as u64,
            flags: 0,
        };
        // SAFETY: the attributes are those of the command; callers give memory of the sizes that the map has.
        unsafe {
            libc::syscall(
                libc::SYS_bpf,
                command,
                &raw const element,
                size_of::<Element>(),
            ) == 0
        }
    }
}

impl<K: NoUninit + AnyBitPattern, V: NoUninit + AnyBitPattern> Table<K, V> {
    /// The map of this name among those with these numbers.
    pub fn find(numbers: &[u32], name: &str) -> Option<Self> {
        let mut all = numbers
            .iter()
            .map(|number| MapInfo::from_id(*number).unwrap());
        all.find_map(|info| Self::named(&info, name))
    }

    fn named(info: &MapInfo, name: &str) -> Option<Self> {
        if info.name_as_str() != Some(name) {
            return None;
        }
        let sizes = (info.key_size() as usize, info.value_size() as usize);
        assert_eq!(sizes, (size_of::<K>(), size_of::<V>()), "{name}");
        Some(Self {
            fd: info.fd().unwrap(),
            kinds: PhantomData,
        })
    }

    /// The value of a key.
    pub fn get(&self, key: &K) -> Option<V> {
        let mut value = V::zeroed();
        self.call(LOOKUP, (&raw const *key).cast(), (&raw mut value).cast())
            .then_some(value)
    }

    /// Writes an entry.
    pub fn set(&self, key: &K, mut value: V) {
        assert!(self.call(UPDATE, (&raw const *key).cast(), (&raw mut value).cast()));
    }

    /// Removes an entry; false if there is none.
    pub fn remove(&self, key: &K) -> bool {
        self.call(DELETE, (&raw const *key).cast(), std::ptr::null_mut())
    }

    /// All keys.
    pub fn keys(&self) -> Vec<K> {
        let mut keys = Vec::new();
        let mut next = K::zeroed();
        let mut last = std::ptr::null();
        while self.call(NEXT_KEY, last, (&raw mut next).cast()) {
            keys.push(next);
            last = (&raw const *keys.last().unwrap()).cast();
        }
        keys
    }

    /// All entries.
    pub fn entries(&self) -> Vec<(K, V)> {
        self.keys()
            .into_iter()
            .filter_map(|key| Some((key, self.get(&key)?)))
            .collect()
    }

    /// Writes zeros over all entries of an array that each CPU has of its own.
    pub fn wipe(&self) {
        let mut zeros =
            vec![0_u8; size_of::<V>().next_multiple_of(8) * aya::util::nr_cpus().unwrap()];
        for key in self.keys() {
            assert!(self.call(UPDATE, (&raw const key).cast(), zeros.as_mut_ptr()));
        }
    }

    /// Removes all entries.
    pub fn clear(&self) {
        for key in self.keys() {
            self.remove(&key);
        }
    }
}

/// The place of a map that grows: another one may stand in it later.
pub struct Place<K, V> {
    place: Table<u32, u32>,
    name: String,
    kinds: PhantomData<(K, V)>,
}

impl<K: NoUninit + AnyBitPattern, V: NoUninit + AnyBitPattern> Place<K, V> {
    /// The place of this name among the maps with these numbers.
    pub fn find(numbers: &[u32], name: &str) -> Option<Self> {
        Some(Self {
            place: Table::find(numbers, name)?,
            name: name.to_owned(),
            kinds: PhantomData,
        })
    }

    /// The map that stands in it now.
    pub fn now(&self) -> Table<K, V> {
        let number = self.place.get(&0).unwrap();
        Table::named(&MapInfo::from_id(number).unwrap(), &self.name).unwrap()
    }
}
