//! A place within an object, linked to the places around it: its path is put together only when it is told.

use std::fmt;

/// How a place is reached from the one around it.
#[derive(Clone, Copy, Debug)]
enum Step<'s> {
    Field(&'s str),
    Index(usize),
    Key(&'s str),
}

/// A place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'p> {
    above: Option<&'p Place<'p>>,
    step: Step<'p>,
}

impl<'p> Place<'p> {
    /// A whole object: what is in it is told by its own name.
    pub const ROOT: Self = Self::named("");

    /// Where a path of its own leads.
    pub const fn named(path: &'p str) -> Self {
        Self {
            above: None,
            step: Step::Field(path),
        }
    }

    fn below<'s>(&'s self, step: Step<'s>) -> Place<'s> {
        Place {
            above: Some(self),
            step,
        }
    }

    /// A field, told after a dot.
    pub fn field<'s>(&'s self, name: &'s str) -> Place<'s> {
        self.below(Step::Field(name))
    }

    /// An item of a list.
    pub fn index(&self, index: usize) -> Place<'_> {
        self.below(Step::Index(index))
    }

    /// An entry of a map, told in brackets.
    pub fn key<'s>(&'s self, key: &'s str) -> Place<'s> {
        self.below(Step::Key(key))
    }

    /// Whether nothing is told of it.
    pub fn is_root(&self) -> bool {
        self.above.is_none() && matches!(self.step, Step::Field(""))
    }
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(above) = self.above {
            above.fmt(f)?;
        }
        let first = self.above.is_none_or(Place::is_root);
        match self.step {
            Step::Field(name) if first => f.write_str(name),
            Step::Field(name) => write!(f, ".{name}"),
            Step::Index(index) => write!(f, "[{index}]"),
            Step::Key(key) => write!(f, "[{key}]"),
        }
    }
}
