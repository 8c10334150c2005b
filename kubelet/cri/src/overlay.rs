//! Overlay mounts: shared read-only layers below one writable directory.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use nix::mount::{MntFlags, MsFlags, mount as mount2, umount2};

/// Mounts `lower` (lowest layer first) with `upper` on top at `target`.
pub fn mount(lower: &[PathBuf], upper: &Path, work: &Path, target: &Path) -> anyhow::Result<()> {
    ensure!(!lower.is_empty(), "an overlay needs at least one layer");
    let mut options = OsString::from("lowerdir=");
    for (at, dir) in lower.iter().rev().enumerate() {
        if at > 0 {
            options.push(":");
        }
        options.push(escape(dir));
    }
    options.push(",upperdir=");
    options.push(escape(upper));
    options.push(",workdir=");
    options.push(escape(work));
    ensure!(
        options.len() < 4096,
        "the image has too many layers ({}) for one overlay mount; use a shorter data path or squash the image",
        lower.len()
    );
    mount2(
        Some("overlay"),
        target,
        Some("overlay"),
        MsFlags::empty(),
        Some(options.as_os_str()),
    )
    .with_context(|| {
        format!(
            "cannot mount an overlay at {} (is the data directory itself on an overlay?)",
            target.display()
        )
    })
}

/// Unmounts whatever is at `target`, if anything is.
pub fn unmount(target: &Path) -> anyhow::Result<()> {
    match umount2(target, MntFlags::MNT_DETACH) {
        Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => Ok(()),
        Err(err) => Err(err).with_context(|| format!("cannot unmount {}", target.display())),
    }
}

fn escape(path: &Path) -> OsString {
    let mut out = Vec::new();
    for byte in path.as_os_str().as_bytes() {
        if matches!(byte, b':' | b',' | b'\\') {
            out.push(b'\\');
        }
        out.push(*byte);
    }
    OsString::from_vec(out)
}
