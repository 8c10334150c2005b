//! The type table of the Kubernetes API and everything that walks an object with it.

pub mod quantity;
