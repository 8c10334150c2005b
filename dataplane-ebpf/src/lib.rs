//! The kernel side of the dataplane.
