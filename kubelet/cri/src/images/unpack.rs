//! Unpacks layer archives: whiteouts, opaque directories, links, ownership and
//! extended attributes, without ever leaving the target directory.
//!
//! A layer is applied to a view of the layers below it. In the store that view
//! is an overlay mount, and the kernel writes its own form of whiteouts into
//! the new layer's directory; in tests it is a plain directory.

use std::collections::HashSet;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, bail, ensure};
use sha2::{Digest, Sha256};
use tar::EntryType;

use super::store::ImageStore;

/// Bytes at the start of a gzip and of a zstd stream.
const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Makes sure that the top layer of `chain` is unpacked, from `archive` (plain,
/// gzip or zstd). `diff_id` is the digest of the plain archive. All layers below
/// must be there. The caller holds the store's shared lock.
pub fn ensure_layer(
    store: &ImageStore,
    chain: &[String],
    diff_id: &str,
    archive: &Path,
) -> anyhow::Result<()> {
    let (Some(top), below) = (chain.last(), &chain[..chain.len().saturating_sub(1)]) else {
        bail!("a layer without a chain id");
    };
    if store.layer_dir(top).is_dir() {
        return Ok(());
    }
    let scratch = store.scratch()?;
    let fs = scratch.path().join("fs");
    std::fs::create_dir(&fs)?;
    let file = File::open(archive).with_context(|| format!("cannot open {}", archive.display()))?;
    if below.is_empty() {
        apply_checked(file, diff_id, &fs)?;
    } else {
        let work = scratch.path().join("work");
        let merged = scratch.path().join("merged");
        std::fs::create_dir(&work)?;
        std::fs::create_dir(&merged)?;
        let lower: Vec<PathBuf> = below.iter().map(|c| store.layer_dir(c)).collect();
        crate::overlay::mount(&lower, &fs, &work, &merged)?;
        let applied = apply_checked(file, diff_id, &merged);
        nix::mount::umount2(&merged, nix::mount::MntFlags::MNT_DETACH)
            .with_context(|| format!("cannot unmount {}", merged.display()))?;
        applied?;
        std::fs::remove_dir_all(&work)?;
        std::fs::remove_dir(&merged)?;
    }
    let target = store.root().join("snapshots").join(top);
    // The content must be on disk before the name that says it is whole.
    let dir = File::open(&fs)?;
    // SAFETY: plain syncfs on an open descriptor.
    if unsafe { libc::syncfs(dir.as_raw_fd()) } < 0 {
        return Err(io::Error::last_os_error()).context("cannot sync the layer to disk");
    }
    match std::fs::rename(scratch.path(), &target) {
        Ok(()) => Ok(()),
        // Somebody else has unpacked the same layer in the meantime.
        Err(_) if store.layer_dir(top).is_dir() => Ok(()),
        Err(err) => Err(err).with_context(|| format!("cannot make {}", target.display())),
    }
}

fn apply_checked(file: File, diff_id: &str, target: &Path) -> anyhow::Result<()> {
    let mut hashing = Hashing {
        inner: decompress(file)?,
        hash: Sha256::new(),
    };
    apply(&mut hashing, target)?;
    // What follows the archive's end is part of its digest.
    io::copy(&mut hashing, &mut io::sink()).context("cannot read the end of the layer")?;
    let found = format!("sha256:{}", hex::encode(hashing.hash.finalize()));
    ensure!(
        found == diff_id,
        "layer is corrupt: expected uncompressed digest {diff_id}, found {found}"
    );
    Ok(())
}

struct Hashing<R> {
    inner: R,
    hash: Sha256,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hash.update(&buffer[..n]);
        Ok(n)
    }
}

/// Reads a stream as plain, gzip or zstd, by its first bytes.
pub fn decompress<R: Read + 'static>(mut from: R) -> anyhow::Result<Box<dyn Read>> {
    let mut start = Vec::with_capacity(4);
    (&mut from)
        .take(4)
        .read_to_end(&mut start)
        .context("cannot read the layer")?;
    let whole = io::BufReader::with_capacity(64 * 1024, io::Cursor::new(start.clone()).chain(from));
    Ok(if start.starts_with(&GZIP) {
        Box::new(flate2::bufread::MultiGzDecoder::new(whole))
    } else if start == ZSTD {
        Box::new(
            ruzstd::decoding::StreamingDecoder::new(whole)
                .map_err(|err| anyhow::anyhow!("cannot read the zstd layer: {err}"))?,
        )
    } else {
        Box::new(whole)
    })
}

/// Applies one layer archive to the directory `target`.
pub fn apply(archive: impl Read, target: &Path) -> anyhow::Result<()> {
    let root = Root::open(target)?;
    let mut archive = tar::Archive::new(archive);
    let mut seen: HashSet<PathBuf> = HashSet::new();
    // Directories get their times last: every entry made in them changes these.
    let mut dir_times = Vec::new();
    for entry in archive
        .entries()
        .context("the layer is not a tar archive")?
    {
        let mut entry = entry.context("the layer's archive is damaged")?;
        let raw = entry.path_bytes().into_owned();
        let path = clean(Path::new(OsStr::from_bytes(&raw)))
            .with_context(|| format!("refusing layer entry {:?}", String::from_utf8_lossy(&raw)))?;
        one_entry(&root, &mut entry, &path, &mut seen, &mut dir_times)
            .with_context(|| format!("cannot unpack {}", path.display()))?;
    }
    for (path, mtime) in dir_times.into_iter().rev() {
        if let Some((dir, name)) = root.parent_of(&path, false)? {
            set_times(&dir, &name, mtime)?;
        }
    }
    Ok(())
}

fn one_entry<R: Read>(
    root: &Root,
    entry: &mut tar::Entry<'_, R>,
    path: &Path,
    seen: &mut HashSet<PathBuf>,
    dir_times: &mut Vec<(PathBuf, i64)>,
) -> anyhow::Result<()> {
    let kind = entry.header().entry_type();
    if matches!(kind, EntryType::XGlobalHeader) {
        return Ok(());
    }
    if path.as_os_str().is_empty() {
        // The root directory's own entry: its mode and owner.
        let header = entry.header();
        let at = c".";
        root.chown(&root.dir, at, header.uid()?, header.gid()?)?;
        return chmod(&root.dir, at, header.mode()?);
    }
    let name = path.file_name().context("an entry without a name")?;
    if let Some(hidden) = name.as_bytes().strip_prefix(b".wh.") {
        let parent = path.parent().unwrap_or(Path::new(""));
        if hidden == b".wh..opq" {
            return root.clear(parent, seen);
        }
        if hidden.starts_with(b".wh.") {
            // AUFS metadata: means nothing to a container.
            return Ok(());
        }
        ensure!(!hidden.is_empty(), "a whiteout without a name");
        return root.remove(&parent.join(OsStr::from_bytes(hidden)));
    }
    let (dir, name) = root
        .parent_of(path, true)?
        .context("the parent directory can't be made")?;
    let header = entry.header().clone();
    let (uid, gid) = (
        pax_number(entry, "uid", header.uid()?)?,
        pax_number(entry, "gid", header.gid()?)?,
    );
    let mode = header.mode()?;
    let mtime = header.mtime().unwrap_or(0) as i64;
    let exists = lstat(&dir, &name)?;
    let is_dir = exists.is_some_and(|m| m & libc::S_IFMT == libc::S_IFDIR);
    if exists.is_some() && !(is_dir && kind == EntryType::Directory) {
        root.remove(path)?;
    }
    match kind {
        EntryType::Directory => {
            if !is_dir {
                // SAFETY: dir is open and name NUL-terminated.
                check(unsafe { libc::mkdirat(dir.as_raw_fd(), name.as_ptr(), 0o700) })?;
            }
            dir_times.push((path.to_owned(), mtime));
        }
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            let mut file = File::from(openat(
                &dir,
                &name,
                libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW,
                0o600,
            )?);
            io::copy(entry, &mut file).context("cannot write its content")?;
            file.flush()?;
        }
        EntryType::Symlink => {
            let to = entry.link_name_bytes().context("a link without a target")?;
            let to = CString::new(to.into_owned())?;
            // SAFETY: dir is open and both strings NUL-terminated.
            check(unsafe { libc::symlinkat(to.as_ptr(), dir.as_raw_fd(), name.as_ptr()) })?;
        }
        EntryType::Link => {
            let to = entry.link_name_bytes().context("a link without a target")?;
            let to = clean(Path::new(OsStr::from_bytes(&to)))
                .context("refusing a hard link that leaves the layer")?;
            let (to_dir, to_name) = root
                .parent_of(&to, false)?
                .with_context(|| format!("the link's target {} is not there", to.display()))?;
            // SAFETY: both directories are open and both names NUL-terminated.
            check(unsafe {
                libc::linkat(
                    to_dir.as_raw_fd(),
                    to_name.as_ptr(),
                    dir.as_raw_fd(),
                    name.as_ptr(),
                    0,
                )
            })
            .with_context(|| format!("cannot link to {}", to.display()))?;
            seen.insert(path.to_owned());
            // The attributes are those of the file that it names.
            return Ok(());
        }
        EntryType::Char | EntryType::Block | EntryType::Fifo => {
            let format = match kind {
                EntryType::Char => libc::S_IFCHR,
                EntryType::Block => libc::S_IFBLK,
                _ => libc::S_IFIFO,
            };
            let device = libc::makedev(
                header.device_major()?.unwrap_or(0),
                header.device_minor()?.unwrap_or(0),
            );
            // SAFETY: dir is open and name NUL-terminated.
            check(unsafe {
                libc::mknodat(dir.as_raw_fd(), name.as_ptr(), format | 0o600, device)
            })?;
        }
        other => bail!("entries of type {other:?} are not known"),
    }
    root.chown(&dir, &name, uid, gid)?;
    if kind != EntryType::Symlink {
        chmod(&dir, &name, mode)?;
    }
    set_xattrs(entry, &dir, &name)?;
    if kind != EntryType::Directory {
        set_times(&dir, &name, mtime)?;
    }
    seen.insert(path.to_owned());
    Ok(())
}

/// A number that a PAX record may give instead of the header.
fn pax_number<R: Read>(
    entry: &mut tar::Entry<'_, R>,
    key: &str,
    plain: u64,
) -> anyhow::Result<u64> {
    if let Some(records) = entry.pax_extensions()? {
        for record in records {
            let record = record?;
            if record.key_bytes() == key.as_bytes() {
                return Ok(record.value()?.parse()?);
            }
        }
    }
    Ok(plain)
}

fn set_xattrs<R: Read>(
    entry: &mut tar::Entry<'_, R>,
    dir: &OwnedFd,
    name: &CString,
) -> anyhow::Result<()> {
    let Some(records) = entry.pax_extensions()? else {
        return Ok(());
    };
    let at = CString::new(
        [
            format!("/proc/self/fd/{}/", dir.as_raw_fd()).as_bytes(),
            name.as_bytes(),
        ]
        .concat(),
    )?;
    for record in records {
        let record = record?;
        let Some(key) = record.key_bytes().strip_prefix(b"SCHILY.xattr.") else {
            continue;
        };
        // A layer must not forge the marks by which overlayfs works.
        if key.starts_with(b"trusted.overlay.") || key.starts_with(b"user.overlay.") {
            continue;
        }
        let key = CString::new(key)?;
        let value = record.value_bytes();
        // SAFETY: all pointers are valid for their lengths; the link itself is
        // written to, not what it names.
        let done = unsafe {
            libc::lsetxattr(
                at.as_ptr(),
                key.as_ptr(),
                value.as_ptr().cast(),
                value.len(),
                0,
            )
        };
        if done < 0 {
            let err = io::Error::last_os_error();
            // File systems without a kind of attribute are common; the file's
            // own content is what matters then.
            if !matches!(
                err.raw_os_error(),
                Some(libc::ENOTSUP | libc::EPERM | libc::EINVAL)
            ) {
                return Err(err).with_context(|| format!("cannot set attribute {key:?}"));
            }
        }
    }
    Ok(())
}

/// Removes leading slashes and `.`; refuses `..`.
fn clean(path: &Path) -> anyhow::Result<PathBuf> {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => out.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                bail!("its path leaves the layer")
            }
        }
    }
    Ok(out)
}

/// The directory that everything stays in.
struct Root {
    dir: OwnedFd,
    privileged: bool,
}

impl Root {
    fn open(path: &Path) -> anyhow::Result<Self> {
        let dir = File::options()
            .read(true)
            .custom_flags(libc::O_DIRECTORY)
            .open(path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Self {
            dir: dir.into(),
            privileged: nix::unistd::geteuid().is_root(),
        })
    }

    /// Opens a directory below the root; links are followed as if the root
    /// were `/`. `None` if it is not there.
    fn open_dir(&self, path: &Path) -> anyhow::Result<Option<OwnedFd>> {
        if path.as_os_str().is_empty() {
            return Ok(Some(self.dir.try_clone()?));
        }
        let path = CString::new(path.as_os_str().as_bytes())?;
        // SAFETY: open_how is plain data for which all zeros is valid.
        let mut how: libc::open_how = unsafe { std::mem::zeroed() };
        how.flags = (libc::O_DIRECTORY | libc::O_PATH | libc::O_CLOEXEC) as u64;
        how.resolve = libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS;
        // SAFETY: the arguments are valid for the call.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_openat2,
                self.dir.as_raw_fd(),
                path.as_ptr(),
                &how,
                size_of::<libc::open_how>(),
            )
        };
        if fd >= 0 {
            // SAFETY: the kernel has just made this descriptor for us.
            return Ok(Some(unsafe { OwnedFd::from_raw_fd(fd as i32) }));
        }
        let err = io::Error::last_os_error();
        match err.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => Ok(None),
            _ => Err(err.into()),
        }
    }

    /// The open parent directory of a path and the last name in it.
    fn parent_of(&self, path: &Path, make: bool) -> anyhow::Result<Option<(OwnedFd, CString)>> {
        let name = CString::new(path.file_name().context("no file name")?.as_bytes())?;
        let parent = path.parent().unwrap_or(Path::new(""));
        if make {
            self.make_dirs(parent)?;
        }
        Ok(self.open_dir(parent)?.map(|dir| (dir, name)))
    }

    fn make_dirs(&self, path: &Path) -> anyhow::Result<()> {
        if path.as_os_str().is_empty() || self.open_dir(path)?.is_some() {
            return Ok(());
        }
        let (dir, name) = self
            .parent_of(path, true)?
            .context("a parent directory can't be made")?;
        if let Some(mode) = lstat(&dir, &name)?
            && mode & libc::S_IFMT != libc::S_IFDIR
        {
            // A file, or a link that leads nowhere, is in the way.
            self.remove(path)?;
        }
        // SAFETY: dir is open and name NUL-terminated.
        check(unsafe { libc::mkdirat(dir.as_raw_fd(), name.as_ptr(), 0o755) })?;
        Ok(())
    }

    /// Removes a file or a whole tree; links are not followed.
    fn remove(&self, path: &Path) -> anyhow::Result<()> {
        if let Some((dir, name)) = self.parent_of(path, false)? {
            remove_at(&dir, &name)?;
        }
        Ok(())
    }

    /// Removes what a directory holds from lower layers.
    fn clear(&self, path: &Path, seen: &HashSet<PathBuf>) -> anyhow::Result<()> {
        let Some(dir) = self.open_dir(path)? else {
            return Ok(());
        };
        for name in names(&dir)? {
            let child = path.join(OsStr::from_bytes(name.as_bytes()));
            if seen.contains(&child) {
                self.clear_unseen(&child, seen)?;
            } else {
                remove_at(&dir, &name)?;
            }
        }
        Ok(())
    }

    fn clear_unseen(&self, path: &Path, seen: &HashSet<PathBuf>) -> anyhow::Result<()> {
        let Some((parent, name)) = self.parent_of(path, false)? else {
            return Ok(());
        };
        match lstat(&parent, &name)? {
            Some(mode) if mode & libc::S_IFMT == libc::S_IFDIR => self.clear(path, seen),
            _ => Ok(()),
        }
    }

    fn chown(
        &self,
        dir: &OwnedFd,
        name: &std::ffi::CStr,
        uid: u64,
        gid: u64,
    ) -> anyhow::Result<()> {
        if !self.privileged {
            return Ok(());
        }
        let (uid, gid) = (u32::try_from(uid)?, u32::try_from(gid)?);
        // SAFETY: dir is open and name NUL-terminated.
        check(unsafe {
            libc::fchownat(
                dir.as_raw_fd(),
                name.as_ptr(),
                uid,
                gid,
                libc::AT_SYMLINK_NOFOLLOW,
            )
        })?;
        Ok(())
    }
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn openat(dir: &OwnedFd, name: &CString, flags: i32, mode: u32) -> io::Result<OwnedFd> {
    // SAFETY: dir is open and name NUL-terminated; the kernel makes a new
    // descriptor, which is ours.
    unsafe {
        let fd = check(libc::openat(
            dir.as_raw_fd(),
            name.as_ptr(),
            flags | libc::O_CLOEXEC,
            mode,
        ))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

fn lstat(dir: &OwnedFd, name: &CString) -> io::Result<Option<u32>> {
    // SAFETY: stat is plain data for which all zeros is valid.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: dir is open, name NUL-terminated, stat writable.
    let done = unsafe {
        libc::fstatat(
            dir.as_raw_fd(),
            name.as_ptr(),
            &mut stat,
            libc::AT_SYMLINK_NOFOLLOW,
        )
    };
    match check(done) {
        Ok(_) => Ok(Some(stat.st_mode)),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(err) => Err(err),
    }
}

fn chmod(dir: &OwnedFd, name: &std::ffi::CStr, mode: u32) -> anyhow::Result<()> {
    // SAFETY: dir is open and name NUL-terminated. What it names was made by us
    // and is no link.
    check(unsafe { libc::fchmodat(dir.as_raw_fd(), name.as_ptr(), mode & 0o7777, 0) })?;
    Ok(())
}

fn set_times(dir: &OwnedFd, name: &CString, mtime: i64) -> anyhow::Result<()> {
    let time = libc::timespec {
        tv_sec: mtime,
        tv_nsec: 0,
    };
    let times = [time, time];
    // SAFETY: dir is open, name NUL-terminated, two times given.
    let done = unsafe {
        libc::utimensat(
            dir.as_raw_fd(),
            name.as_ptr(),
            times.as_ptr(),
            libc::AT_SYMLINK_NOFOLLOW,
        )
    };
    match check(done) {
        // A later entry may have removed the directory.
        Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err.into()),
        _ => Ok(()),
    }
}

/// The names in a directory.
fn names(dir: &OwnedFd) -> anyhow::Result<Vec<CString>> {
    std::fs::read_dir(format!("/proc/self/fd/{}", dir.as_raw_fd()))?
        .map(|entry| Ok(CString::new(entry?.file_name().as_bytes())?))
        .collect()
}

fn remove_at(dir: &OwnedFd, name: &CString) -> anyhow::Result<()> {
    let Some(mode) = lstat(dir, name)? else {
        return Ok(());
    };
    let mut flags = 0;
    if mode & libc::S_IFMT == libc::S_IFDIR {
        let inner = openat(
            dir,
            name,
            libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW,
            0,
        )?;
        for child in names(&inner)? {
            remove_at(&inner, &child)?;
        }
        flags = libc::AT_REMOVEDIR;
    }
    // SAFETY: dir is open and name NUL-terminated.
    check(unsafe { libc::unlinkat(dir.as_raw_fd(), name.as_ptr(), flags) })?;
    Ok(())
}

#[cfg(test)]
mod tests;
