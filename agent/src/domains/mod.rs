//! Learning of domains: resolvers' answers to pods whose rules name domains are held by the programs; here they are read,
//! the rules learn the addresses, and then the pods get the answers.

mod answer;
mod frame;
mod kept;
mod sender;

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use aya::maps::{Array, MapData, RingBuf};
use bytemuck::must_cast;
use ipnet::IpNet;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Mutex, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use xebec_dataplane_common::dns::{Held, LONGEST, Listening, PORTS};
use xebec_policy::domains::Told;
use xebec_policy::engine::Engine;
use xebec_policy::kernel::PolicyKernel;

pub(crate) use answer::Answer;
use kept::Kept;
use sender::Sender;

/// How often the programs are told that somebody is here, and for how long they believe it.
const BEAT: Duration = Duration::from_millis(200);
const BELIEVED: Duration = Duration::from_secs(1);
/// The port of resolvers.
const PORT: u16 = 53;
/// Where the node's own resolvers are named.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Whose answers are believed besides those of nodes and the cluster's resolver, and for how long.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Address blocks of resolvers.
    pub resolvers: Vec<IpNet>,
    /// For how many seconds an address is believed at least, whatever its answer says.
    pub min_ttl: u32,
}

/// The maps by which answers come.
pub struct DomainMaps {
    answers: RingBuf<MapData>,
    listens: Listens,
}

impl DomainMaps {
    pub(crate) fn new(ebpf: &mut aya::Ebpf) -> Result<Self> {
        Ok(Self {
            answers: crate::maps::take(ebpf, "ANSWERS")?,
            listens: Listens(crate::maps::take(ebpf, "LISTENING")?),
        })
    }

    /// As [`Listens::to`].
    pub fn listen(&mut self, ports: &[u16], long: Duration) -> Result<()> {
        self.listens.to(ports, long)
    }

    /// The oldest answer that is held.
    pub fn take(&mut self) -> Option<Box<Held>> {
        next(&mut self.answers)
    }
}

/// The oldest answer in a ring.
fn next(ring: &mut RingBuf<MapData>) -> Option<Box<Held>> {
    loop {
        let item = ring.next()?;
        if item.len() == size_of::<Held>() {
            return Some(Box::new(bytemuck::pod_read_unaligned(&item)));
        }
    }
}

/// Tells the programs that somebody is here.
struct Listens(Array<MapData, [u8; size_of::<Listening>()]>);

impl Listens {
    /// From here on answers from these ports are held for a while; of no ports, none is.
    fn to(&mut self, ports: &[u16], long: Duration) -> Result<()> {
        let mut own = [ports.first().map_or(0, |port| port.to_be()); PORTS];
        for (place, port) in own.iter_mut().zip(ports) {
            *place = port.to_be();
        }
        let until = monotonic()?.saturating_add(long);
        let listening = Listening {
            until: u64::try_from(until.as_nanos()).unwrap_or(u64::MAX),
            ports: own,
        };
        self.0
            .set(
                0,
                must_cast::<_, [u8; size_of::<Listening>()]>(listening),
                0,
            )
            .context("could not tell the programs to hold resolvers' answers")
    }
}

/// The clock that programs read (`bpf_ktime_get_ns`).
fn monotonic() -> Result<Duration> {
    let clock = nix::time::ClockId::CLOCK_MONOTONIC;
    let now = nix::time::clock_gettime(clock).context("could not read the clock")?;
    Ok(Duration::from(now))
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// The resolvers that a resolv.conf(5) names, without those that only the node itself can reach.
fn of_node(text: &str) -> Vec<IpNet> {
    let lines = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let address = (words.next() == Some("nameserver")).then(|| words.next())??;
        let address = address.split('%').next()?;
        address.parse::<IpAddr>().ok()
    });
    lines
        .filter(|address| !address.is_loopback())
        .map(IpNet::from)
        .collect()
}

/// Who learns.
struct Learner<K> {
    engine: Arc<Mutex<Engine<K>>>,
    options: Options,
    kept: Kept,
    sender: Sender,
}

/// Has the engine know what resolvers answered before, and then all that they answer until `shutdown`, in a thread of
/// its own: pods wait for it.
pub(crate) async fn follow<K: PolicyKernel>(
    maps: DomainMaps,
    engine: Arc<Mutex<Engine<K>>>,
    mut options: Options,
    state_dir: &Path,
    shutdown: CancellationToken,
) -> Result<impl Future<Output = Result<()>> + use<K>> {
    options.resolvers.extend(of_node(
        &std::fs::read_to_string(RESOLV_CONF).unwrap_or_default(),
    ));
    let (kept, before) = Kept::open(state_dir)?;
    {
        let mut engine = engine.lock().await;
        for (name, told) in &before {
            engine.learn(name, told);
        }
    }
    let learner = Learner {
        engine,
        options,
        kept,
        sender: Sender::open()?,
    };
    let (ends, ended) = oneshot::channel();
    std::thread::Builder::new()
        .name("domains".to_owned())
        .spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .context("could not start a runtime for resolvers' answers");
            // Nobody waits any more when the agent stops.
            let _ = ends.send(runtime.and_then(|one| one.block_on(learner.run(maps, shutdown))));
        })
        .context("could not start a thread for resolvers' answers")?;
    Ok(async { ended.await.context("reading resolvers' answers panicked")? })
}

impl<K: PolicyKernel> Learner<K> {
    async fn run(mut self, maps: DomainMaps, shutdown: CancellationToken) -> Result<()> {
        let DomainMaps {
            answers,
            mut listens,
        } = maps;
        // SAFETY: the ring owns its map's descriptor, gives the same one always, and lives in the `AsyncFd`.
        let ring = unsafe { AsyncFd::register(answers) };
        let mut ring = ring.context("could not wait for resolvers' answers")?;
        let mut beat = tokio::time::interval(BEAT);
        let mut ports = vec![PORT];
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                _ = beat.tick() => {
                    if let Ok(engine) = self.engine.try_lock() {
                        ports.truncate(1);
                        ports.extend(engine.resolver_ports().iter().filter(|port| **port != PORT));
                        self.kept.tidy(engine.domains());
                    }
                    listens.to(&ports, BELIEVED)?;
                }
                ready = ring.readable_mut() => {
                    // What comes from here on wakes us again.
                    ready.context("could not wait for resolvers' answers")?.clear_ready();
                }
            }
            while let Some(held) = next(ring.get_mut()) {
                self.take(&held).await;
            }
        }
        listens.to(&[], Duration::ZERO)?;
        while let Some(held) = next(ring.get_mut()) {
            self.take(&held).await;
        }
        Ok(())
    }

    /// Learns of one answer, and sends it on.
    async fn take(&mut self, held: &Held) {
        let length = usize::from(held.length).min(LONGEST);
        let mut frame = held.frame[..length].to_vec();
        let payload = frame::finish(&mut frame);
        let answers = payload.map(|(protocol, range)| {
            let payload = frame.get(range).unwrap_or_default();
            Answer::all(protocol, payload)
        });
        for answer in answers.into_iter().flatten() {
            self.learn(held, answer).await;
        }
        if let Err(error) = self.sender.send(held.ifindex, &frame) {
            // The pod may be gone by now; if it is there, it asks again.
            warn!(
                error = format!("{error:#}"),
                "a resolver's answer did not reach its pod"
            );
        }
    }

    async fn learn(&mut self, held: &Held, answer: Answer) {
        let server = IpAddr::from(held.server);
        let mut engine = self.engine.lock().await;
        let near = held.here != 0 || engine.is_resolver(server);
        if !near
            && !self
                .options
                .resolvers
                .iter()
                .any(|block| block.contains(&server))
        {
            return;
        }
        let now = now();
        let told: Vec<Told> = answer
            .addresses
            .into_iter()
            .map(|(address, ttl)| Told {
                address,
                until: now + u64::from(ttl.max(self.options.min_ttl)),
            })
            .collect();
        engine.learn(&answer.name, &told);
        drop(engine);
        self.kept.add(&answer.name, &told);
    }
}

/// Reads addresses and address blocks.
pub fn resolvers(words: &[String]) -> Result<Vec<IpNet>> {
    words
        .iter()
        .map(|word| {
            let address = word.parse::<IpAddr>().map(IpNet::from);
            match address.or_else(|_| word.parse::<IpNet>()) {
                Ok(block) => Ok(block),
                Err(_) => bail!("{word:?} is neither an address nor an address block"),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nodes_resolvers_are_those_that_pods_can_reach() {
        let text = "# comment\nsearch a b\nnameserver 127.0.0.53\nnameserver 192.0.2.1\nnameserver fe80::1%eth0\nnameserver x\noptions nameserver 192.0.2.9\n";
        let found: Vec<String> = of_node(text).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["192.0.2.1/32", "fe80::1/128"]);
        let words = ["192.0.2.1", "10.0.0.0/8"].map(str::to_owned);
        assert_eq!(resolvers(&words).unwrap().len(), 2);
        let error = resolvers(&["dns".to_owned()]).unwrap_err();
        assert!(error.to_string().contains("\"dns\" is neither"), "{error}");
    }
}
