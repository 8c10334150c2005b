//! What stands in a run of slots.

use std::hash::{BuildHasher, Hasher};

use xebec_dataplane_common::service::{CHUNK, Chunk};

use super::maglev::{self, Candidate};
use super::view::Algorithm;
use super::wanted::WantedRun;

/// How often all backends of a run may stand in it together, where their weights differ.
const MOST: u32 = 1 << 16;

/// How often a backend stands in a run in which one is chosen at random.
fn turns(weights: &[u16]) -> Vec<u32> {
    fn common(a: u32, b: u32) -> u32 {
        if b == 0 { a } else { common(b, a % b) }
    }
    let weights = || weights.iter().map(|weight| u32::from(*weight));
    let divisor = weights().fold(0, common).max(1);
    let sum: u64 = weights().map(|weight| u64::from(weight / divisor)).sum();
    if sum <= u64::from(MOST) {
        return weights().map(|weight| weight / divisor).collect();
    }
    let scaled = |weight: u32| u64::from(weight / divisor) * u64::from(MOST) / sum;
    weights()
        .map(|weight| (scaled(weight) as u32).max(u32::from(weight > 0)))
        .collect()
}

/// The slots of a run whose members have these numbers.
pub fn slots(
    run: &WantedRun,
    numbers: Vec<u32>,
    candidates: impl FnOnce() -> Vec<Candidate>,
) -> Vec<u32> {
    match run.algorithm {
        Algorithm::Maglev => {
            let table = maglev::table(&candidates(), maglev::size(numbers.len()));
            table.iter().map(|index| numbers[*index as usize]).collect()
        }
        Algorithm::Random if run.members.iter().all(|(_, weight)| *weight == 1) => numbers,
        Algorithm::Random => {
            let weights: Vec<u16> = run.members.iter().map(|(_, weight)| *weight).collect();
            let with_turns = numbers.iter().zip(turns(&weights));
            with_turns
                .flat_map(|(number, turns)| std::iter::repeat_n(*number, turns as usize))
                .collect()
        }
    }
}

/// How many chunks that many slots fill.
pub fn chunk_count(slots: usize) -> u32 {
    slots.div_ceil(CHUNK) as u32
}

/// Slots as chunks; what is left of the last one stays empty.
pub fn chunks(slots: &[u32]) -> impl Iterator<Item = Chunk> {
    slots.chunks(CHUNK).map(|some| {
        let mut chunk = [0; CHUNK];
        chunk[..some.len()].copy_from_slice(some);
        chunk
    })
}

/// Tells one run from another without keeping what stands in it.
pub fn fingerprint(
    hasher: &impl BuildHasher,
    algorithm: Algorithm,
    members: impl Iterator<Item = (u32, u16)>,
) -> u64 {
    let mut hasher = hasher.build_hasher();
    hasher.write_u8(algorithm as u8);
    for (number, weight) in members {
        hasher.write_u64(u64::from(number) << 16 | u64::from(weight));
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_become_turns() {
        assert_eq!(turns(&[1, 1]), [1, 1]);
        assert_eq!(turns(&[2, 4, 6]), [1, 2, 3]);
        assert_eq!(turns(&[5]), [1]);
        let many = [999, 1000].repeat(1000);
        let turns = turns(&many);
        assert!(turns.iter().sum::<u32>() <= MOST + 2000 && turns.iter().all(|turn| *turn > 0));
    }

    #[test]
    fn chunks_are_full_but_the_last() {
        let slots: Vec<u32> = (1..=17).collect();
        let all: Vec<Chunk> = chunks(&slots).collect();
        assert_eq!(
            (all.len() as u32, all[1][0], all[1][1]),
            (chunk_count(17), 17, 0)
        );
        assert_eq!((chunk_count(0), chunk_count(16)), (0, 1));
    }
}
