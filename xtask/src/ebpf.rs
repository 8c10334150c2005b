//! Building the eBPF object, in both worlds: Debian's prebuilt BPF core library, or rustup's nightly with rust-src.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::setup::apt;
use crate::shell::{Cmd, is_root, on_path, target_dir};

/// The version of bpf-linker that was tried; its feature names the LLVM of the compiler.
const BPF_LINKER: &str = "0.13.0";
/// The name under which Debian's compiler is linked into rustup.
const DEBIAN: &str = "debian";

/// bpf-linker asks LLVM to expand copies in order, and LLVM then calls a function that goes byte by byte wherever memory
/// is cleared or moved, which is felt with every packet.
const FLAGS: &str = "-Cdebuginfo=2 -Clink-arg=--btf -Clink-arg=--disable-expand-memcpy-in-order \
     --cfg=bpf_target_arch=\"x86_64\"";

/// A compiler that can build for BPF.
struct Toolchain {
    /// Its name for `rustup run`.
    name: String,
    /// Whether it must build the core library itself.
    build_std: bool,
}

/// Finds a compiler, installing Debian's where there is none, and the linker that fits it.
pub fn ensure_toolchain() -> Result<()> {
    let toolchain = match find()? {
        Some(toolchain) => toolchain,
        None => install_debian()?,
    };
    if on_path("bpf-linker") {
        return Ok(());
    }
    let llvm = llvm_major(&toolchain)?;
    let prefix = format!("/usr/lib/llvm-{llvm}");
    if !std::path::Path::new(&prefix).join("lib").exists() {
        apt(&[&format!("llvm-{llvm}-dev")]).with_context(|| {
            format!("bpf-linker needs LLVM {llvm}: install llvm-{llvm}-dev, or a prebuilt bpf-linker (`cargo binstall bpf-linker`)")
        })?;
    }
    // The workspace's static linking and its lock are not for this tool.
    Cmd::cargo([
        "install",
        "bpf-linker",
        "--version",
        BPF_LINKER,
        "--locked",
        "--no-default-features",
        "--features",
    ])
    .arg(format!("llvm-{llvm}"))
    .env("LLVM_PREFIX", &prefix)
    .dir(std::env::temp_dir())
    .run()
}

/// Builds the object and gives its path.
pub fn build() -> Result<PathBuf> {
    let Some(toolchain) = find()? else {
        bail!("no compiler for BPF is here; run `cargo xtask setup`");
    };
    let target = target_dir()?.join("ebpf");
    let mut cmd = Cmd::new("rustup")
        .args([
            "run",
            &toolchain.name,
            "cargo",
            "build",
            "--quiet",
            "--release",
            "-p",
            "xebec-dataplane-ebpf",
        ])
        .args(["--target", "bpfel-unknown-none"])
        .env("CARGO_TARGET_DIR", &target)
        // aya-ebpf uses compiler features that are not stable, and our programs one instruction of assembly; this lets
        // them, and nothing else.
        .env("RUSTC_BOOTSTRAP", "aya_ebpf,xebec_dataplane")
        .env("RUSTFLAGS", FLAGS)
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
        .env("CARGO_PROFILE_RELEASE_STRIP", "none")
        // The cargo that runs us belongs to another toolchain.
        .env_remove("CARGO")
        .env_remove("RUSTC")
        .env_remove("RUSTUP_TOOLCHAIN");
    if toolchain.build_std {
        cmd = cmd.args(["-Z", "build-std=core"]);
    }
    cmd.run()?;
    let object = target.join("bpfel-unknown-none/release/xebec-dataplane");
    anyhow::ensure!(object.exists(), "the build left no {}", object.display());
    Ok(object)
}

fn find() -> Result<Option<Toolchain>> {
    if !on_path("rustup") {
        bail!("rustup is not on the PATH: install it from rustup.rs");
    }
    let installed = Cmd::new("rustup").args(["toolchain", "list"]).output()?;
    let has = |name: &str| {
        installed
            .lines()
            .any(|line| line.split_whitespace().next() == Some(name))
    };
    let core = |name: &str, path: &str| -> bool {
        Cmd::new("rustup")
            .args(["run", name, "rustc", "--print", "sysroot"])
            .output()
            .is_ok_and(|root| std::path::Path::new(root.trim()).join(path).exists())
    };
    if has(DEBIAN) && core(DEBIAN, "lib/rustlib/bpfel-unknown-none") {
        return Ok(Some(Toolchain {
            name: DEBIAN.into(),
            build_std: false,
        }));
    }
    let nightly = installed
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .find(|name| name.starts_with("nightly"));
    match nightly {
        Some(name) if core(name, "lib/rustlib/src/rust/library/core") => Ok(Some(Toolchain {
            name: name.to_owned(),
            build_std: true,
        })),
        _ => Ok(None),
    }
}

/// Debian's compiler with its prebuilt BPF core, linked into rustup beside the others.
fn install_debian() -> Result<Toolchain> {
    let advice = "a compiler for BPF is needed: `rustup toolchain install nightly --component rust-src`, or Debian's rustc-web with libstd-rust-web-dev-bpf";
    if !on_path("apt-get") || !is_root() && !on_path("sudo") {
        bail!(advice);
    }
    apt(&["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf"]).context(advice)?;
    Cmd::new("rustup")
        .args(["toolchain", "link", DEBIAN, "/usr"])
        .run()?;
    find()?.context(advice)
}

/// The major version of a compiler's LLVM, which the linker must share.
fn llvm_major(toolchain: &Toolchain) -> Result<u32> {
    let version = Cmd::new("rustup")
        .args(["run", &toolchain.name, "rustc", "-vV"])
        .output()?;
    version
        .lines()
        .find_map(|line| {
            line.strip_prefix("LLVM version: ")?
                .split('.')
                .next()?
                .parse()
                .ok()
        })
        .context("the compiler does not say its LLVM version")
}
