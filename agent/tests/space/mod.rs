//! Network namespaces that end with the test, and what tc has there.
#![allow(dead_code, reason = "not every test needs all of it")]

use std::net::{Ipv4Addr, UdpSocket};
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use futures::TryStreamExt;
use nix::sched::{CloneFlags, unshare};
use rtnetlink::packet_route::tc::TcAttribute;
use xebec_agent::link;

/// How long a socket waits.
pub const TIME: Duration = Duration::from_millis(500);

type Work<'a> = Box<dyn FnOnce() + Send + 'a>;

/// A network namespace, held by a thread.
pub struct Space {
    thread: nix::unistd::Pid,
    work: Sender<Work<'static>>,
}

impl Space {
    /// A new one, with a thread in it.
    pub fn new() -> Self {
        let (work, orders) = channel::<Work<'static>>();
        let (tell, told) = channel();
        std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            tell.send(nix::unistd::gettid()).unwrap();
            for order in orders {
                order();
            }
        });
        Self {
            thread: told.recv().unwrap(),
            work,
        }
    }

    /// Where it can be opened.
    pub fn path(&self) -> PathBuf {
        let process = std::process::id();
        format!("/proc/{process}/task/{}/ns/net", self.thread).into()
    }

    /// Does something in it, and waits for it.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let (tell, told) = channel();
        let work: Work<'_> = Box::new(move || {
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            let _ = tell.send(outcome);
        });
        // SAFETY: only the lifetime changes, and what is borrowed outlives the work: this function does not return
        // before the work has told its outcome, which is the last that it does.
        let work: Work<'static> = unsafe { std::mem::transmute(work) };
        self.work.send(work).unwrap();
        match told.recv().unwrap() {
            Ok(outcome) => outcome,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// Runs `ip` in this thread's namespace.
pub fn ip(line: &str) {
    let output = Command::new("ip").args(line.split(' ')).output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {line}: {words}");
}

/// A socket that does not wait for ever.
pub fn socket(address: Ipv4Addr, port: u16) -> UdpSocket {
    let socket = UdpSocket::bind((address, port)).unwrap();
    socket.set_read_timeout(Some(TIME)).unwrap();
    // On a machine that stands still now and then, its reader may be late.
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &(8 << 20))
        .unwrap();
    socket
}

/// Runs what is asynchronous on this thread.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

/// How many filters a device has inward and outward.
pub fn filters(device: &str) -> [usize; 2] {
    let index = nix::net::if_::if_nametoindex(device).unwrap() as i32;
    block_on(async {
        let mut filters = link::handle().unwrap().traffic_filter(index);
        let (inward, outward) = (filters.get().ingress(), filters.get().egress());
        let inward: Vec<_> = inward.execute().try_collect().await.unwrap();
        let outward: Vec<_> = outward.execute().try_collect().await.unwrap();
        // Each priority has an entry of its own without a number.
        [inward, outward].map(|list| {
            let numbered = list.iter().filter(|one| u32::from(one.header.handle) != 0);
            numbered.count()
        })
    })
}

/// Whether it has a clsact qdisc.
pub fn has_qdisc(device: &str) -> bool {
    let index = nix::net::if_::if_nametoindex(device).unwrap() as i32;
    block_on(async {
        let mut handle = link::handle().unwrap().qdisc();
        let all: Vec<_> = handle.get().execute().try_collect().await.unwrap();
        all.iter().any(|qdisc| {
            let kind = TcAttribute::Kind("clsact".into());
            qdisc.header.index == index && qdisc.attributes.contains(&kind)
        })
    })
}
