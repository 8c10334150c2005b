//! The arithmetic of a rolling update, apart from the API so that it can be tested as such.

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// One ReplicaSet's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size {
    /// Replicas asked for.
    pub spec: i32,
    /// Replicas that are available.
    pub available: i32,
}

/// What a rolling update may do at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    pub desired: i32,
    /// Pods above `desired`.
    pub surge: i32,
    /// Pods below `desired` that may be missing.
    pub unavailable: i32,
}

impl Limits {
    /// Percentages are of `desired`: the surge is rounded up, the unavailable down; both zero would
    /// never end, so one may be unavailable then.
    pub(super) fn new(
        desired: i32,
        surge: Option<&IntOrString>,
        unavailable: Option<&IntOrString>,
    ) -> Self {
        let quarter = IntOrString::String("25%".into());
        let surge = scaled(surge.unwrap_or(&quarter), desired, true);
        let mut unavailable = scaled(unavailable.unwrap_or(&quarter), desired, false);
        if surge == 0 && unavailable == 0 {
            unavailable = 1;
        }
        Self {
            desired,
            surge,
            unavailable: unavailable.min(desired),
        }
    }

    pub(super) fn most(&self) -> i32 {
        self.desired.saturating_add(self.surge)
    }

    /// How large the new ReplicaSet may be made now.
    pub(super) fn new_size(&self, new: i32, total: i32) -> i32 {
        if new >= self.desired {
            return self.desired;
        }
        let room = (self.most() - total).max(0);
        new + room.min(self.desired - new)
    }

    /// How large the old ReplicaSets, oldest first, may stay now: what is not available goes first,
    /// then as many as the available ones allow.
    pub(super) fn old_sizes(&self, new: Size, old: &[Size]) -> Vec<i32> {
        let mut sizes: Vec<i32> = old.iter().map(|size| size.spec).collect();
        let total = new.spec + sizes.iter().sum::<i32>();
        let least = self.desired - self.unavailable;
        let mut budget = total - least - (new.spec - new.available).max(0);
        for (size, old) in sizes.iter_mut().zip(old) {
            let down = (*size - old.available).max(0).min(budget.max(0));
            *size -= down;
            budget -= down;
        }
        if total - least - (new.spec - new.available).max(0) <= 0 {
            return sizes;
        }
        let available = new.available + old.iter().map(|old| old.available).sum::<i32>();
        let mut budget = available - least;
        for size in &mut sizes {
            let down = (*size).min(budget.max(0));
            *size -= down;
            budget -= down;
        }
        sizes
    }
}

/// A count, or a share of `of`.
fn scaled(value: &IntOrString, of: i32, up: bool) -> i32 {
    match value {
        IntOrString::Int(count) => (*count).max(0),
        IntOrString::String(text) => {
            let percent: i64 = text
                .strip_suffix('%')
                .and_then(|text| text.parse().ok())
                .unwrap_or(0);
            let product = percent.max(0) * i64::from(of.max(0));
            let share = if up {
                (product + 99) / 100
            } else {
                product / 100
            };
            i32::try_from(share).unwrap_or(i32::MAX)
        }
    }
}

/// New sizes when a Deployment is scaled in the middle of a rollout: each ReplicaSet gets its share.
/// `sets` are (size, the total that it was part of), the one to get what is left over first.
pub(super) fn proportional(sets: &[(i32, i32)], most: i32) -> Vec<i32> {
    let total: i32 = sets.iter().map(|(size, _)| size).sum();
    let to_add = most - total;
    let mut added = 0;
    let mut sizes: Vec<i32> = sets
        .iter()
        .map(|&(size, of)| {
            if to_add == 0 || size == 0 || of <= 0 {
                return size;
            }
            let share = (f64::from(size) * f64::from(most) / f64::from(of)).round() as i32 - size;
            let left = to_add - added;
            let share = if to_add > 0 {
                share.min(left).max(0)
            } else {
                share.max(left).min(0)
            };
            added += share;
            size + share
        })
        .collect();
    if let Some(first) = sizes.first_mut() {
        *first = (*first + to_add - added).max(0);
    }
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn percent(text: &str) -> IntOrString {
        IntOrString::String(text.into())
    }

    #[test]
    fn shares_round_the_surge_up_and_the_unavailable_down() {
        let limits = |desired, surge: &str, unavailable: &str| {
            let limits = Limits::new(desired, Some(&percent(surge)), Some(&percent(unavailable)));
            (limits.surge, limits.unavailable)
        };
        assert_eq!(limits(10, "25%", "25%"), (3, 2));
        assert_eq!(limits(1, "25%", "25%"), (1, 0));
        assert_eq!(limits(10, "0%", "0%"), (0, 1));
        assert_eq!(limits(0, "25%", "25%"), (0, 0));
        let counts = Limits::new(3, Some(&IntOrString::Int(2)), Some(&IntOrString::Int(9)));
        assert_eq!((counts.surge, counts.unavailable), (2, 3));
    }

    /// Plays many rollouts with pods that come up in random order: the limits hold at every step, and it ends.
    #[test]
    fn a_rollout_keeps_its_limits_and_ends() {
        let mut random = 88172645463325252u64;
        let mut below = |n: i32| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random % n.max(1) as u64) as i32
        };
        for round in 0..3000 {
            let desired = 1 + below(12);
            let limits = Limits::new(
                desired,
                Some(&IntOrString::Int(below(4))),
                Some(&IntOrString::Int(below(4))),
            );
            let mut new = Size {
                spec: 0,
                available: 0,
            };
            let first = below(desired + 1);
            let mut old = vec![
                Size {
                    spec: first,
                    available: first,
                },
                Size {
                    spec: desired - first,
                    available: desired - first,
                },
            ];
            let mut steps = 0;
            while new.available < desired || old.iter().any(|old| old.spec > 0) {
                steps += 1;
                assert!(
                    steps < 1000,
                    "round {round} does not end: {limits:?} {new:?} {old:?}"
                );
                let total = new.spec + old.iter().map(|old| old.spec).sum::<i32>();
                new.spec = limits.new_size(new.spec, total);
                let sizes = limits.old_sizes(new, &old);
                for (old, size) in old.iter_mut().zip(sizes) {
                    // Of the pods that are not available the controller removes those first.
                    old.spec = size;
                    old.available = old.available.min(size);
                }
                let total = new.spec + old.iter().map(|old| old.spec).sum::<i32>();
                let available = new.available + old.iter().map(|old| old.available).sum::<i32>();
                assert!(
                    total <= limits.most(),
                    "round {round}: {limits:?} {new:?} {old:?}"
                );
                assert!(
                    available >= desired - limits.unavailable,
                    "round {round}: {limits:?} {new:?} {old:?}"
                );
                if new.available < new.spec && below(2) == 0 {
                    new.available += 1;
                }
            }
            assert_eq!(new.spec, desired);
        }
    }

    #[test]
    fn pods_that_never_became_available_go_first() {
        let limits = Limits {
            desired: 10,
            surge: 3,
            unavailable: 2,
        };
        let old = [Size {
            spec: 10,
            available: 8,
        }];
        let new = Size {
            spec: 3,
            available: 0,
        };
        assert_eq!(limits.old_sizes(new, &old), [8]);
    }

    #[test]
    fn scaling_in_the_middle_of_a_rollout_is_shared() {
        // 10 desired, surge 3: 8 old and 5 new of 13; now 15 desired, surge 4.
        assert_eq!(proportional(&[(8, 13), (5, 13)], 19), [12, 7]);
        assert_eq!(proportional(&[(8, 13), (5, 13)], 13), [8, 5]);
        assert_eq!(proportional(&[(8, 13), (5, 13)], 6).iter().sum::<i32>(), 6);
        assert_eq!(proportional(&[], 6), [0; 0]);
    }
}
