//! Whose sockets reach Services: those of the node's network namespace, and its pods'.

use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};
use xebec_dataplane_common::service::Scope;

/// The scope of the node that this process runs on, whose pods are in this cgroup v2 folder.
pub(crate) fn of(pod_cgroup: &Path) -> Result<Scope> {
    std::fs::create_dir_all(pod_cgroup)
        .with_context(|| format!("could not make the cgroup {}", pod_cgroup.display()))?;
    // The number of a cgroup is that of its folder's inode.
    let pods = std::fs::metadata(pod_cgroup)
        .with_context(|| format!("could not look at {}", pod_cgroup.display()))?
        .ino();
    Ok(Scope {
        netns: netns_cookie()?,
        pods,
    })
}

/// Cookie of this process's network namespace (`SO_NETNS_COOKIE`, Linux 5.14).
fn netns_cookie() -> Result<u64> {
    let socket = UdpSocket::bind("127.0.0.1:0")
        .or_else(|_| UdpSocket::bind("0.0.0.0:0"))
        .context("could not open a socket")?;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the descriptor is open, and the kernel writes at most `length` bytes, which `cookie` has.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    anyhow::ensure!(
        outcome == 0,
        "could not ask for the cookie of the network namespace (it needs Linux 5.14): {}",
        std::io::Error::last_os_error()
    );
    Ok(cookie)
}
