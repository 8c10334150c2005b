//! The kernel's sockets, listed and ended by `NETLINK_SOCK_DIAG`.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, bail};
use bytemuck::{Pod, Zeroable};

use super::Backend;

/// `SOCK_DIAG_BY_FAMILY`.
const BY_FAMILY: u16 = 20;
/// `SOCK_DESTROY`.
const DESTROY: u16 = 21;
/// `INET_DIAG_REQ_BYTECODE`.
const BYTECODE: u16 = 1;
/// `INET_DIAG_BC_JMP`.
const JUMP: u8 = 1;
/// `INET_DIAG_BC_D_COND`.
const DESTINATION: u8 = 8;
/// No more backends are looked for by the kernel itself, which tries them one by one.
const FILTERED: usize = 32;
/// `TCP_CLOSE`, `TCP_TIME_WAIT`, `TCP_LISTEN` and `TCP_NEW_SYN_RECV`: nobody waits for an answer in these states.
const IDLE: u32 = 1 << 7 | 1 << 6 | 1 << 10 | 1 << 12;
/// `TCP_LISTEN`.
const LISTEN: u32 = 1 << 10;
/// So many are ended by one message: their answers fit the socket's buffer.
const BATCH: usize = 64;

/// `struct inet_diag_sockid`: what names a socket, in network byte order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
struct Id {
    source_port: [u8; 2],
    destination_port: [u8; 2],
    source: [u8; 16],
    destination: [u8; 16],
    device: u32,
    cookie: [u32; 2],
}

/// `struct inet_diag_req_v2`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Request {
    family: u8,
    protocol: u8,
    extensions: u8,
    pad: u8,
    states: u32,
    id: Id,
}

/// `struct inet_diag_msg`, as far as it matters here.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Told {
    family: u8,
    state: u8,
    timer: u8,
    retransmits: u8,
    id: Id,
    rest: [u32; 5],
}

/// `struct nlmsghdr`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Header {
    length: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
}

/// A connected socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Socket {
    family: u8,
    protocol: u8,
    id: Id,
}

impl Socket {
    /// The kernel's number of it, as programs see it (`bpf_get_socket_cookie`).
    pub(super) fn cookie(&self) -> u64 {
        u64::from(self.id.cookie[0]) | u64::from(self.id.cookie[1]) << 32
    }

    /// Whom it is connected to; IPv4 in IPv6 form is IPv4.
    pub(super) fn peer(&self) -> Backend {
        Backend {
            protocol: self.protocol,
            address: self.address(self.id.destination),
            port: u16::from_be_bytes(self.id.destination_port),
        }
    }

    /// Its own address and port, in the same form.
    pub(super) fn local(&self) -> SocketAddr {
        let address = self.address(self.id.source);
        SocketAddr::new(address, u16::from_be_bytes(self.id.source_port))
    }

    fn address(&self, bytes: [u8; 16]) -> IpAddr {
        if i32::from(self.family) == libc::AF_INET {
            let [a, b, c, d, ..] = bytes;
            IpAddr::V4(Ipv4Addr::new(a, b, c, d))
        } else {
            IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical()
        }
    }
}

/// What became of a socket that was to be ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// Its process learns of it.
    Ended,
    /// It was gone already, or is another one now.
    Gone,
    /// This kernel ends no sockets (it is built without `CONFIG_INET_DIAG_DESTROY`).
    Unsupported,
    /// Another error.
    Failed(i32),
}

impl Fate {
    fn of(error: i32) -> Self {
        match -error {
            0 => Self::Ended,
            libc::ENOENT | libc::ESTALE => Self::Gone,
            libc::EOPNOTSUPP => Self::Unsupported,
            other => Self::Failed(other),
        }
    }
}

/// A way to the sockets of the network namespace that it was opened in.
pub(super) struct Diag {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Diag {
    /// For this thread's namespace.
    pub(super) fn open() -> Result<Self> {
        // SAFETY: the call takes no memory.
        let descriptor = unsafe {
            libc::socket(
                libc::AF_NETLINK,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                libc::NETLINK_SOCK_DIAG,
            )
        };
        if descriptor < 0 {
            return Err(io::Error::last_os_error()).context("could not open a socket of sock_diag");
        }
        Ok(Self {
            // SAFETY: the descriptor was just made and is nobody else's.
            socket: unsafe { OwnedFd::from_raw_fd(descriptor) },
            sequence: 0,
            buffer: vec![0; 64 << 10],
        })
    }

    /// For another namespace, which this thread enters and leaves.
    pub(super) fn open_in(namespace: &File, own: &File) -> Result<Self> {
        let enter = |namespace| nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET);
        enter(namespace).context("could not enter the network namespace")?;
        let diag = Self::open();
        enter(own).context("could not return to the node's network namespace")?;
        diag
    }

    /// Connected sockets of a family and a protocol whose peers are among these.
    pub(super) fn list(
        &mut self,
        family: i32,
        protocol: u8,
        backends: &[Backend],
    ) -> Result<Vec<Socket>> {
        let may_be = |backend: &&Backend| family == libc::AF_INET6 || backend.address.is_ipv4();
        let wanted: Vec<&Backend> = backends.iter().filter(may_be).collect();
        let code = (wanted.len() <= FILTERED).then(|| bytecode(&wanted));
        self.dump(family, protocol, !IDLE, code)
    }

    /// All connections of TCP, and all sockets that listen.
    pub(super) fn tcp(&mut self, family: i32) -> Result<[Vec<Socket>; 2]> {
        let protocol = xebec_dataplane_common::TCP;
        Ok([
            self.dump(family, protocol, !IDLE, None)?,
            self.dump(family, protocol, LISTEN, None)?,
        ])
    }

    /// Sockets in some states, all or those that a filter of the kernel's lets through.
    fn dump(
        &mut self,
        family: i32,
        protocol: u8,
        states: u32,
        code: Option<Vec<u8>>,
    ) -> Result<Vec<Socket>> {
        let request = Request {
            family: family as u8,
            protocol,
            extensions: 0,
            pad: 0,
            states,
            id: Id::zeroed(),
        };
        let mut payload = bytemuck::bytes_of(&request).to_vec();
        if let Some(code) = code {
            payload.extend((code.len() as u16 + 4).to_ne_bytes());
            payload.extend(BYTECODE.to_ne_bytes());
            payload.extend(code);
        }
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
        let mut message = Vec::with_capacity(payload.len() + 16);
        self.append(&mut message, BY_FAMILY, flags, &payload);
        self.send(&message)?;
        let mut sockets = Vec::new();
        let mut failed = None;
        let mut done = false;
        while !done {
            self.receive(|kind, body| match i32::from(kind) {
                libc::NLMSG_DONE => {
                    failed = failed.or(status(body));
                    done = true;
                }
                libc::NLMSG_ERROR => {
                    failed = failed.or(status(body));
                    done = true;
                }
                _ => {
                    let told = body.get(..size_of::<Told>());
                    if let Some(told) = told.map(bytemuck::pod_read_unaligned::<Told>) {
                        sockets.push(Socket {
                            family: told.family,
                            protocol,
                            id: told.id,
                        });
                    }
                }
            })?;
        }
        match failed {
            Some(error) => {
                Err(io::Error::from_raw_os_error(error)).context("could not list sockets")
            }
            None => Ok(sockets),
        }
    }

    /// Ends sockets; their fates in the same order, which end early only where this kernel ends none.
    pub(super) fn end(&mut self, sockets: &[Socket]) -> Result<Vec<Fate>> {
        let mut fates = Vec::with_capacity(sockets.len());
        for batch in sockets.chunks(BATCH) {
            let mut message = Vec::new();
            for socket in batch {
                let request = Request {
                    family: socket.family,
                    protocol: socket.protocol,
                    extensions: 0,
                    pad: 0,
                    states: !0,
                    id: socket.id,
                };
                let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
                self.append(&mut message, DESTROY, flags, bytemuck::bytes_of(&request));
            }
            self.send(&message)?;
            let end = fates.len() + batch.len();
            while fates.len() < end {
                self.receive(|kind, body| {
                    if i32::from(kind) == libc::NLMSG_ERROR {
                        fates.push(Fate::of(status(body).map_or(0, |error| -error)));
                    }
                })?;
            }
            if fates.contains(&Fate::Unsupported) {
                break;
            }
        }
        Ok(fates)
    }

    fn append(&mut self, message: &mut Vec<u8>, kind: u16, flags: u16, payload: &[u8]) {
        self.sequence = self.sequence.wrapping_add(1);
        let header = Header {
            length: (size_of::<Header>() + payload.len()) as u32,
            kind,
            flags,
            sequence: self.sequence,
            port: 0,
        };
        message.extend(bytemuck::bytes_of(&header));
        message.extend(payload);
        message.resize(message.len().next_multiple_of(4), 0);
    }

    fn send(&self, message: &[u8]) -> Result<()> {
        loop {
            // SAFETY: the descriptor is open, and the kernel reads no more than the message's length.
            let sent = unsafe {
                libc::send(
                    self.socket.as_raw_fd(),
                    message.as_ptr().cast(),
                    message.len(),
                    0,
                )
            };
            match io::Error::last_os_error() {
                _ if sent >= 0 => return Ok(()),
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error).context("could not ask for sockets"),
            }
        }
    }

    /// Takes one datagram of messages.
    fn receive(&mut self, mut each: impl FnMut(u16, &[u8])) -> Result<()> {
        let length = loop {
            // SAFETY: the descriptor is open, and the kernel writes no more than the buffer's length.
            let length = unsafe {
                libc::recv(
                    self.socket.as_raw_fd(),
                    self.buffer.as_mut_ptr().cast(),
                    self.buffer.len(),
                    0,
                )
            };
            match io::Error::last_os_error() {
                _ if length >= 0 => break length as usize,
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error).context("could not hear of sockets"),
            }
        };
        let mut rest = self.buffer.get(..length).unwrap_or_default();
        while let Some(header) = rest.get(..size_of::<Header>()) {
            let header: Header = bytemuck::pod_read_unaligned(header);
            let length = header.length as usize;
            let Some(body) = rest.get(size_of::<Header>()..length) else {
                bail!("the kernel told of sockets in a way that is not understood");
            };
            each(header.kind, body);
            rest = rest
                .get(length.next_multiple_of(4).min(rest.len())..)
                .unwrap_or_default();
        }
        Ok(())
    }
}

/// The error that a closing message carries.
fn status(body: &[u8]) -> Option<i32> {
    let code = body.get(..4).map(bytemuck::pod_read_unaligned::<i32>);
    code.map(|code| -code).filter(|error| *error > 0)
}

/// A filter that passes sockets connected to one of these: for each backend a condition, which if met leads to a jump
/// to the end, and else over that jump. Past the last one, a jump beyond the end is a no.
fn bytecode(backends: &[&Backend]) -> Vec<u8> {
    let sizes = backends.iter().map(|backend| match backend.address {
        IpAddr::V4(_) => 20,
        IpAddr::V6(_) => 32,
    });
    let length: usize = sizes.sum::<usize>() + 4;
    let mut code = Vec::with_capacity(length);
    let operation = |code: &mut Vec<u8>, kind: u8, yes: u8, no: usize| {
        code.extend([kind, yes]);
        code.extend((no as u16).to_ne_bytes());
    };
    for backend in backends {
        let (family, octets) = match backend.address {
            IpAddr::V4(address) => (libc::AF_INET, address.octets().to_vec()),
            IpAddr::V6(address) => (libc::AF_INET6, address.octets().to_vec()),
        };
        let size = 12 + octets.len();
        operation(&mut code, DESTINATION, size as u8, size + 4);
        code.extend([family as u8, octets.len() as u8 * 8, 0, 0]);
        code.extend(i32::from(backend.port).to_ne_bytes());
        code.extend(octets);
        let to_end = length - code.len();
        operation(&mut code, JUMP, 4, to_end);
    }
    operation(&mut code, JUMP, 4, 8);
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_the_kernels() {
        assert_eq!(
            [
                size_of::<Id>(),
                size_of::<Request>(),
                size_of::<Told>(),
                size_of::<Header>()
            ],
            [48, 56, 72, 16]
        );
    }

    #[test]
    fn a_socket_s_number_and_peer() {
        let mut id = Id::zeroed();
        id.cookie = [0x89ab_cdef, 0x0123_4567];
        id.destination_port = 443_u16.to_be_bytes();
        id.destination = Ipv4Addr::new(10, 0, 0, 7).to_ipv6_mapped().octets();
        let mapped = Socket {
            family: libc::AF_INET6 as u8,
            protocol: libc::IPPROTO_TCP as u8,
            id,
        };
        assert_eq!(mapped.cookie(), 0x0123_4567_89ab_cdef);
        let peer = mapped.peer();
        assert_eq!((peer.address, peer.port), ([10, 0, 0, 7].into(), 443));
        id.destination[..4].copy_from_slice(&[10, 0, 0, 8]);
        let family = libc::AF_INET as u8;
        let plain = Socket {
            family,
            id,
            ..mapped
        };
        assert_eq!(plain.peer().address, IpAddr::from([10, 0, 0, 8]));
    }

    #[test]
    fn errors_of_the_kernel_are_told_apart() {
        let told = [0, libc::ENOENT, libc::EOPNOTSUPP, libc::EPERM].map(|error| Fate::of(-error));
        let expected = [
            Fate::Ended,
            Fate::Gone,
            Fate::Unsupported,
            Fate::Failed(libc::EPERM),
        ];
        assert_eq!(told, expected);
    }
}
