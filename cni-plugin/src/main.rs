//! The CNI plugin as an executable of its own.

fn main() -> std::process::ExitCode {
    xebec_cni::main()
}
