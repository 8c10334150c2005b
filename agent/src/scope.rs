//! Whose sockets reach Services: those of the node's network namespace, and its pods'.

use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};
use xebec_dataplane_common::service::Scope;

/// No cgroup's number. Zero won't do: it is what the programs get where there is no ancestor any more.
const NO_CGROUP: u64 = u64::MAX;

/// The scope of the node that this process runs on, whose pods are in this cgroup v2 folder. Without one, sockets of
/// the node's own network namespace alone are in scope, and what pods send is translated at their devices.
pub(crate) fn of(pod_cgroup: Option<&Path>) -> Result<Scope> {
    let pods = match pod_cgroup {
        None => NO_CGROUP,
        Some(folder) => {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("could not make the cgroup {}", folder.display()))?;
            // The number of a cgroup is that of its folder's inode.
            std::fs::metadata(folder)
                .with_context(|| format!("could not look at {}", folder.display()))?
                .ino()
        }
    };
    Ok(Scope {
        netns: netns_cookie()?,
        pods,
    })
}

/// Cookie of this thread's network namespace (`SO_NETNS_COOKIE`, Linux 5.14).
pub(crate) fn netns_cookie() -> Result<u64> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_cgroup_of_pods_none_is_in_scope() {
        let scope = of(None).unwrap();
        assert_ne!(scope.pods, 0, "every process has an ancestor of number 0");
        assert_eq!(scope.netns, netns_cookie().unwrap());
        let folder = tempfile::tempdir().unwrap();
        let scope = of(Some(folder.path())).unwrap();
        assert_eq!(scope.pods, std::fs::metadata(folder.path()).unwrap().ino());
    }
}
