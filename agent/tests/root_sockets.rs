//! Connected sockets to backends that are gone, in namespaces of their own, on the running kernel.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};
use tokio_util::sync::CancellationToken;
use xebec_agent::sockets::{Backend, Ended, end, run};

const TCP: u8 = libc::IPPROTO_TCP as u8;
const UDP: u8 = libc::IPPROTO_UDP as u8;
/// Backends' addresses; every namespace here has them on its loopback device.
const V4: &str = "10.1.1.1";
const V6: &str = "fd01::1";
/// How long is waited for what should be there at once; a machine that stands still now and then takes longer.
const PATIENCE: Duration = Duration::from_secs(10);
/// The first as sockets of IPv6 know it.
const MAPPED: &str = "::ffff:10.1.1.1";

/// Whether to leave a test out.
fn left_out() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("left out: this test needs root");
    }
    !root
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(status.unwrap().success(), "ip {arguments}");
}

/// Enters a new namespace, which lasts as long as something is in it.
fn enter_new() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    ip("link set lo up");
    ip(&format!("addr add {V4}/32 dev lo"));
    ip(&format!("addr add {V6}/128 dev lo nodad"));
}

/// Runs a test in a new namespace, that of a node, on a thread of its own.
fn on_a_node(test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            enter_new();
            test();
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// A pod's namespace, which a thread keeps.
struct Pod {
    path: PathBuf,
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Pod {
    fn new() -> Self {
        let (end, ended) = channel::<()>();
        let (tell, told) = channel();
        let thread = std::thread::spawn(move || {
            enter_new();
            let (process, thread) = (std::process::id(), nix::unistd::gettid());
            tell.send(PathBuf::from(format!(
                "/proc/{process}/task/{thread}/ns/net"
            )))
            .unwrap();
            let _ = ended.recv();
        });
        Self {
            path: told.recv().unwrap(),
            end: Some(end),
            thread: Some(thread),
        }
    }

    /// Runs something there.
    fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(&self.path).unwrap();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            thread.join().unwrap()
        })
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        drop(self.end.take());
        let _ = self.thread.take().unwrap().join();
    }
}

/// The kernel's number of a socket.
fn cookie(socket: &impl AsRawFd) -> u64 {
    let mut cookie = 0_u64;
    let mut length = 8;
    // SAFETY: the descriptor is open, and the kernel writes at most 8 bytes.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    assert_eq!(outcome, 0);
    cookie
}

/// Takes connections at an address and keeps them, and answers datagrams at the next port with themselves.
struct Server {
    tcp: SocketAddr,
    udp: SocketAddr,
    accepted: Arc<Mutex<Vec<TcpStream>>>,
}

impl Server {
    /// At all addresses of both families.
    fn new() -> Self {
        let listener = TcpListener::bind("[::]:0").unwrap();
        let socket = UdpSocket::bind("[::]:0").unwrap();
        let (tcp, udp) = (listener.local_addr().unwrap(), socket.local_addr().unwrap());
        let accepted = Arc::new(Mutex::new(Vec::new()));
        let keep = accepted.clone();
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                keep.lock().unwrap().push(stream);
            }
        });
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&buffer[..length], from);
            }
        });
        Self { tcp, udp, accepted }
    }

    fn at(&self, protocol: u8, address: &str) -> SocketAddr {
        let port = if protocol == TCP { self.tcp } else { self.udp }.port();
        SocketAddr::new(address.parse().unwrap(), port)
    }

    fn tcp(&self, address: &str) -> TcpStream {
        let stream = TcpStream::connect(self.at(TCP, address)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// A connected one.
    fn udp(&self, address: &str) -> UdpSocket {
        let any = if address.contains(':') {
            "[::]:0"
        } else {
            "0.0.0.0:0"
        };
        let socket = UdpSocket::bind(any).unwrap();
        socket.connect(self.at(UDP, address)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    }

    /// Its backends, at the addresses of both families.
    fn backends(&self) -> HashSet<Backend> {
        let of = |protocol, address| {
            let address = self.at(protocol, address);
            backend(protocol, address.ip(), address.port())
        };
        HashSet::from([of(TCP, V4), of(TCP, V6), of(UDP, V4), of(UDP, V6)])
    }

    /// Waits until so many of these connections are whole at their other ends; one that was reset has no peer.
    fn whole(&self, of: &[SocketAddr], count: usize) {
        let began = Instant::now();
        let found = || {
            let accepted = self.accepted.lock().unwrap();
            let peers = accepted.iter().filter_map(|one| one.peer_addr().ok());
            peers.filter(|peer| of.contains(peer)).count()
        };
        while found() != count {
            assert!(began.elapsed() < PATIENCE, "{}", found());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn backend(protocol: u8, address: IpAddr, port: u16) -> Backend {
    Backend {
        protocol,
        address,
        port,
    }
}

/// What a process learns of a TCP socket that was ended.
fn aborted(mut stream: &TcpStream) -> bool {
    let error = stream.read(&mut [0; 8]).unwrap_err();
    error.kind() == ErrorKind::ConnectionAborted
}

fn lives(mut stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let silent = stream.read(&mut [0; 8]).unwrap_err().kind() == ErrorKind::WouldBlock;
    silent && stream.write(b"x").is_ok()
}

fn udp_aborted(socket: &UdpSocket) -> bool {
    let error = socket.recv(&mut [0; 8]).unwrap_err();
    error.kind() == ErrorKind::ConnectionAborted
}

fn udp_lives(socket: &UdpSocket) -> bool {
    let mut buffer = [0; 8];
    socket.send(b"x").unwrap();
    socket.recv(&mut buffer).is_ok_and(|length| length == 1)
}

/// Sockets of all families to a server; some of them got there through a Service.
struct Sockets {
    translated: (Vec<TcpStream>, Vec<UdpSocket>),
    others: (Vec<TcpStream>, Vec<UdpSocket>),
    _unconnected: UdpSocket,
}

impl Sockets {
    fn to(server: &Server) -> Self {
        let make = || {
            let tcp = [V4, V6, MAPPED].map(|address| server.tcp(address));
            let udp = [V4, V6, MAPPED].map(|address| server.udp(address));
            (Vec::from(tcp), Vec::from(udp))
        };
        Self {
            translated: make(),
            others: make(),
            _unconnected: UdpSocket::bind("[::]:0").unwrap(),
        }
    }

    fn cookies(&self) -> impl Iterator<Item = u64> {
        let tcp = self.translated.0.iter().map(cookie);
        tcp.chain(self.translated.1.iter().map(cookie))
    }

    /// Whether those alone were ended that should be.
    fn judge(&self) {
        for (tcp, udp) in self.translated.0.iter().zip(&self.translated.1) {
            assert!(aborted(tcp) && udp_aborted(udp));
        }
        for (tcp, udp) in self.others.0.iter().zip(&self.others.1) {
            assert!(lives(tcp) && udp_lives(udp));
        }
    }
}

#[test]
fn sockets_to_a_dead_backend_are_ended_in_all_namespaces_and_no_others() {
    if left_out() {
        return;
    }
    // Where the kernel is told of each backend, and where there are too many for that.
    for further in [0, 100] {
        on_a_node(|| {
            let pods = [Pod::new(), Pod::new()];
            let servers = [
                Server::new(),
                pods[0].run(Server::new),
                pods[1].run(Server::new),
            ];
            let sockets = [
                Sockets::to(&servers[0]),
                pods[0].run(|| Sockets::to(&servers[1])),
                pods[1].run(|| Sockets::to(&servers[2])),
            ];
            // A server that lives, in the same namespace, at the same addresses.
            let alive = Server::new();
            let beside = Sockets::to(&alive);
            let all = sockets.iter().chain([&beside]);
            let translated: HashSet<u64> = all.flat_map(Sockets::cookies).collect();
            assert_eq!(translated.len(), 4 * 6);
            let mut gone: HashSet<Backend> = servers.iter().flat_map(Server::backends).collect();
            for number in 0..further {
                for protocol in [TCP, UDP] {
                    gone.insert(backend(protocol, [10, 2, 2, number].into(), 80));
                }
            }
            let peers: Vec<SocketAddr> = sockets[0].translated.0.iter().map(local).collect();
            servers[0].whole(&peers, 3);
            let namespaces = [
                pods[0].path.clone(),
                "/proc/thread-self/ns/net".into(),
                pods[1].path.clone(),
                "/run/there/is/none".into(),
                pods[0].path.clone(),
            ];
            // Of a socket of IPv6 that is connected to an IPv4 address, the peer is told as IPv4.
            let asked = gone.clone();
            let judge = move |cookie: u64, peer: &Backend| {
                assert!(asked.contains(peer));
                translated.contains(&cookie)
            };
            let ended = end(&gone, &namespaces, &judge).unwrap();
            let expected = Ended {
                tcp: 9,
                udp: 9,
                spared: 18,
                namespaces: 3,
            };
            assert_eq!(ended, expected);
            for sockets in &sockets {
                sockets.judge();
            }
            for (tcp, udp) in beside.translated.0.iter().zip(&beside.translated.1) {
                assert!(lives(tcp) && udp_lives(udp));
            }
            servers[0].whole(&peers, 0);
            // Nothing is left to end.
            let ended = end(&gone, &namespaces, &judge).unwrap();
            assert_eq!((ended.tcp, ended.udp, ended.spared), (0, 0, 18));
        });
    }
}

fn local(stream: &TcpStream) -> SocketAddr {
    let address = stream.local_addr().unwrap();
    // The server's sockets are of IPv6.
    match address.ip() {
        IpAddr::V4(v4) => SocketAddr::new(v4.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    }
}

#[test]
fn who_waits_for_a_dead_backend_waits_no_longer() {
    if left_out() {
        return;
    }
    on_a_node(|| {
        let server = Server::new();
        // One waits for an answer, one for a connection to an address where nobody answers.
        let mut reader = server.tcp(V4);
        reader.set_read_timeout(None).unwrap();
        ip("link add wire type veth peer name far");
        ip("addr add 10.3.0.1/24 dev wire");
        ip("link set wire up");
        ip("link set far up");
        let silent = backend(TCP, [10, 3, 0, 2].into(), 80);
        let mut gone = server.backends();
        gone.insert(silent);
        let began = Instant::now();
        std::thread::scope(|scope| {
            let read = scope.spawn(move || reader.read(&mut [0; 8]).unwrap_err());
            let connect = scope.spawn(|| TcpStream::connect("10.3.0.2:80").unwrap_err());
            while end(&gone, &[], &|_, peer| *peer == silent).unwrap().tcp == 0 {
                assert!(began.elapsed() < PATIENCE, "none was found");
                std::thread::sleep(Duration::from_millis(10));
            }
            assert_eq!(connect.join().unwrap().kind(), ErrorKind::ConnectionAborted);
            assert!(!read.is_finished());
            assert_eq!(end(&gone, &[], &|_, _| true).unwrap().tcp, 1);
            assert_eq!(read.join().unwrap().kind(), ErrorKind::ConnectionAborted);
        });
        // The kernel itself gives up after two minutes.
        assert!(began.elapsed() < PATIENCE);
    });
}

#[test]
fn backends_that_are_told_of_are_gathered_and_their_sockets_ended() {
    if left_out() {
        return;
    }
    on_a_node(|| {
        let pod = Pod::new();
        let server = pod.run(Server::new);
        let sockets = pod.run(|| Sockets::to(&server));
        let translated: HashSet<u64> = sockets.cookies().collect();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let path = pod.path.clone();
        let passes = Mutex::new(0);
        runtime.block_on(async {
            let (tell, told) = tokio::sync::mpsc::unbounded_channel();
            for backend in server.backends() {
                tell.send(backend).unwrap();
            }
            // With nobody left to tell, it ends after the last of them.
            drop(tell);
            let namespaces = || {
                *passes.lock().unwrap() += 1;
                std::future::ready(vec![path.clone()])
            };
            let judge = Arc::new(move |cookie, _: &Backend| translated.contains(&cookie));
            run(told, namespaces, judge, CancellationToken::new())
                .await
                .unwrap();
        });
        sockets.judge();
        assert_eq!(*passes.lock().unwrap(), 1);
    });
}

/// Sockets to two backends, 5,000 of TCP and 5,000 of UDP, half of them of IPv6; and what namespaces cost where there
/// is nothing to end.
#[test]
fn ten_thousand_sockets_in_one_pass() {
    if left_out() {
        return;
    }
    const EACH: usize = 2_500;
    on_a_node(|| {
        let server = Server::new();
        let mut sockets: Vec<OwnedFd> = Vec::new();
        for _ in 0..EACH {
            for address in [V4, V6] {
                sockets.push(server.tcp(address).into());
                sockets.push(server.udp(address).into());
            }
        }
        let spared: Vec<UdpSocket> = (0..100).map(|_| server.udp(V4)).collect();
        let translated: HashSet<u64> = sockets.iter().map(cookie).collect();
        assert_eq!(translated.len(), 4 * EACH);
        let judge = move |cookie, _: &Backend| translated.contains(&cookie);
        let gone = server.backends();
        let began = Instant::now();
        let ended = end(&gone, &[], &judge).unwrap();
        let took = began.elapsed();
        assert_eq!((ended.tcp, ended.udp), (2 * EACH, 2 * EACH));
        assert_eq!(ended.spared, spared.len());
        assert!(spared.iter().all(udp_lives));
        let mut errors = sockets.iter().map(pending);
        assert!(errors.all(|error| error == libc::ECONNABORTED));
        let pods: Vec<Pod> = (0..20).map(|_| Pod::new()).collect();
        let paths: Vec<PathBuf> = pods.iter().map(|pod| pod.path.clone()).collect();
        let began = Instant::now();
        let without = end(&gone, &paths, &judge).unwrap();
        let idle = began.elapsed() / paths.len() as u32;
        assert_eq!((without.tcp, without.udp), (0, 0));
        println!(
            "{} sockets ended in one pass in {took:?}; a namespace without any costs {idle:?}",
            4 * EACH
        );
    });
}

/// The error that a socket's process gets next.
fn pending(socket: &OwnedFd) -> i32 {
    let mut error = 0_i32;
    let mut length = 4;
    // SAFETY: the descriptor is open, and the kernel writes at most 4 bytes.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ERROR,
            (&raw mut error).cast(),
            &raw mut length,
        )
    };
    assert_eq!(outcome, 0, "{}", io::Error::last_os_error());
    error
}
