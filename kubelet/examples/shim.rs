//! The shim as an executable of its own, for this crate's tests.

fn main() {
    std::process::exit(xebec_shim::main(std::env::args().skip(1).collect()));
}
