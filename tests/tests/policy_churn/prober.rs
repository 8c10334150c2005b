//! Who asks all the while: one that must always be answered, and one that must never be.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::libc;
use xebec_tests::place::{PATIENCE, Place, Protocol};

/// Between two questions.
const PAUSE: Duration = Duration::from_millis(10);
/// How long what must not be answered is waited for.
const SILENCE: Duration = Duration::from_millis(60);

/// Whether it must be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    Always,
    Never,
}

/// What became of all questions of one prober.
#[derive(Debug, Default)]
pub struct Counts {
    pub tries: usize,
    /// Connections whose first packet was sent again.
    pub resent: Vec<String>,
    pub slowest: Duration,
}

/// A thread that asks until it is stopped.
pub struct Prober {
    pub what: String,
    pub wanted: Wanted,
    thread: JoinHandle<Result<Counts>>,
}

impl Prober {
    pub fn start(
        place: &Place,
        protocol: Protocol,
        to: SocketAddr,
        wanted: Wanted,
        stop: &Arc<AtomicBool>,
    ) -> Self {
        let what = format!("{} to {protocol:?} {to}, {wanted:?}", place.name);
        let (place, stop) = (place.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            place.stay()?;
            let mut counts = Counts::default();
            while !stop.load(Ordering::Relaxed) {
                let outcome = match wanted {
                    Wanted::Always => always(protocol, to, &mut counts),
                    Wanted::Never => never(protocol, to),
                };
                outcome.with_context(|| format!("try {}", counts.tries))?;
                counts.tries += 1;
                std::thread::sleep(PAUSE);
            }
            Ok(counts)
        });
        Self {
            what,
            wanted,
            thread,
        }
    }

    /// Whether it has failed already.
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    pub fn end(self) -> Result<Counts> {
        let outcome = self.thread.join().map_err(|_| anyhow!("panicked"));
        outcome.and_then(|counts| counts).context(self.what)
    }
}

fn datagrams(to: SocketAddr) -> io::Result<UdpSocket> {
    let any = match to.is_ipv4() {
        true => SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0),
        false => SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0),
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(to)?;
    Ok(socket)
}

fn always(protocol: Protocol, to: SocketAddr, counts: &mut Counts) -> Result<()> {
    let begun = Instant::now();
    let mut buffer = [0; 256];
    let length = match protocol {
        Protocol::Tcp => {
            let mut stream = TcpStream::connect_timeout(&to, PATIENCE).context("no connection")?;
            if sent_again(&stream)? > 0 {
                let from = stream.local_addr()?;
                counts
                    .resent
                    .push(format!("{from} to {to}, {:?}", begun.elapsed()));
            }
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(b"?\n").context("could not ask")?;
            stream.read(&mut buffer).context("no answer")?
        }
        Protocol::Udp => {
            let socket = datagrams(to)?;
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.send(b"?").context("could not ask")?;
            socket.recv(&mut buffer).context("no answer")?
        }
    };
    anyhow::ensure!(length > 0, "closed without an answer");
    counts.slowest = counts.slowest.max(begun.elapsed());
    Ok(())
}

fn never(protocol: Protocol, to: SocketAddr) -> Result<()> {
    let outcome = match protocol {
        Protocol::Tcp => TcpStream::connect_timeout(&to, SILENCE).map(drop),
        Protocol::Udp => {
            let socket = datagrams(to)?;
            socket.set_read_timeout(Some(SILENCE))?;
            socket
                .send(b"?")
                .and_then(|_| socket.recv(&mut [0; 256]))
                .map(drop)
        }
    };
    match outcome {
        Ok(()) => bail!("was answered"),
        Err(error) if matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock) => Ok(()),
        Err(error) => Err(error).context("was told something"),
    }
}

/// How many segments of a connection were sent again (`tcpi_total_retrans`).
fn sent_again(stream: &TcpStream) -> io::Result<u32> {
    // SAFETY: numbers alone, for which zeros are values.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of_val(&info) as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, which `info` has.
    let outcome = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    nix::errno::Errno::result(outcome)?;
    Ok(info.tcpi_total_retrans)
}
