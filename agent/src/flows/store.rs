//! The newest flows of the node, each with a number that says how many came before it.

use std::collections::VecDeque;

use super::Seen;

/// What is kept.
#[derive(Clone, Debug)]
pub(super) enum Entry {
    /// What became of a packet.
    Flow(Seen),
    /// The kernel had no room for this many events at about this time (ns since 1970).
    Lost(u64, i64),
}

impl Entry {
    /// ns since 1970.
    pub(super) const fn time(&self) -> i64 {
        match self {
            Self::Flow(seen) => seen.time,
            Self::Lost(_, time) => *time,
        }
    }
}

/// As many entries as there is room for.
#[derive(Debug)]
pub(super) struct Store {
    kept: VecDeque<Entry>,
    room: usize,
    /// How many were forgotten: the number of the oldest that is kept.
    gone: u64,
}

impl Store {
    pub(super) fn new(room: usize) -> Self {
        Self {
            kept: VecDeque::new(),
            room,
            gone: 0,
        }
    }

    /// Keeps one; the oldest goes if there is no room.
    pub(super) fn push(&mut self, entry: Entry) {
        self.kept.push_back(entry);
        if self.kept.len() > self.room {
            self.kept.pop_front();
            self.gone += 1;
        }
    }

    /// The number of the oldest entry.
    pub(super) const fn oldest(&self) -> u64 {
        self.gone
    }

    /// The number that the next entry will have: how many there ever were.
    pub(super) fn next(&self) -> u64 {
        self.gone + self.kept.len() as u64
    }

    pub(super) fn len(&self) -> usize {
        self.kept.len()
    }

    pub(super) const fn room(&self) -> usize {
        self.room
    }

    /// The number of the first entry that is not older than this.
    pub(super) fn since(&self, time: i64) -> u64 {
        self.gone + self.kept.partition_point(|entry| entry.time() < time) as u64
    }

    /// Entries from this number to another, and the number of the first; those that are forgotten are left out.
    pub(super) fn range(&self, from: u64, to: u64) -> (u64, impl Iterator<Item = &Entry>) {
        let place = |number: u64| {
            usize::try_from(number.saturating_sub(self.gone))
                .map_or(self.kept.len(), |place| place.min(self.kept.len()))
        };
        let (first, end) = (place(from), place(to));
        let range = first.min(end)..end;
        (self.gone + first as u64, self.kept.range(range))
    }
}
