//! A network of two nodes and a client: namespaces on a bridge that snoops on multicast groups.

use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};

/// The nodes' and the client's names.
pub const NODES: [&str; 2] = ["node-a", "node-b"];
const CLIENT: &str = "client";
/// The Service's addresses.
pub const V4: &str = "10.77.0.100";
pub const V6: &str = "fd77::100";
const PORT: u16 = 7000;

pub type Mac = [u8; 6];

/// Whether to leave a test out.
pub fn left_out() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("left out: this test needs root");
    }
    !root
}

/// Namespaces that end with this.
pub struct Lan {
    places: Vec<Place>,
}

/// A namespace, and the thread that keeps it and works there.
struct Place {
    name: &'static str,
    namespace: File,
    work: Option<Sender<Box<dyn FnOnce() + Send>>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Place {
    fn new(name: &'static str) -> Self {
        let (work, told) = channel::<Box<dyn FnOnce() + Send>>();
        let (tell, namespace) = channel();
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            tell.send(File::open("/proc/thread-self/ns/net").unwrap())
                .unwrap();
            // New devices take these over: the kernel answers for no address of another device, and waits for nothing
            // before an address is used.
            sysctl("ipv4/conf/all/arp_ignore", "1");
            sysctl("ipv6/conf/default/accept_dad", "0");
            ip("link set lo up");
            for work in told {
                work();
            }
        });
        Self {
            name,
            namespace: namespace.recv().unwrap(),
            work: Some(work),
            thread: Some(thread),
        }
    }

    fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (tell, told) = channel();
        let work = Box::new(move || tell.send(work()).unwrap());
        self.work.as_ref().unwrap().send(work).unwrap();
        told.recv().unwrap()
    }

    fn ip(&self, arguments: String) {
        self.run(move || ip(&arguments));
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(self.work.take());
        let _ = self.thread.take().unwrap().join();
    }
}

fn ip(arguments: &str) -> String {
    command("ip", arguments)
}

fn command(program: &str, arguments: &str) -> String {
    let output = Command::new(program).args(arguments.split(' ')).output();
    let output = output.unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

fn sysctl(name: &str, value: &str) {
    std::fs::write(format!("/proc/sys/net/{name}"), value).unwrap();
}

impl Lan {
    pub fn new() -> Self {
        let bridge = Place::new("bridge");
        // With somebody who asks for groups, the bridge sends their frames to members alone.
        let snoops = "mcast_snooping 1 mcast_querier 1 mcast_query_response_interval 10";
        bridge.ip(format!("link add name lan type bridge {snoops}"));
        bridge.ip("link set lan up".into());
        let mut places = vec![bridge];
        for (number, name) in [(1, CLIENT), (11, NODES[0]), (12, NODES[1])] {
            let place = Place::new(name);
            places[0].ip(format!("link add {name} type veth peer name tmp"));
            let target = place.namespace.try_clone().unwrap();
            places[0].run(move || {
                let path = format!("/proc/{}/fd/{}", std::process::id(), target.as_raw_fd());
                ip(&format!("link set tmp netns {path} name eth0"));
            });
            places[0].ip(format!("link set {name} master lan up"));
            place.ip(format!("addr add 10.77.0.{number}/24 dev eth0"));
            place.ip("link set eth0 up".into());
            place.ip(format!("addr add fd77::{number}/64 dev eth0 nodad"));
            if name != CLIENT {
                place.ip(format!("addr add {V4}/32 dev lo"));
                place.ip(format!("addr add {V6}/128 dev lo nodad"));
                place.run(move || {
                    for address in [V4, V6] {
                        answer(address, name);
                    }
                });
            }
            places.push(place);
        }
        // It forwards to members alone when the time for answers to its first questions is over.
        std::thread::sleep(Duration::from_millis(500));
        Self { places }
    }

    fn at(&self, name: &str) -> &Place {
        self.places.iter().find(|place| place.name == name).unwrap()
    }

    /// What takes a thread to a place.
    pub fn enter(&self, name: &str) -> impl FnOnce() + Send + 'static {
        let namespace = self.at(name).namespace.try_clone().unwrap();
        move || setns(namespace, CloneFlags::CLONE_NEWNET).unwrap()
    }

    /// Hardware address of a place.
    pub fn mac(&self, name: &str) -> Mac {
        let link = self.at(name).run(|| ip("-o link show dev eth0"));
        mac(link.split("link/ether ").nth(1).unwrap())
    }

    /// Where the client's kernel believes an address to be.
    pub fn neighbour(&self, address: &'static str) -> Option<Mac> {
        let told = self
            .at(CLIENT)
            .run(move || ip(&format!("neigh show to {address} dev eth0")));
        told.split("lladdr ").nth(1).map(mac)
    }

    /// Makes the client's kernel forget all neighbours.
    pub fn forget(&self) {
        self.at(CLIENT).ip("neigh flush all".into());
    }

    /// The groups that the bridge knows members of.
    pub fn snooped(&self) -> String {
        self.places[0].run(|| command("bridge", "mdb show"))
    }

    /// Takes a node's wire out.
    pub fn unplug(&self, name: &str) {
        self.at(name).ip("link set eth0 down".into());
    }

    pub fn plug(&self, name: &str) {
        let place = self.at(name);
        place.ip("link set eth0 up".into());
        // The kernel forgets it with the wire.
        let number = if name == NODES[0] { 11 } else { 12 };
        place.ip(format!("addr add fd77::{number}/64 dev eth0 nodad"));
    }

    /// A client that asks the Service who answers.
    pub fn client(&self) -> Client {
        let sockets = self.at(CLIENT).run(|| {
            [(V4, "0.0.0.0:0"), (V6, "[::]:0")].map(|(address, any)| {
                let socket = UdpSocket::bind(any).unwrap();
                let address: IpAddr = address.parse().unwrap();
                socket.connect((address, PORT)).unwrap();
                let wait = Some(Duration::from_millis(20));
                socket.set_read_timeout(wait).unwrap();
                socket
            })
        });
        Client {
            sockets,
            asked: AtomicU64::new(0),
        }
    }

    /// A client that asks for hardware addresses and hears all answers.
    pub fn asker(&self) -> Asker {
        self.at(CLIENT).run(Asker::new)
    }
}

fn mac(text: &str) -> Mac {
    let bytes = text.split_whitespace().next().unwrap().split(':');
    let bytes: Vec<u8> = bytes
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect();
    bytes.try_into().unwrap()
}

/// Answers what comes to a Service's address with just that and the node's name.
fn answer(address: &'static str, name: &'static str) {
    let address: IpAddr = address.parse().unwrap();
    let socket = UdpSocket::bind(SocketAddr::new(address, PORT)).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 16];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let answer = [&buffer[..length], name.as_bytes()].concat();
            let _ = socket.send_to(&answer, from);
        }
    });
}

pub struct Client {
    sockets: [UdpSocket; 2],
    asked: AtomicU64,
}

impl Client {
    /// Asks until a node answers at both addresses what was asked from now on.
    pub fn until(&self, node: &str, within: Duration) {
        let began = Instant::now();
        let mut heard = [None, None];
        let number = |bytes: &[u8]| u64::from_be_bytes(bytes[..8].try_into().unwrap());
        let first = self.asked.load(Ordering::Relaxed);
        while heard.iter().any(|one| one.as_deref() != Some(node)) {
            assert!(began.elapsed() < within, "{heard:?} instead of {node}");
            for (socket, heard) in self.sockets.iter().zip(&mut heard) {
                let mut buffer = [0; 32];
                let asked = self.asked.fetch_add(1, Ordering::Relaxed);
                let _ = socket.send(&asked.to_be_bytes());
                if let Ok(length) = socket.recv(&mut buffer)
                    && number(&buffer) >= first
                {
                    *heard = Some(String::from_utf8_lossy(&buffer[8..length]).into_owned());
                }
            }
        }
    }
}

/// What hears frames of ARP, and sends them.
pub struct Asker {
    socket: OwnedFd,
}

/// The asker's own addresses.
const OWN: Mac = [2, 0, 0, 0, 0, 0x77];
const OWN_IP: [u8; 4] = [10, 77, 0, 77];

impl Asker {
    fn new() -> Self {
        let index = nix::net::if_::if_nametoindex("eth0").unwrap();
        // SAFETY: the call takes no memory, and the descriptor is nobody else's.
        let socket = unsafe {
            let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
            OwnedFd::from_raw_fd(libc::socket(libc::AF_PACKET, kind, 0))
        };
        // SAFETY: the struct is plain numbers; the descriptor is open, and the length is the struct's.
        let outcome = unsafe {
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = (libc::ETH_P_ARP as u16).to_be();
            address.sll_ifindex = index as i32;
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as u32,
            )
        };
        assert_eq!(outcome, 0, "{}", io::Error::last_os_error());
        let room: libc::c_int = 8 << 20;
        // SAFETY: the descriptor is open, and the length is the number's.
        let outcome = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVBUFFORCE,
                (&raw const room).cast(),
                size_of::<libc::c_int>() as u32,
            )
        };
        assert_eq!(outcome, 0, "{}", io::Error::last_os_error());
        ip("link set eth0 promisc on");
        Self { socket }
    }

    /// Who says within 50 ms that an address is theirs.
    pub fn ask(&self, address: &str) -> Vec<Mac> {
        self.ask_in(address, None)
    }

    /// The same in a network of the wire (VLAN).
    pub fn ask_in(&self, address: &str, vlan: Option<u16>) -> Vec<Mac> {
        let IpAddr::V4(target) = address.parse().unwrap() else {
            panic!("{address} is not IPv4");
        };
        self.frames(Duration::ZERO);
        let mut frame = [[0xff; 6], OWN].concat();
        if let Some(vlan) = vlan {
            frame.extend([0x81, 0]);
            frame.extend(vlan.to_be_bytes());
        }
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend(OWN);
        frame.extend(OWN_IP);
        frame.extend([0; 6]);
        frame.extend(target.octets());
        let fd = self.socket.as_raw_fd();
        // SAFETY: the descriptor is open, and the length is the frame's.
        let sent = unsafe { libc::send(fd, frame.as_ptr().cast(), frame.len(), 0) };
        assert!(sent > 0, "{}", io::Error::last_os_error());
        let answers = self.frames(Duration::from_millis(50)).into_iter();
        let answers = answers.filter(|(_, frame)| {
            frame[..6] == OWN && frame[20..22] == [0, 2] && frame[28..32] == target.octets()
        });
        answers
            .map(|(_, frame)| frame[22..28].try_into().unwrap())
            .collect()
    }

    /// What is announced unasked: when, by whom, of which address.
    pub fn listen(&self, length: Duration) -> Vec<(Duration, Mac, String)> {
        let frames = self.frames(length).into_iter();
        let announced = frames.filter(|(_, frame)| {
            frame[..6] == [0xff; 6] && frame[20..22] == [0, 1] && frame[28..32] == frame[38..42]
        });
        announced
            .map(|(when, frame)| {
                let address: [u8; 4] = frame[28..32].try_into().unwrap();
                let of = IpAddr::from(address).to_string();
                (when, frame[22..28].try_into().unwrap(), of)
            })
            .collect()
    }

    /// All frames of ARP that come within a time.
    fn frames(&self, length: Duration) -> Vec<(Duration, Vec<u8>)> {
        let began = Instant::now();
        let mut frames = Vec::new();
        loop {
            let mut frame = [0; 128];
            let fd = self.socket.as_raw_fd();
            // SAFETY: the descriptor is open, and the length is the buffer's.
            let got = unsafe { libc::recv(fd, frame.as_mut_ptr().cast(), frame.len(), 0) };
            if got >= 42 {
                frames.push((began.elapsed(), frame[..got as usize].to_vec()));
            } else if began.elapsed() >= length {
                return frames;
            } else if got < 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}
