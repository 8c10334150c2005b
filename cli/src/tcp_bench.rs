//! `xebec demo tcp-serve|tcp-bench`: the two ends of the network benchmarks, the same program in pods and on a bare veth.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

/// What is measured.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Mode {
    /// One byte there and back over one connection, transactions per second (netperf's TCP_RR)
    Rr,
    /// A connection per transaction, from its handshake to its end (netperf's TCP_CRR)
    Crr,
    /// Bytes one way over one connection, per second (netperf's TCP_STREAM)
    Stream,
}

/// Threads that answer; each takes one connection at a time, so that none is started within a measurement.
const WORKERS: usize = 16;

/// What a client's first byte asks for: an echo of every byte.
const ECHO: u8 = b'r';
/// One echo, then the server closes: TIME_WAIT stays on its side, and the client never runs out of ports.
const ECHO_ONCE: u8 = b'c';
/// Only reading.
const SINK: u8 = b's';

/// Serves as the first byte of each connection asks.
pub fn serve(listen: SocketAddr) -> Result<()> {
    let listener =
        TcpListener::bind(listen).with_context(|| format!("could not listen on {listen}"))?;
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                for stream in listener.incoming().flatten() {
                    // A client that goes away ends its connection; that is no fault.
                    let _ = answer(stream);
                }
            });
        }
    });
    Ok(())
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut byte = [0; 1];
    stream.read_exact(&mut byte)?;
    if byte[0] == SINK {
        let mut buffer = vec![0; 256 * 1024];
        while stream.read(&mut buffer)? > 0 {}
        return Ok(());
    }
    let once = byte[0] == ECHO_ONCE;
    loop {
        stream.write_all(&byte)?;
        if once || stream.read(&mut byte)? == 0 {
            return Ok(());
        }
    }
}

/// Runs for a while and prints one number: transactions, or bytes, per second.
pub fn run(address: SocketAddr, mode: Mode, seconds: f64) -> Result<()> {
    let started = Instant::now();
    let end = Duration::from_secs_f64(seconds);
    let connect = || -> Result<TcpStream> {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))
            .with_context(|| format!("could not connect to {address}"))?;
        stream
            .set_nodelay(true)
            .context("could not set TCP_NODELAY")?;
        Ok(stream)
    };
    let mut done = 0u64;
    let mut byte = [0; 1];
    match mode {
        Mode::Rr => {
            let mut stream = connect()?;
            while started.elapsed() < end {
                stream
                    .write_all(&[ECHO])
                    .and_then(|()| stream.read_exact(&mut byte))
                    .context("the connection broke")?;
                done += 1;
            }
        }
        Mode::Crr => {
            while started.elapsed() < end {
                let mut stream = connect()?;
                stream
                    .write_all(&[ECHO_ONCE])
                    .and_then(|()| stream.read_exact(&mut byte))
                    .context("the connection broke")?;
                let rest = stream
                    .read(&mut byte)
                    .context("the connection was not closed")?;
                ensure!(rest == 0, "the server answered more than it was asked");
                done += 1;
            }
        }
        Mode::Stream => {
            let mut stream = connect()?;
            stream.write_all(&[SINK]).context("the connection broke")?;
            let buffer = vec![0; 256 * 1024];
            while started.elapsed() < end {
                stream.write_all(&buffer).context("the connection broke")?;
                done += buffer.len() as u64;
            }
        }
    }
    println!("{:.1}", done as f64 / started.elapsed().as_secs_f64());
    Ok(())
}
