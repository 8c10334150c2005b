//! The part that is many pods and the one that asks them: network namespaces with sockets in them, and no processes. A
//! packet to a pod of the same node is in its socket when the call that sends it returns, or a moment later, so one
//! thread can ask hundreds of pods one after the other.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::services::part;

/// The ports that pods listen on; one of them is open to the pod that asks.
pub const PORTS: [u16; 2] = [7_001, 7_002];
/// A packet that is not there by then is dropped.
const SOON: Duration = Duration::from_micros(100);
/// Between two packets to a pod that is not reached, so that others get this core.
const REST: Duration = Duration::from_micros(50);

#[derive(clap::Args)]
pub struct Args {
    /// How many pods, besides the one that asks
    #[arg(long)]
    count: usize,
}

/// What to ask.
#[derive(Serialize, Deserialize)]
pub enum Order {
    /// Where the pods are.
    Pods { addresses: Vec<Ipv4Addr> },
    /// Until each pod is reached over the one port, then until none is over the other.
    Watch {
        /// Index of the port that opens.
        open: usize,
        seconds: f64,
    },
}

/// What a watch saw, on [`part::now`]'s clock.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Seen {
    /// When the first pod was reached.
    pub first: u64,
    /// When the last one was.
    pub opened: u64,
    /// When the last one was not reached any more over the port that closed.
    pub closed: u64,
}

/// A pod that listens.
struct Pod {
    address: Ipv4Addr,
    sockets: [UdpSocket; 2],
}

/// The one that asks, and the others.
struct Pods {
    asker: UdpSocket,
    all: Vec<Pod>,
    number: u64,
}

/// Makes the namespaces, says where they are, and obeys.
pub fn run(args: &Args) -> Result<()> {
    // Kept until the end: a namespace is there as long as somebody has it open.
    let mut spaces = Vec::new();
    let mut space = || -> Result<()> {
        unshare(CloneFlags::CLONE_NEWNET).context("could not make a network namespace")?;
        let file = File::open("/proc/self/ns/net").context("could not open a namespace")?;
        spaces.push(file);
        Ok(())
    };
    space()?;
    let mut pods = Pods {
        asker: listen(0)?,
        all: Vec::new(),
        number: 0,
    };
    for _ in 0..args.count {
        space()?;
        pods.all.push(Pod {
            address: Ipv4Addr::UNSPECIFIED,
            sockets: [listen(PORTS[0])?, listen(PORTS[1])?],
        });
    }
    let paths: Vec<PathBuf> = spaces
        .iter()
        .map(|file| format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into())
        .collect();
    part::say(&paths)?;
    part::obey(|order| match order {
        Order::Pods { addresses } => {
            ensure!(addresses.len() == pods.all.len(), "there are other pods");
            for (pod, address) in pods.all.iter_mut().zip(addresses) {
                pod.address = address;
            }
            Ok(json!(pods.all.len()))
        }
        Order::Watch { open, seconds } => pods.watch(open, seconds),
    })
}

/// A socket in the namespace that this thread is in.
fn listen(port: u16) -> Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))
        .with_context(|| format!("could not listen on port {port}"))?;
    socket
        .set_nonblocking(true)
        .context("could not configure a socket")?;
    Ok(socket)
}

impl Pods {
    fn watch(&mut self, open: usize, seconds: f64) -> Result<Value> {
        ensure!(open < PORTS.len() && !self.all.is_empty(), "nobody to ask");
        ensure!(
            self.reached(0, open)?.is_none(),
            "a pod is reached before anything has changed"
        );
        // The benchmark changes the policy once this is asking.
        part::say(&json!({"asking": true}))?;
        let end = Instant::now() + Duration::from_secs_f64(seconds);
        let mut seen = Seen {
            first: 0,
            opened: 0,
            closed: 0,
        };
        for at in 0..self.all.len() {
            loop {
                if let Some(when) = self.reached(at, open)? {
                    seen.opened = when;
                    break;
                }
                ensure!(
                    Instant::now() < end,
                    "{} was not reached for {seconds} s",
                    self.all[at].address
                );
                std::thread::sleep(REST);
            }
            if at == 0 {
                seen.first = seen.opened;
            }
        }
        let mut reached: Vec<usize> = (0..self.all.len()).collect();
        while !reached.is_empty() {
            ensure!(
                Instant::now() < end,
                "{} was reached for {seconds} s",
                self.all[reached[0]].address
            );
            reached = self.still(&reached, 1 - open, &mut seen.closed)?;
        }
        Ok(json!(seen))
    }

    /// Those of these pods that a packet reached, which all are sent before any is waited for; when the last one that did
    /// not reach its pod was sent.
    fn still(&mut self, pods: &[usize], port: usize, closed: &mut u64) -> Result<Vec<usize>> {
        self.number += 1;
        let number = self.number.to_ne_bytes();
        let mut sent = Vec::with_capacity(pods.len());
        for &at in pods {
            let address = SocketAddrV4::new(self.all[at].address, PORTS[port]);
            sent.push(part::now()?);
            // What fails is not there.
            let _ = self.asker.send_to(&number, address);
        }
        std::thread::sleep(SOON);
        let mut reached = Vec::new();
        for (&at, sent) in pods.iter().zip(sent) {
            let mut bytes = [0; 8];
            let mut arrived = false;
            while self.all[at].sockets[port].recv(&mut bytes).is_ok() {
                arrived |= bytes == number;
            }
            if arrived {
                reached.push(at);
            } else {
                *closed = (*closed).max(sent);
            }
        }
        Ok(reached)
    }

    /// When a packet to a pod had arrived, if it did.
    fn reached(&mut self, at: usize, port: usize) -> Result<Option<u64>> {
        let pod = &self.all[at];
        self.number += 1;
        let number = self.number.to_ne_bytes();
        let sent = Instant::now();
        // What fails is not there.
        let _ = self
            .asker
            .send_to(&number, SocketAddrV4::new(pod.address, PORTS[port]));
        loop {
            let mut bytes = [0; 8];
            match pod.sockets[port].recv(&mut bytes) {
                Ok(_) if bytes == number => return Ok(Some(part::now()?)),
                // One that was given up.
                Ok(_) => {}
                Err(_) if sent.elapsed() > SOON => return Ok(None),
                Err(_) => std::hint::spin_loop(),
            }
        }
    }
}
