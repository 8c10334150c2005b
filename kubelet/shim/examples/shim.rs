//! The shim alone, for the runtime's tests.

fn main() {
    std::process::exit(xebec_shim::main(std::env::args().skip(1).collect()));
}
