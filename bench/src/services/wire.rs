//! The two ends of the traffic of `services`: transactions over TCP and UDP, each one timed.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::part;

/// Threads that answer TCP; each takes one connection at a time, so that none is started within a measurement.
const WORKERS: usize = 32;
/// An answer that takes longer is none.
const PATIENCE: Duration = Duration::from_secs(2);
/// A watch tries again after this: what was sent before there was a Service is lost.
const IMPATIENCE: Duration = Duration::from_millis(2);
/// How long one datagram waits for its answer, and its sender before the next one: it takes half a core from others, and
/// sees a change as exactly as this.
const SOON: Duration = Duration::from_micros(100);
/// How long a watch rests when a connection was refused at once, so that it takes no core from others.
const REST: Duration = Duration::from_micros(500);

/// What one transaction is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// A connection, one byte there and back, and the connection's end (netperf's TCP_CRR).
    Crr,
    /// One byte there and back over a connection that stays (netperf's TCP_RR).
    Rr,
    /// A socket, one datagram there and back, as resolvers do.
    Udp,
    /// Bytes one way over one connection; the rate is of bytes that arrived (netperf's TCP_STREAM).
    Stream,
}

/// Where to answer.
#[derive(Args)]
pub struct Serve {
    /// The port
    #[arg(long)]
    port: u16,
    /// The addresses
    addresses: Vec<Ipv4Addr>,
}

/// What to ask.
#[derive(Serialize, Deserialize)]
pub enum Order {
    /// As many transactions as the time allows, by so many askers at once.
    Measure {
        mode: Mode,
        address: SocketAddrV4,
        seconds: f64,
        askers: usize,
    },
    /// New connections until this backend, or any, answers one.
    Watch {
        address: SocketAddrV4,
        backend: Option<u8>,
        seconds: f64,
    },
    /// Datagrams from one socket until one is answered.
    Reach { address: SocketAddrV4, seconds: f64 },
}

/// What a measurement gave.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Measured {
    /// Transactions per second.
    pub rate: f64,
    /// Microseconds that half of them took at most.
    pub p50: f64,
    /// Microseconds that 99 of 100 took at most.
    pub p99: f64,
}

/// What a watch saw.
#[derive(Serialize, Deserialize)]
pub struct Seen {
    /// When the connection began that the backend answered, on [`part::now`]'s clock.
    pub begun: u64,
    /// When its answer was there.
    pub answered: u64,
    /// Connections before it that nobody answered.
    pub failed: u64,
}

/// What a client's first byte asks for: an answer to every byte.
const MANY: u8 = b'r';
/// One answer, then the server closes: TIME_WAIT stays on its side.
const ONCE: u8 = b'c';
/// No answer until the last byte has come.
const SINK: u8 = b's';
/// Bytes that are sent or taken at once.
const CHUNK: usize = 128 * 1024;

/// Answers on all addresses, every byte by the address's last.
pub fn serve(args: &Serve) -> Result<()> {
    let port = args.port;
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
        .with_context(|| format!("could not listen on port {port}"))?;
    // A socket for each address, so that answers bear the address that was asked.
    let sockets: Vec<UdpSocket> = args
        .addresses
        .iter()
        .map(|address| {
            UdpSocket::bind((*address, port))
                .with_context(|| format!("could not listen on {address}:{port}"))
        })
        .collect::<Result<_>>()?;
    part::say(&json!({"listening": true}))?;
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                for stream in listener.incoming().flatten() {
                    // A client that goes away ends its connection; that is no fault.
                    let _ = answer(stream);
                }
            });
        }
        for (socket, address) in sockets.iter().zip(&args.addresses) {
            scope.spawn(move || {
                let mut buffer = [0; 64];
                while let Ok((_, from)) = socket.recv_from(&mut buffer) {
                    // As above.
                    let _ = socket.send_to(&address.octets()[3..], from);
                }
            });
        }
    });
    Ok(())
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let name = match stream.local_addr()? {
        std::net::SocketAddr::V4(address) => address.ip().octets()[3],
        std::net::SocketAddr::V6(address) => address.ip().octets()[15],
    };
    let mut byte = [0; 1];
    stream.read_exact(&mut byte)?;
    if byte[0] == SINK {
        let mut chunk = vec![0; CHUNK];
        while stream.read(&mut chunk)? > 0 {}
        return stream.write_all(&[name]);
    }
    let once = byte[0] == ONCE;
    loop {
        stream.write_all(&[name])?;
        if once || stream.read(&mut byte)? == 0 {
            return Ok(());
        }
    }
}

/// Asks as it is told.
pub fn ask() -> Result<()> {
    part::obey(|order| match order {
        Order::Measure {
            mode,
            address,
            seconds,
            askers,
        } => Ok(json!(measure(mode, address, seconds, askers)?)),
        Order::Watch {
            address,
            backend,
            seconds,
        } => watch(address, backend, seconds),
        Order::Reach { address, seconds } => reach(address, seconds),
    })
}

fn connect(address: SocketAddrV4, patience: Duration) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address.into(), patience)
        .with_context(|| format!("could not connect to {address}"))?;
    stream
        .set_nodelay(true)
        .and_then(|()| stream.set_read_timeout(Some(PATIENCE)))
        .context("could not configure a socket")?;
    Ok(stream)
}

/// One connection with one answer; which backend gave it.
fn once(address: SocketAddrV4, patience: Duration) -> Result<u8> {
    let mut stream = connect(address, patience)?;
    let mut byte = [0; 1];
    stream
        .write_all(&[ONCE])
        .and_then(|()| stream.read_exact(&mut byte))
        .context("the connection broke")?;
    let rest = stream
        .read(&mut [0; 1])
        .context("the connection was not closed")?;
    ensure!(rest == 0, "the server answered more than it was asked");
    Ok(byte[0])
}

fn measure(mode: Mode, address: SocketAddrV4, seconds: f64, askers: usize) -> Result<Measured> {
    let length = Duration::from_secs_f64(seconds);
    if mode == Mode::Stream {
        return stream(address, length);
    }
    let started = Instant::now();
    let mut took = Vec::new();
    std::thread::scope(|scope| -> Result<()> {
        let threads: Vec<_> = (0..askers.max(1))
            .map(|_| scope.spawn(|| transact(mode, address, started, length)))
            .collect();
        for thread in threads {
            match thread.join() {
                Ok(one) => took.extend(one?),
                Err(_) => bail!("an asker panicked"),
            }
        }
        Ok(())
    })?;
    let elapsed = started.elapsed().as_secs_f64();
    ensure!(!took.is_empty(), "not one answer came");
    took.sort_unstable();
    let at = |part: f64| f64::from(took[((took.len() - 1) as f64 * part) as usize]) / 1000.0;
    Ok(Measured {
        rate: took.len() as f64 / elapsed,
        p50: at(0.5),
        p99: at(0.99),
    })
}

/// Sends for so long; what one chunk took is counted as a transaction.
fn stream(address: SocketAddrV4, length: Duration) -> Result<Measured> {
    let mut stream = connect(address, PATIENCE)?;
    let chunk = [SINK; CHUNK];
    let started = Instant::now();
    let (mut sent, mut took) = (0_u64, Vec::new());
    while started.elapsed() < length {
        let begun = Instant::now();
        stream.write_all(&chunk).context("the connection broke")?;
        sent += CHUNK as u64;
        took.push(begun.elapsed().as_secs_f64() * 1e6);
    }
    // The answer comes when all has arrived.
    stream
        .shutdown(std::net::Shutdown::Write)
        .and_then(|()| stream.read_exact(&mut [0; 1]))
        .context("the server did not take everything")?;
    Ok(Measured {
        rate: sent as f64 / started.elapsed().as_secs_f64(),
        p50: crate::tail::at(&took, 0.5),
        p99: crate::tail::at(&took, 0.99),
    })
}

/// Nanoseconds that each transaction took.
fn transact(
    mode: Mode,
    address: SocketAddrV4,
    started: Instant,
    length: Duration,
) -> Result<Vec<u32>> {
    let mut took = Vec::with_capacity(1 << 16);
    let mut stream = match mode {
        Mode::Rr => Some(connect(address, PATIENCE)?),
        Mode::Crr | Mode::Udp | Mode::Stream => None,
    };
    let mut byte = [0; 1];
    let mut begun = Instant::now();
    while started.elapsed() < length {
        match (&mut stream, mode) {
            (Some(stream), _) => stream
                .write_all(&[MANY])
                .and_then(|()| stream.read_exact(&mut byte))
                .context("the connection broke")?,
            (None, Mode::Udp) => {
                let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))
                    .context("could not open a socket")?;
                socket
                    .set_read_timeout(Some(PATIENCE))
                    .and_then(|()| socket.connect(address))
                    .and_then(|()| socket.send(&[MANY]))
                    .and_then(|_| socket.recv(&mut byte))
                    .with_context(|| format!("no datagram came back from {address}"))?;
            }
            (None, _) => {
                once(address, PATIENCE)?;
            }
        }
        let now = Instant::now();
        let nanos = now.duration_since(begun).as_nanos();
        took.push(u32::try_from(nanos).unwrap_or(u32::MAX));
        begun = now;
    }
    Ok(took)
}

/// A socket whose port none before had: rules let a flow that they know through, open or not.
fn fresh_socket() -> Result<UdpSocket> {
    static NEXT: AtomicU16 = AtomicU16::new(1_024);
    loop {
        let port = NEXT.fetch_add(1, Ordering::Relaxed);
        ensure!(port >= 1_024, "all ports were used");
        match UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)) {
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {}
            socket => return socket.context("could not open a socket"),
        }
    }
}

fn reach(address: SocketAddrV4, seconds: f64) -> Result<Value> {
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    let socket = fresh_socket()?;
    socket
        .connect(address)
        .and_then(|()| socket.set_nonblocking(true))
        .context("could not configure a socket")?;
    // The benchmark changes something once this is asking.
    part::say(&json!({"asking": true}))?;
    let mut failed = 0;
    while Instant::now() < end {
        let begun = part::now()?;
        let (sent, mut byte) = (Instant::now(), [0; 1]);
        // Rules may have the sender told that it is not allowed, and nobody may listen yet: both are no answer.
        if socket.send(&[MANY]).is_ok() {
            while sent.elapsed() < SOON {
                if socket.recv(&mut byte).is_ok() {
                    return Ok(json!(Seen {
                        begun,
                        answered: part::now()?,
                        failed
                    }));
                }
            }
        }
        failed += 1;
        std::thread::sleep(SOON);
    }
    bail!("{address} answered no datagram for {seconds} s")
}

fn watch(address: SocketAddrV4, backend: Option<u8>, seconds: f64) -> Result<Value> {
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    // The benchmark changes the backend once this is asking.
    part::say(&json!({"asking": true}))?;
    let mut failed = 0;
    while Instant::now() < end {
        let begun = part::now()?;
        match once(address, IMPATIENCE) {
            Ok(by) if backend.is_none_or(|backend| by == backend) => {
                return Ok(json!(Seen {
                    begun,
                    answered: part::now()?,
                    failed
                }));
            }
            Ok(_) => {}
            // As long as there is no such Service, or no backend of it.
            Err(_) => {
                failed += 1;
                std::thread::sleep(REST);
            }
        }
    }
    match backend {
        Some(backend) => {
            bail!("the backend {backend} of {address} answered no connection for {seconds} s")
        }
        None => bail!("{address} answered no connection for {seconds} s"),
    }
}
