//! Announces LoadBalancer addresses on the node's network, by ARP and neighbour discovery, from one node at a time.

mod election;
mod frames;
pub mod leases;
mod speaker;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use futures::StreamExt;
use k8s_openapi::api::coordination::v1::Lease;
use kube::runtime::watcher::Event;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::warn;

use election::{Candidate, Order, Seen};
use leases::Leases;

pub use election::Timing;

/// A Service whose addresses one of the nodes announces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announced {
    /// Namespace and name.
    pub service: (String, String),
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Whether this node may: not if it would drop what comes (`externalTrafficPolicy: Local` without a ready endpoint
    /// here).
    pub eligible: bool,
}

/// Who announces where.
#[derive(Clone, Debug)]
pub struct Config {
    /// The node's name.
    pub node: String,
    /// Names of the devices.
    pub devices: Vec<String>,
    /// How the nodes elect one.
    pub timing: Timing,
}

/// Announces what this node is elected for until `shutdown`, then lets others have it. All nodes must be told of the
/// same Services, in any order.
pub async fn run<L: Leases>(
    leases: L,
    config: Config,
    mut wanted: watch::Receiver<Vec<Announced>>,
    shutdown: CancellationToken,
) -> Result<()> {
    let board = Arc::new(Board::default());
    let speakers = CancellationToken::new();
    // Whoever drops this, or its runtime, falls silent.
    let _silence = speakers.clone().drop_guard();
    for device in &config.devices {
        let held = board.held.subscribe();
        tokio::spawn(speaker::run(device.clone(), held, speakers.clone()));
    }
    let mut candidates = Candidates {
        leases: Arc::new(leases),
        config,
        board,
        known: Arc::default(),
        orders: BTreeMap::new(),
        tasks: JoinSet::new(),
        added: 0,
        watch: None,
    };
    loop {
        let mut told = wanted.borrow_and_update().clone();
        // Who has nowhere to speak leaves it to others.
        let speaks = !candidates.config.devices.is_empty();
        told.iter_mut().for_each(|one| one.eligible &= speaks);
        candidates.set(told);
        tokio::select! {
            () = shutdown.cancelled() => break,
            changed = wanted.changed() => if changed.is_err() { break },
        }
        while candidates.tasks.try_join_next().is_some() {}
    }
    candidates.end().await;
    Ok(())
}

/// What is known of the leases that this node is a candidate for.
type Known = Arc<Mutex<BTreeMap<String, watch::Sender<Seen>>>>;

/// Which leases are held, and so which addresses.
#[derive(Default)]
struct Board {
    state: Mutex<Holdings>,
    held: watch::Sender<BTreeSet<IpAddr>>,
}

#[derive(Default)]
struct Holdings {
    /// By name of the lease.
    addresses: BTreeMap<String, Vec<IpAddr>>,
    /// By which candidate: one that ends may still be there when the next for the same lease holds it.
    held: BTreeMap<String, u64>,
}

impl Board {
    fn change(&self, change: impl FnOnce(&mut Holdings)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        let state = &*state;
        let names = state.held.keys();
        let addresses = names.filter_map(|name| state.addresses.get(name)).flatten();
        let addresses: BTreeSet<IpAddr> = addresses.copied().collect();
        self.held.send_if_modified(|held| {
            let news = *held != addresses;
            *held = addresses;
            news
        });
    }
}

/// The candidates of this node, one for each Service.
struct Candidates<L> {
    leases: Arc<L>,
    config: Config,
    board: Arc<Board>,
    known: Known,
    orders: BTreeMap<String, watch::Sender<Order>>,
    tasks: JoinSet<()>,
    /// How many there ever were.
    added: u64,
    watch: Option<DropGuard>,
}

impl<L: Leases> Candidates<L> {
    fn set(&mut self, wanted: Vec<Announced>) {
        let wanted = named(wanted);
        self.board.change(|state| {
            // What this node may not announce it does not, whatever becomes of the lease.
            let addresses = wanted
                .iter()
                .filter(|(_, one)| one.eligible)
                .map(|(name, one)| (name.clone(), one.addresses.clone()));
            state.addresses = addresses.collect();
        });
        self.orders.retain(|name, order| {
            let stays = wanted.contains_key(name);
            if !stays {
                order.send_replace(Order::Remove);
                lock(&self.known).remove(name);
            }
            stays
        });
        for (name, one) in wanted {
            let order = if one.eligible {
                Order::Compete
            } else {
                Order::Abstain
            };
            match self.orders.get(&name) {
                Some(orders) => {
                    orders.send_if_modified(|known| std::mem::replace(known, order) != order);
                }
                None => self.add(name, order),
            }
        }
        // Without candidates nothing need be known.
        if self.orders.is_empty() {
            self.watch = None;
        }
    }

    fn add(&mut self, name: String, order: Order) {
        let (orders, order) = watch::channel(order);
        let seen = watch::Sender::new(Seen::Unknown);
        lock(&self.known).insert(name.clone(), seen.clone());
        self.orders.insert(name.clone(), orders);
        let (board, lease) = (self.board.clone(), name.clone());
        self.added += 1;
        let number = self.added;
        let candidate = Candidate {
            leases: self.leases.clone(),
            name,
            node: self.config.node.clone(),
            timing: self.config.timing,
            seen,
            order,
            holds: move |held| {
                board.change(|state| {
                    if held {
                        state.held.insert(lease.clone(), number);
                    } else if state.held.get(&lease) == Some(&number) {
                        state.held.remove(&lease);
                    }
                });
            },
        };
        self.tasks.spawn(candidate.run());
        if self.watch.is_none() {
            let stop = CancellationToken::new();
            let follow = follow(self.leases.clone(), self.known.clone());
            tokio::spawn(stop.clone().run_until_cancelled_owned(follow));
            self.watch = Some(stop.drop_guard());
        }
    }

    /// Lets others have what is held, as far as that can be told them soon.
    async fn end(mut self) {
        self.board.change(|state| state.addresses.clear());
        for order in self.orders.values() {
            order.send_replace(Order::Leave);
        }
        let all = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(Duration::from_secs(3), all)
            .await
            .is_err()
        {
            warn!("not all Leases could be given up; they run out");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The Services by the names of their leases. Where two would have the same (`a-b` in `c`, `b` in `c-a`), the second
/// has its namespace set off by a dot; all nodes find the same.
fn named(mut wanted: Vec<Announced>) -> BTreeMap<String, Announced> {
    wanted.sort_by(|one, other| one.service.cmp(&other.service));
    let mut named = BTreeMap::new();
    for one in wanted {
        let (namespace, name) = &one.service;
        let mut lease = format!("xebec-l2announce-{namespace}-{name}");
        if named.contains_key(&lease) {
            lease = format!("xebec-l2announce-{namespace}.{name}");
        }
        named.insert(lease, one);
    }
    named
}

/// Tells the candidates what happens to their leases.
async fn follow<L: Leases>(leases: Arc<L>, known: Known) {
    let tell = |name: &str, lease: Option<Lease>| {
        if let Some(seen) = lock(&known).get(name) {
            seen.send_if_modified(|seen| seen.now(lease));
        }
    };
    let name = |lease: &Lease| lease.metadata.name.clone().unwrap_or_default();
    let mut listed = BTreeSet::new();
    let mut events = leases.watch();
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => listed.clear(),
            Ok(Event::InitApply(lease)) => {
                listed.insert(name(&lease));
                tell(&name(&lease), Some(lease));
            }
            Ok(Event::InitDone) => {
                let gone: Vec<String> = lock(&known).keys().cloned().collect();
                for name in gone.iter().filter(|name| !listed.contains(*name)) {
                    tell(name, None);
                }
                listed.clear();
            }
            Ok(Event::Apply(lease)) => tell(&name(&lease), Some(lease)),
            Ok(Event::Delete(lease)) => tell(&name(&lease), None),
            Err(error) => warn!(%error, "the watch of Leases failed; trying again"),
        }
    }
}
