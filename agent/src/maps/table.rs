//! Hash maps and arrays of the kernel that are written many entries at a time, and ring buffers (bpf(2)).

use std::io::{Error, Result};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use aya::maps::MapData;

use super::batch::Attributes;
use super::memory::Memory;

/// Commands of bpf(2).
const MAP_CREATE: libc::c_int = 0;
const MAP_LOOKUP_ELEM: libc::c_int = 1;
const MAP_DELETE_ELEM: libc::c_int = 3;
const MAP_UPDATE_BATCH: libc::c_int = 26;
const MAP_DELETE_BATCH: libc::c_int = 27;
/// `BPF_F_NO_PREALLOC`.
const NO_PREALLOC: u32 = 1;
/// `BPF_F_MMAPABLE`.
const MMAPABLE: u32 = 1 << 10;
/// Kinds of maps.
const HASH: u32 = 1;
const ARRAY: u32 = 2;
const RING: u32 = 27;

/// bpf(2) with the attributes of one of its commands.
fn bpf<T>(command: libc::c_int, attributes: &mut T) -> Result<libc::c_long> {
    // SAFETY: the attributes are what the command reads and writes, as long as told, and what they point to
    // outlives the call.
    let outcome = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attributes),
            size_of::<T>(),
        )
    };
    match outcome {
        -1 => Err(Error::last_os_error()),
        outcome => Ok(outcome),
    }
}

/// Attributes of commands on one element.
#[repr(C)]
struct Element {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Attributes of a new map.
#[repr(C)]
#[derive(Default)]
struct Create {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    inner: u32,
    numa_node: u32,
    name: [u8; 16],
    rest: [u32; 7],
}

/// A hash map, an array, or a ring buffer.
pub(crate) struct Table {
    map: OwnedFd,
    key_size: usize,
    value_size: usize,
    capacity: u32,
    shared: Option<Memory>,
}

impl Table {
    /// The table behind a map; it stays after the map is dropped.
    pub fn of(map: &MapData) -> Result<Self> {
        let info = map.info().map_err(Error::other)?;
        let descriptor = map.fd().as_fd().try_clone_to_owned()?;
        Ok(Self {
            map: descriptor,
            key_size: info.key_size() as usize,
            value_size: info.value_size() as usize,
            capacity: info.max_entries(),
            shared: None,
        }
        .share(info.map_flags()))
    }

    /// A hash map that belongs to no program.
    pub fn hash(key_size: usize, value_size: usize, capacity: u32) -> Result<Self> {
        Self::create(HASH, "", (key_size, value_size), capacity, NO_PREALLOC)
    }

    /// A hash map that is to stand in a map of maps, under this name.
    pub fn inner(name: &str, key_size: usize, value_size: usize, capacity: u32) -> Result<Self> {
        Self::create(HASH, name, (key_size, value_size), capacity, NO_PREALLOC)
    }

    /// An array that belongs to no program.
    pub fn array(value_size: usize, capacity: u32) -> Result<Self> {
        Self::create(ARRAY, "", (4, value_size), capacity, MMAPABLE)
    }

    /// A ring buffer that is to stand in a map of maps, under this name: a power of two of pages.
    pub fn ring(name: &str, bytes: u32) -> Result<Self> {
        Self::create(RING, name, (0, 0), bytes, 0)
    }

    fn create(
        kind: u32,
        name: &str,
        (key_size, value_size): (usize, usize),
        capacity: u32,
        flags: u32,
    ) -> Result<Self> {
        let mut named = [0; 16];
        // The last byte ends it.
        let length = name.len().min(named.len() - 1);
        named[..length].copy_from_slice(&name.as_bytes()[..length]);
        let mut attributes = Create {
            kind,
            key_size: key_size as u32,
            value_size: value_size as u32,
            max_entries: capacity,
            flags,
            name: named,
            ..Create::default()
        };
        let descriptor = bpf(MAP_CREATE, &mut attributes)?;
        // SAFETY: the kernel has just given it to us.
        let map = unsafe { OwnedFd::from_raw_fd(descriptor as i32) };
        Ok(Self {
            map,
            key_size,
            value_size,
            capacity,
            shared: None,
        }
        .share(flags))
    }

    /// Maps the memory of an array that lets itself be mapped.
    fn share(mut self, flags: u32) -> Self {
        if flags & MMAPABLE != 0 {
            let length = self.stride() * self.capacity as usize;
            self.shared = Memory::of(&self.map, length).ok();
        }
        self
    }

    /// Bytes from one value of an array to the next.
    fn stride(&self) -> usize {
        self.value_size.next_multiple_of(8)
    }

    /// The same map, for whoever needs its descriptor.
    pub fn data(&self) -> Result<MapData> {
        MapData::from_fd(self.map.try_clone()?).map_err(Error::other)
    }

    /// How many entries there is room for.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Where an array's entry is, if the array is mapped and has it.
    pub fn place(&mut self, index: u32) -> Option<NonNull<u8>> {
        let shared = self.shared.as_ref().filter(|_| index < self.capacity)?;
        // SAFETY: the entry is within the mapping.
        Some(unsafe { shared.start().add(index as usize * self.stride()) })
    }

    /// Writes an entry of a mapped array of words, of which a program sees all or what it was before: the kernel's call
    /// copies byte by byte.
    pub fn set_word(&mut self, index: u32, word: u64) -> Result<()> {
        let place = match self.value_size {
            8 => self.place(index),
            _ => None,
        };
        let place = place.ok_or_else(|| Error::other("no such word is mapped"))?;
        // SAFETY: the place is within the mapping, and each entry of the array is one aligned word, which programs only
        // read.
        unsafe { AtomicU64::from_ptr(place.as_ptr().cast()) }.store(word, Ordering::Release);
        Ok(())
    }

    /// Writes entries whose keys and values lie side by side.
    pub fn update(&mut self, keys: &[u8], values: &[u8]) -> Result<()> {
        let count = keys.len() / self.key_size;
        assert_eq!(keys.len(), count * self.key_size);
        assert_eq!(values.len(), count * self.value_size);
        let mut done = 0;
        while done < count {
            let (keys, values) = (
                &keys[done * self.key_size..],
                &values[done * self.value_size..],
            );
            let mut batch = self.batch(keys, values.as_ptr() as u64);
            match bpf(MAP_UPDATE_BATCH, &mut batch) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {
                    done += (batch.count as usize).min(count - done);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Removes entries of a hash map whose keys lie side by side, as far as they are there.
    pub fn remove_all(&mut self, keys: &[u8]) -> Result<()> {
        let count = keys.len() / self.key_size;
        assert_eq!(keys.len(), count * self.key_size);
        let mut done = 0;
        while done < count {
            let mut batch = self.batch(&keys[done * self.key_size..], 0);
            let outcome = bpf(MAP_DELETE_BATCH, &mut batch);
            done += (batch.count as usize).min(count - done);
            match outcome {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                // The one that it stopped at is not there.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => done += 1,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn batch(&self, keys: &[u8], values: u64) -> Attributes {
        Attributes {
            in_batch: 0,
            out_batch: 0,
            keys: keys.as_ptr() as u64,
            values,
            count: (keys.len() / self.key_size) as u32,
            map: self.map.as_raw_fd() as u32,
            element_flags: 0,
            flags: 0,
        }
    }

    /// Removes an entry of a hash map; whether it was there.
    pub fn remove(&mut self, key: &[u8]) -> Result<bool> {
        assert_eq!(key.len(), self.key_size);
        let mut element = self.element(key, std::ptr::null_mut());
        match bpf(MAP_DELETE_ELEM, &mut element) {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Reads an entry; whether it is there.
    pub fn get(&self, key: &[u8], value: &mut [u8]) -> Result<bool> {
        assert_eq!((key.len(), value.len()), (self.key_size, self.value_size));
        let mut element = self.element(key, value.as_mut_ptr());
        match bpf(MAP_LOOKUP_ELEM, &mut element) {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn element(&self, key: &[u8], value: *mut u8) -> Element {
        Element {
            map: self.map.as_raw_fd() as u32,
            pad: 0,
            key: key.as_ptr() as u64,
            value: value as u64,
            flags: 0,
        }
    }
}
