//! Maglev's table (Eisenbud et al., NSDI 2016): places of a table go to backends so that each has its share, every
//! node computes the same, and few places change their backend when one comes or goes.

use std::net::IpAddr;

use xebec_dataplane_common::ip::Ip;

/// Primes, each about twice the one before: the size stays while the number of backends changes a little.
const SIZES: [u32; 15] = [
    251, 509, 1021, 2039, 4093, 8191, 16_381, 32_749, 65_537, 131_071, 262_139, 524_287, 1_048_573,
    2_097_143, 4_194_301,
];

/// How many places the table of so many backends has: at least a hundred for each. From 64 on it is three hundred, up
/// to a size that is built in milliseconds: then not more than 1 % of the flows of others move when one goes.
pub fn size(backends: usize) -> u32 {
    let least = backends.saturating_mul(100);
    let wanted = match backends {
        64.. => least.max((backends.saturating_mul(300)).min(65_537)),
        _ => least,
    };
    let fits = SIZES.into_iter().find(|size| *size as usize >= wanted);
    fits.unwrap_or(SIZES[SIZES.len() - 1])
}

/// One to choose from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub ip: Ip,
    /// In the machine's order.
    pub port: u16,
    pub weight: u16,
}

/// Mixes all bits with all others (the finalizer of SplitMix64).
const fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A hash of the text `address:port`, the same on every node and in every version.
fn hash(one: &Candidate) -> u64 {
    let text = std::net::SocketAddr::new(IpAddr::from(one.ip), one.port).to_string();
    let fnv = text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    mix(fnv)
}

/// The index of a candidate for each place; empty where there are none.
pub fn table(candidates: &[Candidate], size: u32) -> Vec<u32> {
    struct Turn {
        index: u32,
        next: u32,
        skip: u32,
        weight: u32,
        credit: u32,
    }
    const FREE: u32 = u32::MAX;
    let mut order: Vec<u32> = (0..candidates.len() as u32).collect();
    order.sort_unstable_by_key(|index| {
        let one = &candidates[*index as usize];
        (IpAddr::from(one.ip), one.port)
    });
    let mut turns: Vec<Turn> = order
        .into_iter()
        .map(|index| {
            let one = &candidates[index as usize];
            let hash = hash(one);
            Turn {
                index,
                next: ((hash >> 32) % u64::from(size)) as u32,
                skip: (mix(hash) % u64::from(size - 1)) as u32 + 1,
                weight: u32::from(one.weight),
                credit: 0,
            }
        })
        .collect();
    let most = turns.iter().map(|turn| turn.weight).max().unwrap_or(0);
    if most == 0 {
        return Vec::new();
    }
    let mut places = vec![FREE; size as usize];
    let mut left = size;
    loop {
        for turn in &mut turns {
            // Who has half the weight takes every other turn.
            turn.credit += turn.weight;
            if turn.credit < most {
                continue;
            }
            turn.credit -= most;
            // Its own order goes through all places, so that there is a free one.
            while places[turn.next as usize] != FREE {
                turn.next += turn.skip;
                if turn.next >= size {
                    turn.next -= size;
                }
            }
            places[turn.next as usize] = turn.index;
            left -= 1;
            if left == 0 {
                return places;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn candidates(count: u32) -> Vec<Candidate> {
        (0..count)
            .map(|number| Candidate {
                ip: Ipv4Addr::from(0x0af4_0000 + number * 7).into(),
                port: 8080,
                weight: 1,
            })
            .collect()
    }

    fn shares(table: &[u32], count: usize) -> Vec<usize> {
        let mut shares = vec![0; count];
        table.iter().for_each(|index| shares[*index as usize] += 1);
        shares
    }

    #[test]
    fn sizes_are_primes_with_a_hundred_places_for_each() {
        for size in SIZES {
            let composite = (2..).take_while(|n| n * n <= size).any(|n| size % n == 0);
            assert!(!composite, "{size}");
        }
        assert_eq!(
            (size(0), size(2), size(3), size(655)),
            (251, 251, 509, 65_537)
        );
        assert_eq!((size(63), size(100), size(300)), (8191, 32_749, 65_537));
        assert_eq!(size(1_000_000), 4_194_301);
    }

    #[test]
    fn everyone_has_its_share_whatever_the_order() {
        let all = candidates(100);
        let table = table(&all, size(100));
        let shares = shares(&table, 100);
        let ideal = size(100) as f64 / 100.0;
        for share in shares {
            assert!((share as f64 - ideal).abs() <= 1.0, "{share} of {ideal}");
        }
        let turned: Vec<Candidate> = all.iter().rev().copied().collect();
        let other: Vec<u32> = super::table(&turned, size(100))
            .iter()
            .map(|i| 99 - i)
            .collect();
        assert_eq!(table, other);
    }

    #[test]
    fn a_backend_that_goes_moves_few_flows_of_others() {
        let all = candidates(100);
        let size = size(100);
        let before = table(&all, size);
        let mut worst = 0.0_f64;
        for gone in (0..100_u32).step_by(7) {
            let mut left = all.clone();
            left.remove(gone as usize);
            let after = table(&left, size);
            let moved = before.iter().zip(&after).filter(|(before, after)| {
                let same = if **after >= gone {
                    **after + 1
                } else {
                    **after
                };
                **before != gone && **before != same
            });
            worst = worst.max(moved.count() as f64 / f64::from(size));
        }
        println!("moved beyond the ideal: {:.3} %", worst * 100.0);
        assert!(worst <= 0.01, "{worst}");
    }

    #[test]
    fn weights_are_shares() {
        let mut all = candidates(4);
        for (one, weight) in all.iter_mut().zip([1, 2, 3, 0]) {
            one.weight = weight;
        }
        let size = size(100);
        let shares = shares(&table(&all, size), 4);
        for (share, part) in shares.iter().zip([1.0, 2.0, 3.0, 0.0]) {
            let ideal = f64::from(size) * part / 6.0;
            assert!((*share as f64 - ideal).abs() <= 3.0, "{shares:?}");
        }
        assert!(table(&[], 251).is_empty());
        all.iter_mut().for_each(|one| one.weight = 0);
        assert!(table(&all, 251).is_empty());
    }

    #[test]
    fn tables_are_the_same_in_every_version() {
        // Nodes of different versions serve one Service together.
        let sum = table(&candidates(10), 1021)
            .iter()
            .fold(0_u64, |sum, index| mix(sum ^ u64::from(*index)));
        assert_eq!(sum, 5_118_293_058_262_784_930);
    }

    #[test]
    fn how_long_a_large_table_takes() {
        let all = candidates(650);
        let began = std::time::Instant::now();
        let table = table(&all, 65_537);
        println!("65,537 places, 650 backends: {:?}", began.elapsed());
        assert_eq!(table.len(), 65_537);
    }
}
