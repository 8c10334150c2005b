//! What the events of a watch mean for what is known.

use std::collections::BTreeSet;

use kube::runtime::watcher::Event;

/// Objects of a kind that were listed since its last `Init`.
pub(super) struct Listing<T> {
    seen: BTreeSet<T>,
    /// Whether all that there is has been told once.
    pub done: bool,
}

impl<T> Default for Listing<T> {
    fn default() -> Self {
        Self {
            seen: BTreeSet::new(),
            done: false,
        }
    }
}

/// What an event means to the tables.
pub(super) enum Taken<T, N> {
    /// This one is so now.
    Set(Box<T>),
    /// These are gone.
    Gone(Vec<N>),
    /// These are all that there are.
    Listed(BTreeSet<N>),
    /// Nothing yet.
    Nothing,
}

impl<N: Ord + Clone> Listing<N> {
    /// Takes an event.
    pub fn take<T>(&mut self, event: Event<T>, name: impl Fn(&T) -> N) -> Taken<T, N> {
        match event {
            Event::Init => {
                self.seen.clear();
                Taken::Nothing
            }
            Event::InitApply(one) => {
                self.seen.insert(name(&one));
                Taken::Set(Box::new(one))
            }
            Event::InitDone => {
                self.done = true;
                Taken::Listed(std::mem::take(&mut self.seen))
            }
            Event::Apply(one) => Taken::Set(Box::new(one)),
            Event::Delete(one) => Taken::Gone(vec![name(&one)]),
        }
    }
}
