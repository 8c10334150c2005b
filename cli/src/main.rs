//! The `xebec` executable.
fn main() {}
