//! What Services' ports are called, for those who read flows.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use hashbrown::HashMap;

/// Namespace and name (`shop/web`) by the number of a Service's port; cheap to clone, all clones are the same.
#[derive(Clone, Default)]
pub struct ServiceNames(Arc<RwLock<HashMap<u32, Arc<str>>>>);

/// The names of a moment.
pub struct Now<'a>(RwLockReadGuard<'a, HashMap<u32, Arc<str>>>);

impl Now<'_> {
    /// The Service of a port's number.
    pub fn get(&self, number: u32) -> Option<&Arc<str>> {
        self.0.get(&number)
    }
}

impl ServiceNames {
    /// The names of this moment; none changes while it is held.
    pub fn now(&self) -> Now<'_> {
        Now(self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Gives a number to a Service; false if another has it.
    pub fn add(&self, number: u32, name: &Arc<str>) -> bool {
        let mut names = self.0.write().unwrap_or_else(PoisonError::into_inner);
        names.try_insert(number, name.clone()).is_ok()
    }

    /// The number is nobody's any more.
    pub fn remove(&self, number: u32) {
        let mut names = self.0.write().unwrap_or_else(PoisonError::into_inner);
        names.remove(&number);
    }

    /// How many numbers are in use.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.now().0.len()
    }
}
