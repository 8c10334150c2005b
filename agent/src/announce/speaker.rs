//! Speaks for addresses at one device: says where they are when they come, and answers who asks.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv6Addr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::frames::{self, Mac};

/// How often an address that came is announced, and how long apart.
const TIMES: u8 = 3;
const APART: Duration = Duration::from_secs(1);
/// When a device that is down or gone is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// Speaks at a device for the addresses held, until `shutdown`. With none, nothing is open.
pub(super) async fn run(
    device: String,
    mut held: watch::Receiver<BTreeSet<IpAddr>>,
    shutdown: CancellationToken,
) {
    let mut said = None;
    loop {
        let error = tokio::select! {
            () = shutdown.cancelled() => return,
            outcome = serve(&device, &mut held) => match outcome {
                Ok(()) => return,
                Err(error) => format!("{error:#}"),
            },
        };
        if said.as_ref() != Some(&error) {
            warn!("could not announce addresses at {device}: {error}; trying again until it works");
            said = Some(error);
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

/// Ends well when nobody can tell of addresses any more, or where there is nobody to speak to.
async fn serve(device: &str, held: &mut watch::Receiver<BTreeSet<IpAddr>>) -> Result<()> {
    let mut addresses = BTreeSet::new();
    let mut bursts = BTreeMap::<IpAddr, (u8, Instant)>::new();
    let (mut arp, mut discovery) = (None, None);
    let mut groups = Groups::default();
    held.mark_changed();
    loop {
        let next = bursts.values().map(|(_, when)| *when).min();
        let timer = async {
            match next {
                Some(when) => tokio::time::sleep_until(when).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = held.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                let wanted = held.borrow_and_update().clone();
                // Silence first, then who asks is answered, then it is said unasked.
                bursts.retain(|address, _| wanted.contains(address));
                if !tap(&mut arp, device, true, &wanted)? || !tap(&mut discovery, device, false, &wanted)? {
                    info!("{device} is no Ethernet: addresses are not announced there");
                    return Ok(());
                }
                match &discovery {
                    Some(tap) => groups.set(tap, &wanted)?,
                    // The memberships went with the socket.
                    None => groups = Groups::default(),
                }
                let now = Instant::now();
                for address in wanted.difference(&addresses) {
                    bursts.insert(*address, (TIMES, now));
                }
                addresses = wanted;
            }
            () = timer => {
                let now = Instant::now();
                for (address, (left, when)) in &mut bursts {
                    if *when <= now && let Some(tap) = if address.is_ipv4() { &arp } else { &discovery } {
                        tap.send(&frames::announcement(*address, tap.mac()?))?;
                        *left -= 1;
                        *when = now + APART;
                    }
                }
                bursts.retain(|_, (left, _)| *left > 0);
            }
            outcome = answer(&arp, &addresses) => outcome?,
            outcome = answer(&discovery, &addresses) => outcome?,
        }
    }
}

/// Opens, changes or closes the socket for a family; false where the device is no Ethernet.
fn tap(slot: &mut Option<Tap>, device: &str, v4: bool, wanted: &BTreeSet<IpAddr>) -> Result<bool> {
    if !wanted.iter().any(|address| address.is_ipv4() == v4) {
        *slot = None;
        return Ok(true);
    }
    let filter = frames::filter(v4, wanted);
    if let Some(tap) = slot {
        tap.filter(&filter)?;
        return Ok(true);
    }
    *slot = Tap::open(device, v4, &filter)?;
    Ok(slot.is_some())
}

/// Answers what is asked at a socket, until there is no more for now; waits forever without one.
async fn answer(tap: &Option<Tap>, held: &BTreeSet<IpAddr>) -> Result<()> {
    let Some(tap) = tap else {
        return std::future::pending().await;
    };
    let mut guard = tap
        .socket
        .readable()
        .await
        .context("could not wait for frames")?;
    let mut frame = [0; 256];
    // Others get their turn, however many ask.
    for _ in 0..64 {
        match guard.try_io(|socket| receive(socket.get_ref(), &mut frame)) {
            Ok(Ok(length)) => {
                let asked = frame.get(..length).unwrap_or_default();
                if let Some(answer) = frames::answer(asked, tap.mac()?, held) {
                    tap.send(&answer)?;
                }
            }
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Err(error).context("could not hear frames"),
            Err(_) => break,
        }
    }
    Ok(())
}

fn receive(socket: &OwnedFd, frame: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the descriptor is open, and the kernel writes no more than the buffer's length.
    let length = unsafe {
        libc::recv(
            socket.as_raw_fd(),
            frame.as_mut_ptr().cast(),
            frame.len(),
            0,
        )
    };
    usize::try_from(length).map_err(|_| io::Error::last_os_error())
}

/// A socket for the frames of ARP or IPv6 of a device.
struct Tap {
    socket: AsyncFd<OwnedFd>,
    index: u32,
}

impl Tap {
    /// None where the device is no Ethernet.
    fn open(device: &str, v4: bool, filter: &[libc::sock_filter]) -> Result<Option<Self>> {
        let index = nix::net::if_::if_nametoindex(device)
            .with_context(|| format!("there is no device {device}"))?;
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // Of no protocol yet, so that it gets nothing before its filter is there.
        // SAFETY: the call takes no memory.
        let descriptor = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        if descriptor < 0 {
            return Err(io::Error::last_os_error())
                .context("could not open a packet socket (it needs CAP_NET_RAW)");
        }
        // SAFETY: the descriptor was just made and is nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(descriptor) };
        // SAFETY: an `OwnedFd` gives the same descriptor for as long as it lives.
        let socket = unsafe { AsyncFd::register(socket) }.context("could not wait for frames")?;
        let tap = Self { socket, index };
        tap.filter(filter)?;
        let protocol = if v4 {
            libc::ETH_P_ARP
        } else {
            libc::ETH_P_IPV6
        };
        let mut address = no_address();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (protocol as u16).to_be();
        address.sll_ifindex = index as i32;
        // SAFETY: the descriptor is open, and the address is of the length given.
        let outcome = unsafe {
            libc::bind(
                descriptor,
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        if outcome != 0 {
            return Err(io::Error::last_os_error()).context("could not listen for frames");
        }
        let ethernet = tap.address()?.sll_hatype == libc::ARPHRD_ETHER;
        Ok(ethernet.then_some(tap))
    }

    /// What wakes this process.
    fn filter(&self, steps: &[libc::sock_filter]) -> Result<()> {
        let program = libc::sock_fprog {
            len: steps.len() as u16,
            filter: steps.as_ptr().cast_mut(),
        };
        self.set(libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
            .context("could not set the filter of a packet socket")
    }

    /// Joins or leaves a group of hardware addresses.
    fn member(&self, mac: Mac, join: bool) -> Result<()> {
        let mut request = libc::packet_mreq {
            mr_ifindex: self.index as i32,
            mr_type: libc::PACKET_MR_MULTICAST as u16,
            mr_alen: 6,
            mr_address: [0; 8],
        };
        request.mr_address[..6].copy_from_slice(&mac);
        let option = if join {
            libc::PACKET_ADD_MEMBERSHIP
        } else {
            libc::PACKET_DROP_MEMBERSHIP
        };
        self.set(libc::SOL_PACKET, option, &request)
            .context("could not join a group of hardware addresses")
    }

    fn set<T>(&self, level: i32, option: i32, value: &T) -> io::Result<()> {
        // SAFETY: the descriptor is open, and the kernel reads the value's size; what a filter points to outlives the
        // call.
        let outcome = unsafe {
            libc::setsockopt(
                self.socket.get_ref().as_raw_fd(),
                level,
                option,
                (&raw const *value).cast(),
                size_of::<T>() as libc::socklen_t,
            )
        };
        if outcome == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Hardware address of the device, as it is now.
    fn mac(&self) -> Result<Mac> {
        let [a, b, c, d, e, f, ..] = self.address()?.sll_addr;
        Ok([a, b, c, d, e, f])
    }

    fn address(&self) -> Result<libc::sockaddr_ll> {
        let mut address = no_address();
        let mut length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the descriptor is open, and the kernel writes at most `length` bytes, which `address` has.
        let outcome = unsafe {
            libc::getsockname(
                self.socket.get_ref().as_raw_fd(),
                (&raw mut address).cast(),
                &raw mut length,
            )
        };
        if outcome != 0 {
            return Err(io::Error::last_os_error()).context("could not ask for a hardware address");
        }
        Ok(address)
    }

    /// A frame for which there is no room now is lost, as on any wire.
    fn send(&self, frame: &[u8]) -> Result<()> {
        // SAFETY: the descriptor is open, and the kernel reads no more than the frame's length.
        let sent = unsafe {
            libc::send(
                self.socket.get_ref().as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
            )
        };
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            _ if sent >= 0 => Ok(()),
            Some(libc::EAGAIN | libc::ENOBUFS | libc::EINTR) => Ok(()),
            _ => Err(error).context("could not send a frame"),
        }
    }
}

fn no_address() -> libc::sockaddr_ll {
    // SAFETY: the struct is plain numbers, of which zero is one.
    unsafe { std::mem::zeroed() }
}

/// The groups in which IPv6 addresses are asked for. The device lets their frames in for the packet socket; a socket
/// of IPv6 tells switches that snoop (MLD) to send them here.
#[derive(Default)]
struct Groups {
    joined: BTreeMap<Ipv6Addr, Mac>,
    listener: Option<UdpSocket>,
}

impl Groups {
    fn set(&mut self, tap: &Tap, wanted: &BTreeSet<IpAddr>) -> Result<()> {
        let wanted: BTreeMap<Ipv6Addr, Mac> = wanted
            .iter()
            .filter_map(|address| match address {
                IpAddr::V6(address) => Some(frames::group(*address)),
                IpAddr::V4(_) => None,
            })
            .collect();
        if self.listener.is_none() {
            self.listener = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).ok();
        }
        for (group, mac) in &wanted {
            if !self.joined.contains_key(group) {
                tap.member(*mac, true)?;
                let listener = self.listener.as_ref();
                let joined = listener.map(|one| one.join_multicast_v6(group, tap.index));
                if !matches!(joined, Some(Ok(()))) {
                    debug!(%group, ?joined, "switches that snoop do not learn of a group");
                }
            }
        }
        for (group, mac) in &self.joined {
            if !wanted.contains_key(group) {
                tap.member(*mac, false)?;
                let listener = self.listener.as_ref();
                // It was perhaps never joined.
                let _ = listener.map(|one| one.leave_multicast_v6(group, tap.index));
            }
        }
        self.joined = wanted;
        Ok(())
    }
}
