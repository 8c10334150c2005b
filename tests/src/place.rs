//! Places that packets come from and go to (a pod, a node, a machine outside), and sockets of theirs.
//!
//! A socket belongs to the network namespace and the cgroup in which it was made, wherever it is used afterwards, and
//! is connected by somebody there; so a test has sockets of all places in its own hands.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use serde_json::Value;

use crate::Cluster;

/// How long an answer may take; nothing is lost on the way, so that only what is dropped takes that long.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// How long what should be dropped is waited for.
pub const SILENCE: Duration = Duration::from_millis(400);
/// The longest datagram that anybody takes.
const LONGEST: usize = 16 << 10;
/// How often servers look whether they should end.
const GLANCE: Duration = Duration::from_millis(50);

/// TCP or UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// A line is asked and answered on a connection.
    Tcp,
    /// A datagram is asked and answered.
    Udp,
}

/// Both.
pub const PROTOCOLS: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];

/// A network namespace, and the cgroup whose socket programs what is made in it meets.
#[derive(Clone, Debug)]
pub struct Place {
    /// What messages call it.
    pub name: String,
    netns: Option<PathBuf>,
    cgroup: Option<PathBuf>,
}

/// The process as a whole is in one cgroup.
static CGROUP: Mutex<()> = Mutex::new(());

/// Puts the process back where it was.
struct Back(PathBuf);

impl Back {
    fn moved(to: &Path) -> Result<Self> {
        let point = to
            .ancestors()
            .take_while(|dir| dir.join("cgroup.procs").exists())
            .last()
            .with_context(|| format!("{} is no cgroup", to.display()))?;
        let own = std::fs::read_to_string("/proc/self/cgroup").context("could not read cgroups")?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/"));
        let back = Self(point.join(own.context("this process has no cgroup v2")?));
        enter(to)?;
        Ok(back)
    }
}

impl Drop for Back {
    fn drop(&mut self) {
        if let Err(error) = enter(&self.0) {
            eprintln!("{error:#}");
        }
    }
}

fn enter(cgroup: &Path) -> Result<()> {
    std::fs::write(cgroup.join("cgroup.procs"), "0")
        .with_context(|| format!("could not enter the cgroup {}", cgroup.display()))
}

/// The cgroup of a node's pods, where its socket programs are.
pub fn cgroup_of(node: &str) -> Result<PathBuf> {
    Ok(cgroups()?.join("xebec").join(node))
}

/// The pods of a node as places, by their names.
pub fn pods_of(cluster: &Cluster, node: &str) -> Result<BTreeMap<String, Place>> {
    let cgroup = cgroup_of(node)?;
    let endpoints = cluster.ask_agent(node, "/tables/endpoints")?;
    let one = |endpoint: &Value| {
        let sandbox = endpoint["container"].as_str()?;
        let path = format!("nodes/{node}/cri/netns/{sandbox}");
        let netns = cluster.run_dir().join(path);
        let name = endpoint["pod"].as_str()?.to_owned();
        let place = Place::new(&name, Some(netns), Some(cgroup.clone()));
        Some((name, place))
    };
    let endpoints = endpoints.as_array().into_iter().flatten();
    Ok(endpoints.filter_map(one).collect())
}

/// A pod's addresses, IPv4's first, if it has both.
pub fn addresses_of(pod: &Value) -> Option<[IpAddr; 2]> {
    let all = pod["status"]["podIPs"].as_array()?.iter();
    let all: Vec<IpAddr> = all
        .filter_map(|one| one["ip"].as_str()?.parse().ok())
        .collect();
    let first = |v4: bool| all.iter().find(|one| one.is_ipv4() == v4).copied();
    Some([first(true)?, first(false)?])
}

/// Where cgroup v2 is mounted.
pub fn cgroups() -> Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").context("could not read mounts")?;
    let point = mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (point, kind) = (words.next()?, words.next()?);
        (kind == "cgroup2").then_some(point)
    });
    point.map(PathBuf::from).context("cgroup v2 is not mounted")
}

/// Runs something while the process as a whole is in a cgroup: what its threads open meanwhile meets the programs there.
pub fn inside<T>(cgroup: &Path, work: impl FnOnce() -> T) -> Result<T> {
    let _one = CGROUP.lock().unwrap_or_else(PoisonError::into_inner);
    let _back = Back::moved(cgroup)?;
    Ok(work())
}

impl Place {
    /// One in the namespace at `netns`, or in this process's own.
    pub fn new(name: &str, netns: Option<PathBuf>, cgroup: Option<PathBuf>) -> Self {
        Self {
            name: name.to_owned(),
            netns,
            cgroup,
        }
    }

    /// The same without the socket programs: packets alone are translated.
    #[must_use]
    pub fn without_sockets(&self) -> Self {
        Self::new(
            &format!("{} without socket programs", self.name),
            self.netns.clone(),
            None,
        )
    }

    /// Whether sockets meet the socket programs of a node.
    pub fn meets_programs(&self) -> bool {
        self.cgroup.is_some()
    }

    /// Runs something there.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let netns = self.netns.as_deref().map(File::open).transpose();
        let netns = netns.with_context(|| format!("{}: could not open its network", self.name))?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| -> Result<T> {
                if let Some(netns) = netns {
                    // This thread alone is there.
                    nix::sched::setns(&netns, nix::sched::CloneFlags::CLONE_NEWNET)
                        .context("could not enter the network namespace")?;
                }
                let _one = CGROUP.lock().unwrap_or_else(PoisonError::into_inner);
                let _back = self.cgroup.as_deref().map(Back::moved).transpose()?;
                Ok(work())
            });
            let outcome = thread
                .join()
                .map_err(|_| anyhow!("the thread in {} panicked", self.name))?;
            outcome.with_context(|| self.name.clone())
        })
    }

    /// Has this thread be there from here on. Its sockets meet no socket programs but those of whoever [runs](Self::run)
    /// something with them at the same time.
    pub fn stay(&self) -> Result<()> {
        let Some(netns) = &self.netns else {
            return Ok(());
        };
        let netns = File::open(netns)
            .with_context(|| format!("{}: could not open its network", self.name))?;
        nix::sched::setns(&netns, nix::sched::CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("{}: could not enter its network", self.name))
    }

    /// A socket of this place, made there and not yet connected.
    fn socket(&self, protocol: Protocol, v4: bool) -> io::Result<OwnedFd> {
        self.run(|| open(protocol, v4))
            .map_err(io::Error::other)?
            .map_err(Into::into)
    }

    /// Connects a socket; the socket programs ask where the caller is.
    fn connect(&self, socket: &OwnedFd, to: SocketAddr) -> io::Result<nix::Result<()>> {
        let to = SockaddrStorage::from(to);
        let connected = self.run(|| connect(socket.as_raw_fd(), &to));
        connected.map_err(io::Error::other)
    }

    /// A connection, or a connected socket for datagrams.
    pub fn talk(&self, protocol: Protocol, to: SocketAddr) -> io::Result<Talk> {
        self.talk_from(protocol, None, to, PATIENCE)
    }

    /// The same from an address or port, which may have been used just before, with another patience.
    pub fn talk_from(
        &self,
        protocol: Protocol,
        from: Option<SocketAddr>,
        to: SocketAddr,
        patience: Duration,
    ) -> io::Result<Talk> {
        let socket = self.socket(protocol, to.is_ipv4())?;
        // For TCP it also limits the time to connect.
        let time = TimeVal::new(
            patience.as_secs() as i64,
            i64::from(patience.subsec_micros()),
        );
        setsockopt(&socket, sockopt::SendTimeout, &time)?;
        if let Some(from) = from {
            // Of sockets for datagrams that all have this, the kernel gives several the same port by itself.
            setsockopt(&socket, sockopt::ReuseAddr, &true)?;
            bind(socket.as_raw_fd(), &SockaddrStorage::from(from))?;
        } else if protocol == Protocol::Udp {
            bind_anew(&socket, to.is_ipv4())?;
        }
        let connected = self.connect(&socket, to)?;
        connected.map_err(|error| match error {
            nix::errno::Errno::EINPROGRESS => io::Error::from(ErrorKind::TimedOut),
            error => error.into(),
        })?;
        let talk = match protocol {
            Protocol::Tcp => Talk::Tcp(BufReader::new(socket.into())),
            Protocol::Udp => Talk::Udp(socket.into()),
        };
        talk.set_patience(patience)?;
        Ok(talk)
    }

    /// Begins to connect and waits for nothing.
    pub fn begin(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let stream = TcpStream::from(self.socket(Protocol::Tcp, to.is_ipv4())?);
        stream.set_nonblocking(true)?;
        let socket = OwnedFd::from(stream);
        match self.connect(&socket, to)? {
            Ok(()) | Err(nix::errno::Errno::EINPROGRESS) => Ok(socket.into()),
            Err(error) => Err(error.into()),
        }
    }

    /// A socket for datagrams that is connected to nobody.
    pub fn datagrams(&self, v4: bool) -> io::Result<UdpSocket> {
        let socket = UdpSocket::from(self.socket(Protocol::Udp, v4)?);
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(socket)
    }

    /// Asks once, by a socket of its own.
    pub fn ask(&self, protocol: Protocol, to: SocketAddr) -> io::Result<Answer> {
        self.talk(protocol, to)?.ask()
    }

    /// Asks so many times, each by a socket of its own: how often each answered. All of it is done there at once.
    pub fn ask_many(
        &self,
        protocol: Protocol,
        to: SocketAddr,
        count: usize,
    ) -> Result<BTreeMap<String, usize>> {
        let ask = || -> io::Result<Answer> {
            let mut talk = match protocol {
                Protocol::Tcp => {
                    let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
                    Talk::Tcp(BufReader::new(stream))
                }
                Protocol::Udp => {
                    let socket = open(protocol, to.is_ipv4())?;
                    bind_anew(&socket, to.is_ipv4())?;
                    connect(socket.as_raw_fd(), &SockaddrStorage::from(to))?;
                    Talk::Udp(socket.into())
                }
            };
            talk.set_patience(PATIENCE)?;
            talk.ask()
        };
        let mut by_name = BTreeMap::new();
        let asked = self.run(|| {
            for _ in 0..count {
                *by_name.entry(ask()?.name).or_default() += 1;
            }
            Ok::<_, io::Error>(())
        })?;
        asked.with_context(|| format!("{} to {protocol:?} {to}", self.name))?;
        Ok(by_name)
    }

    /// Gets a path by HTTP: the status, the head in lower case, and the body.
    pub fn http_get(&self, at: SocketAddr, path: &str) -> Result<(u16, String, String)> {
        let mut stream = self
            .run(|| TcpStream::connect_timeout(&at, PATIENCE))?
            .with_context(|| format!("{}: no answer from {at}", self.name))?;
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let (head, body) = text.split_once("\r\n\r\n").context("no HTTP")?;
        let status = head.split(' ').nth(1);
        let status = status.and_then(|status| status.parse().ok());
        let status = status.with_context(|| format!("{at} answered {text:?}"))?;
        Ok((status, head.to_lowercase(), body.to_owned()))
    }

    /// How asking once fails; `None` where it is answered.
    pub fn refusal(&self, protocol: Protocol, to: SocketAddr) -> Option<ErrorKind> {
        self.ask(protocol, to).err().map(|error| error.kind())
    }

    /// Whether what is sent there is dropped without a word, for a moment at least.
    pub fn is_silent(&self, protocol: Protocol, to: SocketAddr) -> Result<bool> {
        let socket = self.socket(protocol, to.is_ipv4())?;
        let told = |outcome: io::Result<()>| match outcome.map_err(|error| error.kind()) {
            Err(ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(true),
            Ok(()) | Err(ErrorKind::ConnectionRefused) => Ok(false),
            Err(kind) => Err(anyhow!("{} to {protocol:?} {to}: {kind}", self.name)),
        };
        let time = TimeVal::new(0, SILENCE.as_micros() as i64);
        setsockopt(&socket, sockopt::SendTimeout, &time)?;
        let connected = self.connect(&socket, to)?;
        match (protocol, connected) {
            (Protocol::Tcp, Err(nix::errno::Errno::EINPROGRESS)) => return Ok(true),
            (_, Err(error)) => return told(Err(error.into())),
            (Protocol::Tcp, Ok(())) => return Ok(false),
            (Protocol::Udp, Ok(())) => {}
        }
        let mut talk = Talk::Udp(socket.into());
        talk.set_patience(SILENCE)?;
        told(talk.ask().map(drop))
    }
}

/// A socket where the caller is.
fn open(protocol: Protocol, v4: bool) -> nix::Result<OwnedFd> {
    let family = if v4 {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let kind = match protocol {
        Protocol::Tcp => SockType::Stream,
        Protocol::Udp => SockType::Datagram,
    };
    socket(family, kind, SockFlag::SOCK_CLOEXEC, None)
}

/// Gives a socket for datagrams a port that none had before it, for a long while. Those that kernels give come again, and
/// what a flow was sent to before, it is sent to then.
fn bind_anew(socket: &OwnedFd, v4: bool) -> io::Result<()> {
    /// Below node ports and those that kernels give.
    const PORTS: std::ops::Range<usize> = 12_000..30_000;
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let any: IpAddr = if v4 {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed) % PORTS.len();
        let from = SocketAddr::new(any, (PORTS.start + number) as u16);
        match bind(socket.as_raw_fd(), &SockaddrStorage::from(from)) {
            Err(nix::errno::Errno::EADDRINUSE) => {}
            outcome => return outcome.map_err(Into::into),
        }
    }
}

/// Who answered, and who they think has asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The server's name.
    pub name: String,
    /// The client's address as the server sees it.
    pub client: SocketAddr,
}

impl Answer {
    /// Reads what a [`Server`] writes.
    pub fn read(text: &str) -> io::Result<Self> {
        let (name, client) = text.trim_end().split_once(' ').ok_or_else(|| {
            io::Error::new(ErrorKind::UnexpectedEof, format!("answered {text:?}"))
        })?;
        let client = client
            .parse()
            .map_err(|error| io::Error::other(format!("answered {text:?}: {error}")))?;
        Ok(Self {
            name: name.to_owned(),
            client,
        })
    }
}

/// A client's socket.
pub enum Talk {
    /// A connection.
    Tcp(BufReader<TcpStream>),
    /// A connected socket.
    Udp(UdpSocket),
}

impl Talk {
    /// Asks again on the same socket.
    pub fn ask(&mut self) -> io::Result<Answer> {
        match self {
            Self::Tcp(stream) => {
                stream.get_mut().write_all(b"?\n")?;
                let mut line = String::new();
                stream.read_line(&mut line)?;
                Answer::read(&line)
            }
            Self::Udp(socket) => {
                socket.send(b"?")?;
                Self::datagram(socket)
            }
        }
    }

    /// Asks with a datagram of this many bytes, and fails unless the answer is as long.
    pub fn ask_at_length(&mut self, length: usize) -> io::Result<Answer> {
        let Self::Udp(socket) = self else {
            return Err(io::Error::other("a connection has no datagrams"));
        };
        socket.send(&vec![b'?'; length])?;
        let (answer, got) = Self::measured(socket)?;
        if got != length {
            let what = format!("{length} bytes asked, {got} answered");
            return Err(io::Error::other(what));
        }
        Ok(answer)
    }

    /// The next answer to a datagram.
    pub fn datagram(socket: &UdpSocket) -> io::Result<Answer> {
        Self::measured(socket).map(|(answer, _)| answer)
    }

    /// The same, and its length.
    fn measured(socket: &UdpSocket) -> io::Result<(Answer, usize)> {
        let mut buffer = vec![0; LONGEST];
        let length = socket.recv(&mut buffer)?;
        let answer = Answer::read(&String::from_utf8_lossy(&buffer[..length]))?;
        Ok((answer, length))
    }

    /// How long an answer may take from now on.
    pub fn set_patience(&self, time: Duration) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.get_ref().set_read_timeout(Some(time)),
            Self::Udp(socket) => socket.set_read_timeout(Some(time)),
        }
    }

    /// Where the socket believes to be connected to.
    pub fn peer(&self) -> io::Result<SocketAddr> {
        match self {
            Self::Tcp(stream) => stream.get_ref().peer_addr(),
            Self::Udp(socket) => socket.peer_addr(),
        }
    }

    /// How long packets of a connected socket may be, as far as its kernel has learned by now (`IP_MTU`).
    pub fn path_mtu(&self) -> io::Result<u32> {
        let (fd, v4) = match self {
            Self::Tcp(stream) => {
                let stream = stream.get_ref();
                (stream.as_raw_fd(), stream.local_addr()?.is_ipv4())
            }
            Self::Udp(socket) => (socket.as_raw_fd(), socket.local_addr()?.is_ipv4()),
        };
        let (level, name) = match v4 {
            true => (nix::libc::IPPROTO_IP, nix::libc::IP_MTU),
            false => (nix::libc::IPPROTO_IPV6, nix::libc::IPV6_MTU),
        };
        let mut mtu: nix::libc::c_int = 0;
        let mut length = size_of_val(&mtu) as nix::libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes, which `mtu` has.
        let outcome = unsafe {
            nix::libc::getsockopt(fd, level, name, (&raw mut mtu).cast(), &raw mut length)
        };
        nix::errno::Errno::result(outcome)?;
        u32::try_from(mtu).map_err(io::Error::other)
    }

    /// Waits until the socket has an error or its end, and tells which; `None` if neither comes.
    pub fn fate(&mut self) -> Option<ErrorKind> {
        let outcome = match self {
            Self::Tcp(stream) => stream.read(&mut [0; 64]),
            Self::Udp(socket) => socket.recv(&mut [0; 64]),
        };
        match outcome {
            Ok(0) => Some(ErrorKind::UnexpectedEof),
            Ok(_) => None,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                None
            }
            Err(error) => Some(error.kind()),
        }
    }
}

/// Answers everybody at a port of a place, by TCP and UDP of both families, with its name and the client's address.
pub struct Server {
    stop: Arc<AtomicBool>,
    listener: TcpListener,
    threads: Vec<JoinHandle<()>>,
}

/// IPv4's as such.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

impl Server {
    /// Starts one at all addresses.
    pub fn start(place: &Place, name: &str, port: u16) -> Result<Self> {
        Self::start_at(place, name, (Ipv6Addr::UNSPECIFIED, port).into())
    }

    /// Starts one at this address alone.
    pub fn start_at(place: &Place, name: &str, at: SocketAddr) -> Result<Self> {
        let (listener, socket) = place
            .run(|| Ok::<_, io::Error>((TcpListener::bind(at)?, UdpSocket::bind(at)?)))?
            .with_context(|| format!("{}: could not listen at {at}", place.name))?;
        socket.set_read_timeout(Some(GLANCE))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (ends, own) = (stop.clone(), name.to_owned());
        let datagrams = std::thread::spawn(move || {
            let mut buffer = vec![0; LONGEST];
            while !ends.load(Ordering::Relaxed) {
                if let Ok((length, client)) = socket.recv_from(&mut buffer) {
                    // As long as the question.
                    let text = format!("{own} {}", canonical(client));
                    let text = format!("{text:<length$}");
                    let _ = socket.send_to(text.as_bytes(), client);
                }
            }
        });
        let (ends, own, accepting) = (stop.clone(), name.to_owned(), listener.try_clone()?);
        let connections = std::thread::spawn(move || {
            let mut threads = Vec::new();
            while let Ok((stream, client)) = accepting.accept() {
                let (ends, text) = (ends.clone(), format!("{own} {}\n", canonical(client)));
                threads.push(std::thread::spawn(move || {
                    let _ = stream.set_read_timeout(Some(GLANCE));
                    let mut lines = &stream;
                    let mut buffer = [0; 256];
                    while !ends.load(Ordering::Relaxed) {
                        let length = match lines.read(&mut buffer) {
                            Ok(0) => break,
                            Ok(length) => length,
                            Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                            Err(_) => break,
                        };
                        for _ in 0..length / 2 {
                            if lines.write_all(text.as_bytes()).is_err() {
                                return;
                            }
                        }
                    }
                }));
                threads.retain(|thread: &JoinHandle<()>| !thread.is_finished());
            }
            for thread in threads {
                let _ = thread.join();
            }
        });
        Ok(Self {
            stop,
            listener,
            threads: vec![datagrams, connections],
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Whoever waits for a connection stops waiting.
        let socket: &TcpListener = &self.listener;
        let _ = nix::sys::socket::shutdown(socket.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
