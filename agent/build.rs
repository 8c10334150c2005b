//! Puts the eBPF object that `$XEBEC_EBPF_OBJECT` names (set by `cargo xtask`) into the agent; without it the
//! agent is built all the same, and says at run time that it has none.

fn main() {
    println!("cargo::rerun-if-env-changed=XEBEC_EBPF_OBJECT");
    println!("cargo::rustc-check-cfg=cfg(ebpf_object)");
    let Some(object) = std::env::var_os("XEBEC_EBPF_OBJECT") else {
        return;
    };
    println!("cargo::rerun-if-changed={}", object.display());
    let out = std::env::var_os("OUT_DIR")
        .map(std::path::PathBuf::from)
        .unwrap_or_default();
    match std::fs::copy(&object, out.join("dataplane.o")) {
        Ok(_) => println!("cargo::rustc-cfg=ebpf_object"),
        Err(error) => println!("cargo::error=could not copy {}: {error}", object.display()),
    }
}
