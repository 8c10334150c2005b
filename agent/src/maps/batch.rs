//! Reads many entries of a map with one call to the kernel (`BPF_MAP_LOOKUP_BATCH`): where entries come and go
//! meanwhile, the walk neither starts again nor goes on for ever, as one from key to key may.

use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Context, Result, bail, ensure};
use aya::maps::MapData;
use bytemuck::{AnyBitPattern, pod_read_unaligned};

/// How many entries are asked for at once, unless a bucket holds more.
const AT_ONCE: usize = 1_024;
/// The kernel's number of the command.
const LOOKUP_BATCH: libc::c_int = 24;

/// `struct { ... } batch` of `union bpf_attr`.
#[repr(C)]
pub(super) struct Attributes {
    pub in_batch: u64,
    pub out_batch: u64,
    pub keys: u64,
    pub values: u64,
    pub count: u32,
    pub map: u32,
    pub element_flags: u64,
    pub flags: u64,
}

/// What one call gave.
enum Given {
    /// So many entries, and there may be more.
    Some(usize),
    /// So many entries, and no more.
    Last(usize),
    /// A bucket has more entries than there was room for.
    TooMany,
}

/// One call: entries after `from` into `keys` and `values`, `count` of them at most; where to go on is left in `next`.
///
/// # Safety
/// `keys` and `values` must have room for `count` keys and values of the map's sizes, `from` and `next` for a key.
unsafe fn call(
    map: &MapData,
    from: Option<&[u8]>,
    next: &mut [u8],
    keys: &mut [u8],
    values: &mut [u8],
    count: usize,
) -> Result<Given> {
    let mut attributes = Attributes {
        in_batch: from.map_or(0, |from| from.as_ptr() as u64),
        out_batch: next.as_mut_ptr() as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count: u32::try_from(count).context("too many entries at once")?,
        map: map.fd().as_fd().as_raw_fd() as u32,
        element_flags: 0,
        flags: 0,
    };
    // SAFETY: the caller made room for what the kernel writes, and all of it outlives the call.
    let outcome = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            LOOKUP_BATCH,
            &raw mut attributes,
            size_of::<Attributes>(),
        )
    };
    let given = attributes.count as usize;
    if outcome == 0 {
        return Ok(Given::Some(given));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ENOENT) => Ok(Given::Last(given)),
        Some(libc::ENOSPC) => Ok(Given::TooMany),
        _ => Err(error).context("could not read entries of a map"),
    }
}

/// Whether a map's entries are what they are read as.
fn check<K, V>(map: &MapData) -> Result<()> {
    let info = map.info().context("could not ask for a map's sizes")?;
    ensure!(
        info.key_size() as usize == size_of::<K>() && info.value_size() as usize == size_of::<V>(),
        "the map {} has entries of {} and {} bytes, not {} and {}: an agent of another version made it",
        info.name_as_str().unwrap_or_default(),
        info.key_size(),
        info.value_size(),
        size_of::<K>(),
        size_of::<V>(),
    );
    Ok(())
}

/// Walks a hash map: gives the keys and values of each call to `each`, and how many they are, until it breaks.
pub(super) fn walk(
    map: &MapData,
    mut each: impl FnMut(&[u8], &[u8], usize) -> ControlFlow<()>,
) -> Result<()> {
    let info = map.info().context("could not ask for a map's sizes")?;
    let (key, value) = (info.key_size() as usize, info.value_size() as usize);
    let mut room = AT_ONCE;
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    // A hash map's place in the walk is the number of a bucket; others' is a key.
    let size = key.max(size_of::<u32>());
    let (mut from, mut next) = (vec![0_u8; size], vec![0_u8; size]);
    let mut begun = false;
    loop {
        keys.resize(room * key, 0_u8);
        values.resize(room * value, 0_u8);
        let place = begun.then_some(from.as_slice());
        // SAFETY: all of them have the sizes that the kernel told.
        let given = unsafe { call(map, place, &mut next, &mut keys, &mut values, room) }?;
        let (given, last) = match given {
            Given::Some(given) => (given, false),
            Given::Last(given) => (given, true),
            Given::TooMany => {
                room = room.checked_mul(2).context("a map's bucket has no end")?;
                continue;
            }
        };
        let told = each(&keys[..given * key], &values[..given * value], given);
        if last || told.is_break() {
            return Ok(());
        }
        begun = true;
        std::mem::swap(&mut from, &mut next);
    }
}

/// Gives each entry of a hash map to `each`, until it breaks.
pub(crate) fn entries<K: AnyBitPattern, V: AnyBitPattern>(
    map: &MapData,
    mut each: impl FnMut(&K, &V) -> ControlFlow<()>,
) -> Result<()> {
    check::<K, V>(map)?;
    walk(map, |keys, values, _| {
        let keys = keys.chunks_exact(size_of::<K>());
        for (key, value) in keys.zip(values.chunks_exact(size_of::<V>())) {
            each(&pod_read_unaligned(key), &pod_read_unaligned(value))?;
        }
        ControlFlow::Continue(())
    })
}

/// How many entries a hash map holds.
pub(crate) fn count(map: &MapData) -> Result<usize> {
    let mut all = 0;
    walk(map, |_, _, given| {
        all += given;
        ControlFlow::Continue(())
    })?;
    Ok(all)
}

/// The entries of an array from this one on, as many as are asked for.
pub(crate) fn range<V: AnyBitPattern>(map: &MapData, first: u32, count: u32) -> Result<Vec<V>> {
    check::<u32, V>(map)?;
    let info = map.info().context("could not ask for a map's size")?;
    ensure!(
        first
            .checked_add(count)
            .is_some_and(|end| end <= info.max_entries()),
        "{count} entries from the {first}th on are beyond the end of the map {}",
        info.name_as_str().unwrap_or_default()
    );
    let wanted = count as usize;
    let mut found = Vec::with_capacity(wanted);
    let (mut keys, mut values) = (vec![0_u8; wanted * 4], vec![0_u8; wanted * size_of::<V>()]);
    while found.len() < wanted {
        // The kernel goes on after the key that it is given.
        let before = (first as usize + found.len()).checked_sub(1);
        let before = before.map(|before| (before as u32).to_ne_bytes());
        let place = before.as_ref().map(<[u8; 4]>::as_slice);
        let rest = wanted - found.len();
        let mut next = [0_u8; 4];
        // SAFETY: an array's keys have four bytes, and its values the size that was checked.
        let given = unsafe { call(map, place, &mut next, &mut keys, &mut values, rest) }?;
        let (Given::Some(given) | Given::Last(given)) = given else {
            bail!("an array has no buckets");
        };
        ensure!(given > 0, "an array ended before its end");
        let values = values.chunks_exact(size_of::<V>()).take(given);
        found.extend(values.map(pod_read_unaligned::<V>));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use aya::maps::{Array, HashMap, MapData};

    use super::*;

    /// Making maps needs rights; without them there is nothing to read.
    fn may_make_maps() -> bool {
        if nix::unistd::geteuid().is_root() {
            return true;
        }
        println!("skipped: it needs root");
        false
    }

    /// The map with room for so many entries, which no other test has.
    fn opened(capacity: u64) -> MapData {
        let held = crate::bpf_maps::held().unwrap();
        let map = held.iter().find(|map| map.capacity == capacity).unwrap();
        map.open().unwrap()
    }

    #[test]
    fn every_entry_is_read_once() {
        if !may_make_maps() {
            return;
        }
        let mut map: HashMap<MapData, u32, u64> = HashMap::create(10_007, 1).unwrap();
        for key in 0..5_000_u32 {
            map.insert(key, u64::from(key) * 3, 0).unwrap();
        }
        let data = opened(10_007);
        assert_eq!(count(&data).unwrap(), 5_000);
        let mut seen = std::collections::BTreeSet::new();
        entries::<u32, u64>(&data, |key, value| {
            assert_eq!(*value, u64::from(*key) * 3);
            assert!(seen.insert(*key), "{key} came twice");
            ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!(seen.len(), 5_000);
        let error = entries::<u32, u32>(&data, |_, _| ControlFlow::Continue(())).unwrap_err();
        assert!(error.to_string().contains("another version"), "{error:#}");
    }

    #[test]
    fn a_part_of_an_array_is_read() {
        if !may_make_maps() {
            return;
        }
        let mut map: Array<MapData, u64> = Array::create(3_001, 0).unwrap();
        for at in 0..3_001 {
            map.set(at, u64::from(at) + 7, 0).unwrap();
        }
        let data = opened(3_001);
        for (first, count) in [(0, 1), (0, 3_001), (17, 2_000), (3_000, 1), (5, 0)] {
            let found: Vec<u64> = range(&data, first, count).unwrap();
            let wanted: Vec<u64> = (first..first + count).map(|at| u64::from(at) + 7).collect();
            assert_eq!(found, wanted, "{first}, {count}");
        }
        assert!(range::<u64>(&data, 3_000, 2).is_err());
    }
}
