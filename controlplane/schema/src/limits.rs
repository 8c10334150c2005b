//! What a request's body may cost: how deep it nests, and what it becomes in memory, which can be hundreds of times
//! its own size.

use std::cell::Cell;

/// Units that one body may cost; a unit is somewhat less than a hundred bytes of memory.
const MOST: usize = 500_000;
/// Units of a map, which takes memory for several entries with its first.
const MAP: usize = 8;

/// Why a body costs too much.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TooMuch {
    /// It nests too deep.
    #[error("exceeded max depth")]
    Depth,
    /// It has too many values.
    #[error("the object has too many fields and items; split it into several objects")]
    Values,
}

/// What the values of one body may still cost.
#[derive(Debug)]
pub(crate) struct Budget(Cell<usize>);

impl Budget {
    /// For a new body.
    pub fn new() -> Self {
        Self(Cell::new(MOST))
    }

    fn spend(&self, units: usize) -> Result<(), TooMuch> {
        let left = self.0.get().checked_sub(units).ok_or(TooMuch::Values)?;
        self.0.set(left);
        Ok(())
    }

    /// One value more, in its place in the one around it.
    pub fn value(&self) -> Result<(), TooMuch> {
        self.spend(1)
    }

    /// One map more.
    pub fn map(&self) -> Result<(), TooMuch> {
        self.spend(MAP)
    }
}
