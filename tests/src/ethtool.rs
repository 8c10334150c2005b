//! Turning a network device's offloads on and off, as ethtool(8) does.

use std::os::fd::AsRawFd;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use nix::libc;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// What a device may do for the stack. The numbers are commands of linux/ethtool.h.
#[derive(Clone, Copy)]
pub enum Offload {
    /// Filling in checksums of what it sends (`ETHTOOL_STXCSUM`).
    TxChecksums = 0x17,
    /// Joining what it receives (`ETHTOOL_SGRO`).
    Gro = 0x2c,
}

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// Turns an offload on or off; of a device of another network namespace, if one is named.
pub fn set(netns: Option<PathBuf>, device: &str, offload: Offload, on: bool) -> Result<()> {
    let device = device.to_owned();
    // A thread of its own goes there.
    std::thread::spawn(move || {
        if let Some(path) = netns {
            let namespace = std::fs::File::open(&path)
                .with_context(|| format!("could not open {}", path.display()))?;
            setns(&namespace, CloneFlags::CLONE_NEWNET)
                .with_context(|| format!("could not enter {}", path.display()))?;
        }
        set_here(&device, offload, on)
    })
    .join()
    .map_err(|_| anyhow::anyhow!("the thread in the namespace panicked"))?
}

fn set_here(device: &str, offload: Offload, on: bool) -> Result<()> {
    let any = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .context("could not open a socket")?;
    let mut value = Value {
        command: offload as u32,
        data: u32::from(on),
    };
    let mut name = [0; libc::IFNAMSIZ];
    ensure!(device.len() < name.len(), "{device} is no device's name");
    for (place, byte) in name.iter_mut().zip(device.bytes()) {
        *place = byte as libc::c_char;
    }
    let mut request = libc::ifreq {
        ifr_name: name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_data: (&raw mut value).cast(),
        },
    };
    // SAFETY: the request is what SIOCETHTOOL takes, and it and the value outlive the call.
    let outcome = unsafe { libc::ioctl(any.as_raw_fd(), libc::SIOCETHTOOL as _, &mut request) };
    nix::errno::Errno::result(outcome)
        .map(drop)
        .with_context(|| format!("could not change what {device} does for the stack"))
}
