//! How long a container that keeps ending, or an image that can't be pulled, waits for its next try.

use std::collections::HashMap;
use std::time::{Duration, Instant};

const FIRST: Duration = Duration::from_secs(10);
const LONGEST: Duration = Duration::from_secs(300);
/// A container that ran this long starts over with the first wait.
const FORGIVEN_AFTER: Duration = Duration::from_secs(600);

/// Waits by key.
#[derive(Default)]
pub(crate) struct Backoff(HashMap<String, (Duration, Instant)>);

impl Backoff {
    /// When the next try may be made, if not now.
    pub(crate) fn until(&self, key: &str, now: Instant) -> Option<Instant> {
        self.0
            .get(key)
            .map(|(wait, since)| *since + *wait)
            .filter(|until| *until > now)
    }

    /// The wait in force, for messages.
    pub(crate) fn wait(&self, key: &str) -> Duration {
        self.0.get(key).map_or(FIRST, |(wait, _)| *wait)
    }

    /// Notes a failure, `ran` after the last start: the next wait is twice as long.
    pub(crate) fn failed(&mut self, key: &str, ran: Duration, now: Instant) {
        let next = match self.0.get(key) {
            Some((wait, _)) if ran < FORGIVEN_AFTER => (*wait * 2).min(LONGEST),
            _ => FIRST,
        };
        self.0.insert(key.to_owned(), (next, now));
    }

    /// Forgets a key.
    pub(crate) fn clear(&mut self, key: &str) {
        self.0.remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_five_minutes_and_are_forgiven() {
        let (mut backoff, now) = (Backoff::default(), Instant::now());
        let mut waits = Vec::new();
        for _ in 0..7 {
            backoff.failed("a", Duration::from_secs(1), now);
            waits.push(backoff.wait("a").as_secs());
        }
        assert_eq!(waits, [10, 20, 40, 80, 160, 300, 300]);
        assert_eq!(backoff.until("a", now), Some(now + LONGEST));
        assert_eq!(backoff.until("a", now + LONGEST), None);
        backoff.failed("a", Duration::from_secs(700), now);
        assert_eq!(backoff.wait("a"), FIRST);
    }
}
