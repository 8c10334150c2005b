//! The scheduling queue: what to try now, what to try after a back-off, and what waits for the cluster to change.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::view::PodView;

/// First back-off after a failed attempt; it doubles up to the longest (upstream's defaults).
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Active,
    /// Waits for its time.
    Backoff(Instant),
    /// Waits for an event that may make it fit.
    Unschedulable(Instant),
    /// Held by a PreEnqueue plugin.
    Gated,
}

struct Entry {
    pod: Arc<PodView>,
    order: u64,
    attempts: u32,
    place: Place,
}

/// Pending pods, each in one place; the active ones by priority, then first come first served.
#[derive(Default)]
pub(crate) struct Queue {
    entries: HashMap<String, Entry>,
    active: BTreeMap<(std::cmp::Reverse<i32>, u64), String>,
    next_order: u64,
    /// Attempts of the pod that was popped last, until it is put back or bound.
    popped: HashMap<String, u32>,
}

impl Queue {
    /// Adds a pending pod, or takes over its change; a changed pod that waited is tried again.
    pub(crate) fn set(&mut self, pod: Arc<PodView>, gated: bool) {
        if self.popped.contains_key(&pod.uid) {
            // Its attempt is under way; a failed one comes back through `failed`.
            return;
        }
        let uid = pod.uid.clone();
        match self.entries.get_mut(&uid) {
            Some(entry) => entry.pod = pod,
            None => {
                self.next_order += 1;
                let entry = Entry {
                    pod,
                    order: self.next_order,
                    attempts: 0,
                    place: Place::Gated,
                };
                self.entries.insert(uid.clone(), entry);
            }
        }
        if gated {
            self.place(&uid, Place::Gated);
        } else if !matches!(
            self.entries.get(&uid).map(|e| e.place),
            Some(Place::Backoff(_))
        ) {
            self.place(&uid, Place::Active);
        }
    }

    /// Forgets a pod that was bound, deleted or finished.
    pub(crate) fn remove(&mut self, uid: &str) {
        self.popped.remove(uid);
        if let Some(entry) = self.entries.remove(uid) {
            self.active
                .remove(&(std::cmp::Reverse(entry.pod.priority), entry.order));
        }
    }

    /// Takes the next pod to try.
    pub(crate) fn pop(&mut self, now: Instant) -> Option<Arc<PodView>> {
        self.release(now);
        let (_, uid) = self.active.pop_first()?;
        let entry = self.entries.remove(&uid)?;
        self.popped.insert(uid, entry.attempts + 1);
        Some(entry.pod)
    }

    /// Puts a pod back after a failed attempt. `unschedulable`: no node fits, so only a change helps;
    /// otherwise it is tried again after its back-off.
    pub(crate) fn failed(&mut self, pod: Arc<PodView>, unschedulable: bool, now: Instant) {
        let Some(attempts) = self.popped.remove(&pod.uid) else {
            return;
        };
        self.next_order += 1;
        let uid = pod.uid.clone();
        let until = now + backoff(attempts);
        let place = if unschedulable {
            Place::Unschedulable(until)
        } else {
            Place::Backoff(until)
        };
        self.entries.insert(
            uid,
            Entry {
                pod,
                order: self.next_order,
                attempts,
                place,
            },
        );
    }

    /// The cluster changed in a way that may let waiting pods fit: they are tried again once their back-off is over.
    pub(crate) fn wake(&mut self, now: Instant) {
        let waiting: Vec<(String, Instant)> = self
            .entries
            .iter()
            .filter_map(|(uid, entry)| match entry.place {
                Place::Unschedulable(until) => Some((uid.clone(), until)),
                _ => None,
            })
            .collect();
        for (uid, until) in waiting {
            self.place(
                &uid,
                if until <= now {
                    Place::Active
                } else {
                    Place::Backoff(until)
                },
            );
        }
    }

    /// When the next back-off ends, if any.
    pub(crate) fn next_release(&self) -> Option<Instant> {
        self.entries
            .values()
            .filter_map(|entry| match entry.place {
                Place::Backoff(until) => Some(until),
                _ => None,
            })
            .min()
    }

    fn release(&mut self, now: Instant) {
        if self.next_release().is_none_or(|at| at > now) {
            return;
        }
        let due: Vec<String> = self
            .entries
            .iter()
            .filter(|(_, entry)| matches!(entry.place, Place::Backoff(until) if until <= now))
            .map(|(uid, _)| uid.clone())
            .collect();
        due.iter().for_each(|uid| self.place(uid, Place::Active));
    }

    fn place(&mut self, uid: &str, place: Place) {
        let Some(entry) = self.entries.get_mut(uid) else {
            return;
        };
        entry.place = place;
        // The priority may have changed with the pod, so the old key is found by order.
        self.active.retain(|_, other| other != uid);
        if place == Place::Active {
            self.active.insert(
                (std::cmp::Reverse(entry.pod.priority), entry.order),
                uid.to_owned(),
            );
        }
    }
}

fn backoff(attempts: u32) -> Duration {
    FIRST_BACKOFF
        .saturating_mul(1 << attempts.saturating_sub(1).min(10))
        .min(LONGEST_BACKOFF)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1 as core;

    fn pod(uid: &str, priority: i32) -> Arc<PodView> {
        let pod: core::Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"name": uid, "uid": uid}, "spec": {"priority": priority, "containers": []},
        }))
        .unwrap();
        Arc::new(PodView::from(&pod))
    }

    #[test]
    fn priority_first_then_first_come() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        for (uid, priority) in [("a", 0), ("b", 10), ("c", 10), ("d", -1)] {
            queue.set(pod(uid, priority), false);
        }
        let order: Vec<String> = std::iter::from_fn(|| queue.pop(now))
            .map(|pod| pod.uid.clone())
            .collect();
        assert_eq!(order, ["b", "c", "a", "d"]);
    }

    #[test]
    fn an_unschedulable_pod_waits_for_an_event_and_its_backoff() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.set(pod("a", 0), false);
        let popped = queue.pop(now).unwrap();
        queue.failed(popped, true, now);
        assert!(
            queue.pop(now + Duration::from_secs(60)).is_none(),
            "no event came"
        );
        queue.wake(now);
        assert!(queue.pop(now).is_none(), "its back-off is not over");
        assert_eq!(queue.next_release(), Some(now + FIRST_BACKOFF));
        assert!(queue.pop(now + FIRST_BACKOFF).is_some());
    }

    #[test]
    fn a_deleted_pod_does_not_come_back_from_a_failed_attempt() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.set(pod("a", 0), false);
        let popped = queue.pop(now).unwrap();
        queue.remove("a");
        queue.failed(popped, false, now);
        assert!(queue.pop(now + LONGEST_BACKOFF).is_none());
    }

    #[test]
    fn backoff_doubles_up_to_its_limit() {
        let seconds: Vec<u64> = (1..=6)
            .map(|attempts| backoff(attempts).as_secs())
            .collect();
        assert_eq!(seconds, [1, 2, 4, 8, 10, 10]);
    }
}
