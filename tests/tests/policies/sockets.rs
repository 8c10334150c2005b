//! The sockets of a pod: one thread in its network namespace answers at its ports, and asks others.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc as answers;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpSocket, UdpSocket};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use xebec_policy_oracle::Protocol;
use xebec_tests::sctp::{self, Packet};

use super::PORTS;

/// The chunk that answers the first one of an association.
const INIT_ACK: u8 = 2;

/// Who is asked, and how.
#[derive(Clone, Copy, Debug)]
pub struct Question {
    pub protocol: Protocol,
    pub to: SocketAddr,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Heard {
    /// The answer of the pod with this number.
    Answer(u32),
    /// Nothing.
    Silence,
    /// Another word than an answer.
    Refusal(ErrorKind),
}

struct Job {
    questions: Vec<Question>,
    /// How long an answer may take; what has none by then was dropped.
    patience: Duration,
    asker: answers::Sender<Vec<Heard>>,
}

/// The thread. It ends when this is dropped, and all its sockets with it.
pub struct Talker {
    jobs: Option<mpsc::UnboundedSender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Talker {
    /// Starts one that answers with its number at all [`PORTS`].
    pub fn start(netns: PathBuf, addresses: [IpAddr; 2], number: u32) -> Result<Self> {
        let (jobs, mut wanted) = mpsc::unbounded_channel::<Job>();
        let (told, ready) = answers::channel();
        let thread = std::thread::spawn(move || {
            let open = || -> Result<_> {
                let netns = File::open(&netns)
                    .with_context(|| format!("could not open {}", netns.display()))?;
                // This thread alone is there, and whatever its runtime opens.
                nix::sched::setns(&netns, nix::sched::CloneFlags::CLONE_NEWNET)
                    .context("could not enter the network namespace")?;
                let mut runtime = tokio::runtime::Builder::new_current_thread();
                let runtime = runtime.enable_all().build()?;
                let sockets = runtime.block_on(async { Sockets::open(addresses, number) })?;
                Ok((runtime, sockets))
            };
            let (runtime, sockets) = match open() {
                Ok(opened) => opened,
                Err(error) => return drop(told.send(Err(error))),
            };
            let _ = told.send(Ok(()));
            runtime.block_on(async {
                while let Some(job) = wanted.recv().await {
                    let heard = sockets.ask(&job.questions, job.patience).await;
                    let _ = job.asker.send(heard);
                }
            });
        });
        ready.recv().context("the pod's thread ended")??;
        Ok(Self {
            jobs: Some(jobs),
            thread: Some(thread),
        })
    }

    /// Asks all of them at once, and waits for each as long as this; what was heard comes in their order.
    pub fn ask(
        &self,
        questions: Vec<Question>,
        patience: Duration,
    ) -> Result<answers::Receiver<Vec<Heard>>> {
        let (asker, heard) = answers::channel();
        let jobs = self.jobs.as_ref().context("the pod's thread has ended")?;
        let job = Job {
            questions,
            patience,
            asker,
        };
        jobs.send(job)
            .map_err(|_| anyhow!("the pod's thread has ended"))?;
        Ok(heard)
    }
}

impl Drop for Talker {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What is open in a pod.
struct Sockets {
    /// How many questions it has asked by each protocol.
    counts: [AtomicU32; 4],
    /// For associations that are asked for, by family.
    raw: [UdpSocket; 2],
    /// Ends with this.
    _servers: JoinSet<()>,
}

impl Sockets {
    fn open(addresses: [IpAddr; 2], number: u32) -> Result<Self> {
        let raw = |at: IpAddr| -> Result<UdpSocket> {
            let socket = sctp::raw(at).with_context(|| format!("no raw socket at {at}"))?;
            socket.set_nonblocking(true)?;
            Ok(UdpSocket::from_std(socket)?)
        };
        let mut servers = JoinSet::new();
        for port in PORTS {
            let at = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
            let what = || format!("could not listen at port {port}");
            let socket = TcpSocket::new_v6()?;
            socket.set_reuseaddr(true)?;
            socket.bind(at).with_context(what)?;
            servers.spawn(answer_connections(socket.listen(1024)?, number));
            let socket = std::net::UdpSocket::bind(at).with_context(what)?;
            socket.set_nonblocking(true)?;
            servers.spawn(answer_datagrams(UdpSocket::from_std(socket)?, number));
        }
        for at in addresses {
            servers.spawn(answer_associations(raw(at)?, at.is_ipv4(), number));
        }
        Ok(Self {
            counts: Default::default(),
            raw: [raw(addresses[0])?, raw(addresses[1])?],
            _servers: servers,
        })
    }

    /// A port that the pod did not ask from before, for a long while: nothing that is remembered of another flow is in the
    /// way of this one.
    fn fresh_port(&self, protocol: Protocol) -> u16 {
        const FIRST: u32 = 10_000;
        let number = self.counts[protocol as usize].fetch_add(1, Ordering::Relaxed);
        (FIRST + number % (u32::from(u16::MAX) - FIRST)) as u16
    }

    async fn ask(&self, questions: &[Question], patience: Duration) -> Vec<Heard> {
        let mut heard = vec![Heard::Silence; questions.len()];
        let mut all = JoinSet::new();
        let mut associations = [Vec::new(), Vec::new()];
        for (at, question) in questions.iter().enumerate() {
            let (to, from) = (question.to, self.fresh_port(question.protocol));
            match question.protocol {
                Protocol::Tcp => {
                    drop(all.spawn(async move { (at, within(patience, connect(from, to)).await) }))
                }
                Protocol::Udp => {
                    drop(all.spawn(async move { (at, within(patience, datagram(from, to)).await) }))
                }
                Protocol::Sctp => associations[usize::from(!to.is_ipv4())].push((at, from, to)),
                Protocol::Icmp => {}
            }
        }
        let [four, six] = &associations;
        let both = tokio::join!(
            associate(&self.raw[0], four, true, patience),
            associate(&self.raw[1], six, false, patience)
        );
        for (at, one) in both.0.into_iter().chain(both.1) {
            heard[at] = one;
        }
        while let Some(done) = all.join_next().await {
            if let Ok((at, outcome)) = done {
                heard[at] = outcome.unwrap_or_else(|error| Heard::Refusal(error.kind()));
            }
        }
        heard
    }
}

/// What a server says of itself.
fn named(text: &[u8]) -> io::Result<Heard> {
    let text = String::from_utf8_lossy(text);
    text.parse()
        .map(Heard::Answer)
        .map_err(|_| ErrorKind::InvalidData.into())
}

/// All addresses of a family.
fn any(v4: bool) -> IpAddr {
    match v4 {
        true => Ipv4Addr::UNSPECIFIED.into(),
        false => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// What is heard by then.
async fn within(
    patience: Duration,
    work: impl Future<Output = io::Result<Heard>>,
) -> io::Result<Heard> {
    timeout(patience, work).await.unwrap_or(Ok(Heard::Silence))
}

async fn connect(from: u16, to: SocketAddr) -> io::Result<Heard> {
    let socket = match to {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    }?;
    socket.bind((any(to.is_ipv4()), from).into())?;
    let mut stream = socket.connect(to).await?;
    // Nobody remembers the connection afterwards.
    stream.set_zero_linger()?;
    let mut text = Vec::new();
    stream.read_to_end(&mut text).await?;
    named(&text)
}

async fn datagram(from: u16, to: SocketAddr) -> io::Result<Heard> {
    let socket = UdpSocket::bind((any(to.is_ipv4()), from)).await?;
    socket.connect(to).await?;
    socket.send(b"?").await?;
    let mut text = [0; 16];
    let length = socket.recv(&mut text).await?;
    named(&text[..length])
}

/// Asks for associations, each with a tag of its own.
async fn associate(
    socket: &UdpSocket,
    questions: &[(usize, u16, SocketAddr)],
    v4: bool,
    patience: Duration,
) -> Vec<(usize, Heard)> {
    static TAGS: AtomicU32 = AtomicU32::new(1);
    let mut heard = Vec::new();
    let mut open = BTreeMap::new();
    let mut buffer = [0; 2048];
    // It has also got what others asked this pod.
    while socket.try_recv_from(&mut buffer).is_ok() {}
    for (at, from, to) in questions {
        let tag = TAGS.fetch_add(1, Ordering::Relaxed);
        let packet = Packet {
            source_port: *from,
            destination_port: to.port(),
            tag: 0,
            chunk: sctp::init(tag),
        };
        let sent = socket.send_to(&packet.bytes(), (to.ip(), 0)).await;
        match sent {
            Ok(_) => drop(open.insert(tag, (*at, *from, *to))),
            Err(error) => heard.push((*at, Heard::Refusal(error.kind()))),
        }
    }
    let listen = async {
        while !open.is_empty() {
            let Ok((length, from)) = socket.recv_from(&mut buffer).await else {
                continue;
            };
            let Ok(packet) = Packet::received(&buffer[..length], v4) else {
                continue;
            };
            let ours = |(_, port, to): &(usize, u16, SocketAddr)| {
                (from.ip(), packet.source_port, packet.destination_port)
                    == (to.ip(), to.port(), *port)
            };
            if packet.chunk.first() != Some(&INIT_ACK) || !open.get(&packet.tag).is_some_and(ours) {
                continue;
            }
            if let (Some((at, ..)), Some([a, b, c, d])) =
                (open.remove(&packet.tag), packet.chunk.get(4..8))
            {
                let number = u32::from_be_bytes([*a, *b, *c, *d]);
                heard.push((at, Heard::Answer(number)));
            }
        }
    };
    let _ = timeout(patience, listen).await;
    heard
}

async fn answer_connections(listener: TcpListener, number: u32) {
    let text = number.to_string();
    loop {
        if let Ok((stream, _)) = listener.accept().await {
            // There is room for it in any socket's buffer.
            let _ = stream.try_write(text.as_bytes());
        }
    }
}

async fn answer_datagrams(socket: UdpSocket, number: u32) {
    let text = number.to_string();
    loop {
        if let Ok((_, client)) = socket.recv_from(&mut [0; 16]).await {
            let _ = socket.send_to(text.as_bytes(), client).await;
        }
    }
}

async fn answer_associations(socket: UdpSocket, v4: bool, number: u32) {
    let mut buffer = [0; 2048];
    loop {
        let Ok((length, from)) = socket.recv_from(&mut buffer).await else {
            continue;
        };
        let Ok(packet) = Packet::received(&buffer[..length], v4) else {
            continue;
        };
        let (Some(1), Some([a, b, c, d])) = (packet.chunk.first(), packet.chunk.get(4..8)) else {
            continue;
        };
        if !PORTS.contains(&packet.destination_port) {
            continue;
        }
        let answer = Packet {
            source_port: packet.destination_port,
            destination_port: packet.source_port,
            tag: u32::from_be_bytes([*a, *b, *c, *d]),
            chunk: sctp::init_ack(number),
        };
        let _ = socket.send_to(&answer.bytes(), (from.ip(), 0)).await;
    }
}
