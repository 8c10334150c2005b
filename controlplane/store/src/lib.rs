//! Revisioned key-value storage: one trait, an embedded engine.
