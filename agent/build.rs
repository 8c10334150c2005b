//! Puts the eBPF object that `$XEBEC_EBPF_OBJECT` names (set by `cargo xtask`) into the agent; without it the
//! agent is built all the same, and says at run time that it has none.

use std::error::Error;
use std::ffi::OsStr;
use std::path::Path;

use object::build::elf::{Builder, SectionData};
use object::elf;

fn main() {
    println!("cargo::rerun-if-env-changed=XEBEC_EBPF_OBJECT");
    println!("cargo::rustc-check-cfg=cfg(ebpf_object)");
    let Some(object) = std::env::var_os("XEBEC_EBPF_OBJECT") else {
        return;
    };
    println!("cargo::rerun-if-changed={}", object.display());
    let out = std::env::var_os("OUT_DIR").unwrap_or_default();
    match embed(&object, &Path::new(&out).join("dataplane.o")) {
        Ok(()) => println!("cargo::rustc-cfg=ebpf_object"),
        Err(error) => println!("cargo::error=could not copy {}: {error}", object.display()),
    }
}

/// Copies the object without what debuggers read, two thirds of it. The loader needs BTF alone.
fn embed(object: &OsStr, to: &Path) -> Result<(), Box<dyn Error>> {
    let whole = std::fs::read(object)?;
    let mut builder = Builder::read(&*whole)?;
    for section in &mut builder.sections {
        let name = section.name.as_slice();
        section.delete = name.starts_with(b".debug_") || name.starts_with(b".rel.debug_");
    }
    builder.delete_orphans();
    // LLVM has one table for the names of sections and symbols, this writer one for each.
    let names = builder.sections.add();
    names.name = b".shstrtab"[..].into();
    names.sh_type = elf::SHT_STRTAB;
    names.data = SectionData::SectionString;
    let mut small = Vec::new();
    builder.write(&mut small)?;
    Ok(std::fs::write(to, small)?)
}
