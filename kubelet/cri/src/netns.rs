//! Network namespaces that live as bind mounts, without a process in them.

use std::fs::File;
use std::path::Path;

use anyhow::Context;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

/// Makes a network namespace with its loopback up, and binds it to `path`.
pub fn create(path: &Path) -> anyhow::Result<()> {
    let target = path.to_owned();
    File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    // A thread of its own: only it changes its namespace, and it ends after.
    let made = std::thread::spawn(move || -> anyhow::Result<()> {
        unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
        loopback_up()?;
        mount(
            Some("/proc/thread-self/ns/net"),
            &target,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .with_context(|| format!("cannot bind a network namespace to {}", target.display()))
    })
    .join()
    .unwrap_or_else(|_| Err(anyhow::anyhow!("the thread that makes namespaces panicked")));
    if made.is_err() {
        let _ = std::fs::remove_file(path);
    }
    made
}

/// Removes a namespace's name; the kernel removes it with its last user.
pub fn remove(path: &Path) -> anyhow::Result<()> {
    match umount2(path, MntFlags::MNT_DETACH) {
        Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
        Err(err) => {
            return Err(err).with_context(|| format!("cannot unmount {}", path.display()));
        }
    }
    match std::fs::remove_file(path) {
        Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
            Err(err).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Runs `work` on a thread inside a network namespace.
pub fn within<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let namespace = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    std::thread::spawn(move || {
        setns(&namespace, CloneFlags::CLONE_NEWNET).context("cannot enter the pod's network")?;
        work()
    })
    .join()
    .unwrap_or_else(|_| Err(anyhow::anyhow!("a thread in the pod's network panicked")))
}

fn loopback_up() -> anyhow::Result<()> {
    // SAFETY: a plain socket call; the descriptor is closed below.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error()).context("cannot open a socket");
    }
    // SAFETY: ifreq is plain data for which all zeros is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which lives through the call.
    let done = unsafe { libc::ioctl(fd, libc::SIOCSIFFLAGS as _, &request) };
    let err = std::io::Error::last_os_error();
    // SAFETY: the descriptor is ours and not used again.
    unsafe { libc::close(fd) };
    if done < 0 {
        return Err(err).context("cannot bring up the loopback interface");
    }
    Ok(())
}
