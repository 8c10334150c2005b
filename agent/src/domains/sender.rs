//! Sending frames to pods by their devices, past what is attached there (packet(7)).

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};

/// `PACKET_QDISC_BYPASS`.
const BYPASS: libc::c_int = 20;

/// A socket that sends and receives nothing.
pub(super) struct Sender(OwnedFd);

fn done(outcome: libc::c_int) -> std::io::Result<libc::c_int> {
    match outcome {
        -1 => Err(std::io::Error::last_os_error()),
        outcome => Ok(outcome),
    }
}

impl Sender {
    pub fn open() -> Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: the call takes numbers alone; of no protocol, the socket receives nothing.
        let socket = done(unsafe { libc::socket(libc::AF_PACKET, kind, 0) });
        let socket = socket.context("could not open a packet socket (CAP_NET_RAW)")?;
        // SAFETY: it was just opened, and nobody else has it.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        let on: libc::c_int = 1;
        // SAFETY: the option is a number, which outlives the call. Without it the frame would meet the pod's hook again.
        done(unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                BYPASS,
                std::ptr::from_ref(&on).cast(),
                size_of_val(&on) as libc::socklen_t,
            )
        })
        .context("could not have a packet socket send past all hooks")?;
        Ok(Self(socket))
    }

    /// Sends a frame by a device.
    pub fn send(&self, ifindex: u32, frame: &[u8]) -> Result<()> {
        let to = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: 0,
            sll_ifindex: i32::try_from(ifindex).context("no device has such an index")?,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // SAFETY: the frame and the address are there for the call, and as long as told.
        let sent = unsafe {
            libc::sendto(
                self.0.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                std::ptr::from_ref(&to).cast(),
                size_of_val(&to) as libc::socklen_t,
            )
        };
        ensure!(
            sent >= 0,
            "could not send by device {ifindex}: {}",
            std::io::Error::last_os_error()
        );
        Ok(())
    }
}
