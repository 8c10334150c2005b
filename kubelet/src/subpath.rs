//! A part of a volume (`subPath`), which neither `..` nor a link may lead out of it.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, MsFlags};
use nix::sys::stat::{Mode, fchmod, fstat, mkdirat};

/// Parts of volumes that are bound for a runtime to take them up; let go of when dropped.
///
/// Once a container runs it has mounts of its own, so that nothing stays behind on the node.
#[derive(Debug, Default)]
pub(crate) struct Bound(Vec<PathBuf>);

impl Bound {
    /// Binds `sub` of `volume` to `target`, which is made as a file or a folder. Nothing that is done
    /// in the volume meanwhile can lead elsewhere, since the bind is made by descriptor.
    pub(crate) fn bind(&mut self, volume: &Path, sub: &str, target: &Path) -> Result<()> {
        let fd = open(volume, sub)?;
        let stat = fstat(&fd).context("could not look at it")?;
        release(target);
        let parent = target.parent().unwrap_or(target);
        std::fs::create_dir_all(parent)
            .with_context(|| format!("could not make {}", parent.display()))?;
        if stat.st_mode & nix::libc::S_IFMT == nix::libc::S_IFDIR {
            std::fs::create_dir_all(target)
        } else {
            std::fs::File::create(target).map(drop)
        }
        .with_context(|| format!("could not make {}", target.display()))?;
        nix::mount::mount(
            Some(format!("/proc/self/fd/{}", fd.as_raw_fd()).as_str()),
            target,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .with_context(|| format!("could not bind it to {}", target.display()))?;
        self.0.push(target.to_path_buf());
        Ok(())
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        self.0.iter().for_each(|target| release(target));
    }
}

/// Unmounts a target and removes the empty file or folder below.
fn release(target: &Path) {
    while nix::mount::umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_ok() {}
    // Never more than what is empty: if the unmount failed, the volume's content lies there.
    if std::fs::remove_dir(target).is_err()
        && std::fs::symlink_metadata(target).is_ok_and(|m| m.is_file() && m.len() == 0)
    {
        let _ = std::fs::remove_file(target);
    }
}

/// Opens `sub` beneath `volume`; folders that are not there are made with the volume's own mode.
fn open(volume: &Path, sub: &str) -> Result<OwnedFd> {
    let path = Path::new(sub);
    if path.is_absolute() {
        bail!("error SubPath `{sub}` must not be an absolute path");
    }
    if path.components().any(|part| part == Component::ParentDir) {
        bail!("unable to provision SubPath `{sub}`: must not contain '..'");
    }
    let root = nix::fcntl::open(volume, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
        .with_context(|| format!("could not open {}", volume.display()))?;
    match beneath(&root, path, OFlag::O_PATH) {
        Err(Errno::ENOENT) => {}
        found => return found.map_err(|errno| refused(sub, errno)),
    }
    let mode = std::fs::metadata(volume)
        .with_context(|| format!("could not look at {}", volume.display()))?
        .permissions()
        .mode()
        & 0o7777;
    let mut reached = PathBuf::new();
    let mut parent = root.try_clone().context("could not open the volume")?;
    for part in path.components() {
        let Component::Normal(name) = part else {
            continue;
        };
        reached.push(name);
        let next = match beneath(&root, &reached, OFlag::O_PATH) {
            Err(Errno::ENOENT) => {
                match mkdirat(&parent, name, Mode::from_bits_truncate(mode)) {
                    Ok(()) => {
                        // The umask does not count here, as the volume's own mode was not masked either.
                        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
                        beneath(&parent, Path::new(name), flags)
                            .and_then(|fd| fchmod(&fd, Mode::from_bits_truncate(mode)))
                            .map_err(|errno| refused(sub, errno))?;
                    }
                    Err(Errno::EEXIST) => {}
                    Err(errno) => return Err(refused(sub, errno)),
                }
                beneath(&root, &reached, OFlag::O_PATH)
            }
            found => found,
        };
        parent = next.map_err(|errno| refused(sub, errno))?;
    }
    Ok(parent)
}

fn beneath(root: &OwnedFd, path: &Path, flags: OFlag) -> Result<OwnedFd, Errno> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    // The kernel gives up when something is renamed at the same time; a volume that never rests is refused.
    for _ in 0..100 {
        match openat2(root, path, how) {
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            other => return other,
        }
    }
    Err(Errno::EAGAIN)
}

fn refused(sub: &str, errno: Errno) -> anyhow::Error {
    match errno {
        Errno::EXDEV | Errno::ELOOP => anyhow::anyhow!("subpath {sub:?} not within volume path"),
        errno => anyhow::anyhow!("subpath {sub:?}: {}", errno.desc()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn volume() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("volume");
        std::fs::create_dir(&volume).unwrap();
        std::fs::write(dir.path().join("secret"), "s").unwrap();
        (dir, volume)
    }

    fn shown(fd: &OwnedFd) -> PathBuf {
        std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap()
    }

    #[test]
    fn nothing_leads_out_of_the_volume() {
        let (dir, volume) = volume();
        symlink("../secret", volume.join("up")).unwrap();
        symlink(dir.path(), volume.join("absolute")).unwrap();
        symlink("/etc", volume.join("etc")).unwrap();
        symlink("/proc/self/root", volume.join("magic")).unwrap();
        symlink("../new", volume.join("dangling")).unwrap();
        for sub in [
            "up",
            "absolute/secret",
            "etc/passwd",
            "magic/etc",
            "dangling",
            "dangling/a",
            "../secret",
            "a/../../secret",
            "/etc",
        ] {
            let error = open(&volume, sub).map(|fd| shown(&fd)).unwrap_err();
            assert!(!error.to_string().is_empty(), "{sub}");
        }
        assert!(!dir.path().join("new").exists() && !volume.join("a").exists());
        let error = open(&volume, "up").unwrap_err().to_string();
        assert_eq!(error, "subpath \"up\" not within volume path");
    }

    #[test]
    fn links_within_are_followed_and_folders_made() {
        let (_dir, volume) = volume();
        std::fs::create_dir(volume.join("..1")).unwrap();
        std::fs::write(volume.join("..1/key"), "v").unwrap();
        symlink("..1", volume.join("..data")).unwrap();
        symlink("..data/key", volume.join("key")).unwrap();
        assert_eq!(
            shown(&open(&volume, "key").unwrap()),
            volume.join("..1/key")
        );
        std::fs::set_permissions(&volume, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(shown(&open(&volume, "a/b/").unwrap()), volume.join("a/b"));
        let mode = std::fs::metadata(volume.join("a/b"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o7777, 0o777);
    }

    mod root {
        use super::*;

        #[test]
        fn a_bound_part_stays_what_it_was_and_is_let_go() {
            if !nix::unistd::geteuid().is_root() {
                return eprintln!("skipped: only root may mount");
            }
            let (dir, volume) = volume();
            std::fs::create_dir(volume.join("a")).unwrap();
            std::fs::write(volume.join("a/file"), "mine").unwrap();
            let target = dir.path().join("binds/web/0");
            let mut bound = Bound::default();
            bound.bind(&volume, "a", &target).unwrap();
            // Swapped afterwards for a link that leads out.
            std::fs::rename(volume.join("a"), volume.join("b")).unwrap();
            symlink(dir.path(), volume.join("a")).unwrap();
            assert_eq!(
                std::fs::read_to_string(target.join("file")).unwrap(),
                "mine"
            );
            let file = dir.path().join("binds/web/1");
            bound.bind(&volume, "b/file", &file).unwrap();
            assert_eq!(std::fs::read_to_string(&file).unwrap(), "mine");
            drop(bound);
            assert!(!target.exists() && !file.exists());
            assert!(volume.join("b/file").exists());
        }
    }
}
