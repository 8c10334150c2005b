//! Before anything is started: what `up` needs from the machine, each lack with what to do about it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::paths::Layout;

/// Held while a cluster runs in these folders; the kernel lets go of it however the process ends.
pub struct Running(
    #[expect(dead_code, reason = "the open file is the lock")] nix::fcntl::Flock<std::fs::File>,
);

/// What was found out about the machine.
pub struct Machine {
    /// This machine's host name in lower case, as node names are.
    pub hostname: String,
    /// The addresses that other machines reach it by, at most one of a family.
    pub addresses: Vec<IpAddr>,
    /// Where cgroup v2 is mounted (alone, or beside v1).
    pub cgroup2: PathBuf,
}

impl Machine {
    /// The address of this family.
    pub fn address(&self, v4: bool) -> Option<IpAddr> {
        self.addresses
            .iter()
            .copied()
            .find(|one| one.is_ipv4() == v4)
    }

    /// The address of this family, or else of the other.
    pub fn primary(&self, v4: bool) -> IpAddr {
        let other = || self.address(!v4);
        self.address(v4)
            .or_else(other)
            .unwrap_or(IpAddr::from([127, 0, 0, 1]))
    }
}

/// Takes the lock of these folders, or says who holds it.
pub fn lock(layout: &Layout) -> Result<Running> {
    crate::paths::private_dir(&layout.run)?;
    let path = layout.run.join("lock");
    let file = std::fs::File::create(&path)
        .with_context(|| format!("could not make {}", path.display()))?;
    match nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Running(lock)),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
            bail!(
                "a cluster or an agent runs here already (see `xebec status`; `xebec down` stops a cluster)"
            )
        }
        Err((_, error)) => Err(error).with_context(|| format!("could not lock {}", path.display())),
    }
}

/// Checks rights, kernel and ports.
pub fn check(node_ips: &[IpAddr], listen: &[SocketAddr]) -> Result<Machine> {
    root()?;
    let cgroup2 = cgroup2()?;
    let addresses = if node_ips.is_empty() {
        own_addresses()
    } else {
        node_ips.to_vec()
    };
    for address in &addresses {
        check_own(*address)?;
    }
    let of = |v4: bool| {
        addresses
            .iter()
            .filter(move |one| one.is_ipv4() == v4)
            .count()
    };
    if of(true) > 1 || of(false) > 1 {
        bail!("--node-ip has several addresses of one family; choose one");
    }
    for address in listen {
        if let Err(error) = TcpListener::bind(address) {
            bail!(
                "could not listen on {address}: {error} (is another cluster running? choose a port with --api-port)"
            );
        }
    }
    let hostname = nix::unistd::gethostname().context("could not read the host name")?;
    Ok(Machine {
        hostname: hostname.to_string_lossy().to_lowercase(),
        addresses,
        cgroup2,
    })
}

/// Says what to do where we are not root.
pub fn root() -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    bail!("this needs root (namespaces, mounts and eBPF): run it with sudo")
}

/// The mount point of the cgroup v2 hierarchy.
fn cgroup2() -> Result<PathBuf> {
    let mounts =
        std::fs::read_to_string("/proc/self/mounts").context("could not read /proc/self/mounts")?;
    mounts
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (_, point, kind) = (words.next()?, words.next()?, words.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(point))
        })
        .next()
        .context("cgroup v2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")
}

/// The source addresses towards the default routes. Without one of IPv4 it is the loopback's, and without any those
/// of both.
fn own_addresses() -> Vec<IpAddr> {
    let probe = |any: &str, outside: &str| -> std::io::Result<IpAddr> {
        let socket = UdpSocket::bind(any)?;
        // Nothing is sent: connecting a datagram socket only looks up the route.
        socket.connect(outside)?;
        Ok(socket.local_addr()?.ip())
    };
    let v4 = probe("0.0.0.0:0", "198.51.100.1:9").ok();
    let v6 = probe("[::]:0", "[2001:db8::1]:9").ok();
    let alone = v4.is_none() && v6.is_none();
    let loopback6 = alone.then_some(IpAddr::V6(Ipv6Addr::LOCALHOST));
    let v4 = v4.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    std::iter::once(v4).chain(v6.or(loopback6)).collect()
}

/// The address must be one of this machine's.
fn check_own(address: IpAddr) -> Result<()> {
    for found in nix::ifaddrs::getifaddrs().context("could not list network devices")? {
        let Some(storage) = found.address else {
            continue;
        };
        let ip = match (storage.as_sockaddr_in(), storage.as_sockaddr_in6()) {
            (Some(v4), _) => IpAddr::from(v4.ip()),
            (_, Some(v6)) => IpAddr::from(v6.ip()),
            _ => continue,
        };
        if ip == address {
            return Ok(());
        }
    }
    bail!(
        "no network device has the address {address}; choose one of this machine's with --node-ip"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_cluster_in_the_same_folders_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout {
            data: dir.path().join("data"),
            run: dir.path().join("run"),
        };
        let held = lock(&layout).unwrap();
        let error = lock(&layout).err().unwrap().to_string();
        assert!(error.contains("xebec down"), "{error}");
        drop(held);
        lock(&layout).unwrap();
    }

    #[test]
    fn a_foreign_address_is_refused() {
        check_own([127, 0, 0, 1].into()).unwrap();
        let error = check_own([198, 51, 100, 77].into())
            .unwrap_err()
            .to_string();
        assert!(error.contains("--node-ip"), "{error}");
    }
}
