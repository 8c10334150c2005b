//! A plain table of Leases, with the API server's rules for writing, and nodes that can be cut off from it.
#![allow(
    clippy::unwrap_used,
    dead_code,
    reason = "tests, each of which uses a part"
)]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Error, anyhow};
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use kube::runtime::watcher::Event;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;
use xebec_agent::announce::leases::{Leases, Refused};
use xebec_agent::announce::{Announced, Config, Timing, run};

/// The leases.
pub struct Table {
    state: Mutex<(u64, BTreeMap<String, Lease>)>,
    events: broadcast::Sender<(bool, Lease)>,
}

impl Table {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            events: broadcast::Sender::new(1024),
        })
    }

    /// What a lease says.
    pub fn spec(&self, name: &str) -> Option<LeaseSpec> {
        self.lease(name).and_then(|lease| lease.spec)
    }

    pub fn lease(&self, name: &str) -> Option<Lease> {
        self.state.lock().unwrap().1.get(name).cloned()
    }

    pub fn names(&self) -> Vec<String> {
        self.state.lock().unwrap().1.keys().cloned().collect()
    }

    /// Who holds it.
    pub fn holder(&self, name: &str) -> Option<String> {
        self.spec(name).and_then(|spec| spec.holder_identity)
    }

    /// Waits until a node holds it that passes.
    pub fn wait(
        &self,
        name: &str,
        within: Duration,
        passes: impl Fn(Option<&str>) -> bool,
    ) -> String {
        let began = Instant::now();
        loop {
            let holder = self.holder(name);
            if passes(holder.as_deref()) {
                return holder.unwrap_or_default();
            }
            assert!(began.elapsed() < within, "{name}: {holder:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn write(&self, mut lease: Lease, fresh: bool) -> Result<Lease, Refused> {
        assert_eq!(lease.metadata.namespace.as_deref(), Some("kube-system"));
        let name = lease.metadata.name.clone().unwrap();
        let mut state = self.state.lock().unwrap();
        let (version, leases) = &mut *state;
        let known = leases.get(&name);
        let version_known = known.and_then(|known| known.metadata.resource_version.clone());
        if fresh == known.is_some() || (!fresh && lease.metadata.resource_version != version_known)
        {
            return Err(Refused::Conflict);
        }
        *version += 1;
        lease.metadata.resource_version = Some(version.to_string());
        leases.insert(name, lease.clone());
        let _ = self.events.send((true, lease.clone()));
        Ok(lease)
    }

    /// As an operator may, without asking.
    pub fn remove(&self, name: &str) {
        let lease = self.state.lock().unwrap().1.remove(name);
        let _ = self.events.send((false, lease.unwrap()));
    }
}

/// A node's way to the table.
#[derive(Clone)]
pub struct Way {
    pub table: Arc<Table>,
    pub cut: Arc<AtomicBool>,
}

impl Way {
    pub fn to(table: &Arc<Table>) -> Self {
        Self {
            table: table.clone(),
            cut: Arc::default(),
        }
    }

    fn open(&self) -> Result<(), Error> {
        match self.cut.load(Ordering::Relaxed) {
            true => Err(anyhow!("the node is cut off")),
            false => Ok(()),
        }
    }
}

impl Leases for Way {
    async fn get(&self, name: &str) -> Result<Option<Lease>, Error> {
        self.open().map(|()| self.table.lease(name))
    }

    async fn create(&self, lease: Lease) -> Result<Lease, Refused> {
        self.open().map_err(Refused::Failed)?;
        self.table.write(lease, true)
    }

    async fn replace(&self, lease: Lease) -> Result<Lease, Refused> {
        self.open().map_err(Refused::Failed)?;
        self.table.write(lease, false)
    }

    async fn delete(&self, lease: &Lease) -> Result<(), Refused> {
        self.open().map_err(Refused::Failed)?;
        let name = lease.metadata.name.clone().unwrap();
        let known = self.table.lease(&name);
        if known.and_then(|known| known.metadata.resource_version)
            != lease.metadata.resource_version
        {
            return Err(Refused::Conflict);
        }
        self.table.remove(&name);
        Ok(())
    }

    fn watch(&self) -> BoxStream<'static, Result<Event<Lease>, Error>> {
        let events = self.table.events.subscribe();
        let known: Vec<Lease> = self
            .table
            .state
            .lock()
            .unwrap()
            .1
            .values()
            .cloned()
            .collect();
        let first = [Event::Init]
            .into_iter()
            .chain(known.into_iter().map(Event::InitApply));
        let first = first.chain([Event::InitDone]);
        let way = self.clone();
        let rest = stream::unfold((events, way), |(mut events, way)| async move {
            loop {
                let (there, lease) = events.recv().await.ok()?;
                // What happens meanwhile is not heard of.
                if way.open().is_ok() {
                    let event = if there {
                        Event::Apply(lease)
                    } else {
                        Event::Delete(lease)
                    };
                    return Some((event, (events, way)));
                }
            }
        });
        stream::iter(first).chain(rest).map(Ok).boxed()
    }
}

/// Times that let a test end soon.
pub const SOON: Timing = Timing {
    lease: Duration::from_secs(2),
    renew: Duration::from_millis(500),
    retry: Duration::from_millis(200),
};

/// An announcer of a node, on a thread and a runtime of its own as if it were a process.
pub struct Announcer {
    pub node: String,
    pub way: Way,
    pub wanted: tokio::sync::watch::Sender<Vec<Announced>>,
    stop: CancellationToken,
    kill: CancellationToken,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Announcer {
    /// `enter` goes where the node is.
    pub fn start(
        config: Config,
        way: Way,
        wanted: Vec<Announced>,
        enter: impl FnOnce() + Send + 'static,
    ) -> Self {
        let (wanted, told) = tokio::sync::watch::channel(wanted);
        let (stop, kill) = (CancellationToken::new(), CancellationToken::new());
        let node = config.node.clone();
        let (stopped, killed, leases) = (stop.clone(), kill.clone(), way.clone());
        let thread = std::thread::spawn(move || {
            enter();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            let run = run(leases, config, told, stopped);
            runtime.block_on(killed.run_until_cancelled(run));
        });
        Self {
            node,
            way,
            wanted,
            stop,
            kill,
            thread: Some(thread),
        }
    }

    /// Ends it as it should be.
    pub fn stop(mut self) {
        self.stop.cancel();
        self.thread.take().unwrap().join().unwrap();
    }

    /// Ends it in the middle of whatever it does.
    pub fn kill(mut self) {
        self.kill.cancel();
        self.thread.take().unwrap().join().unwrap();
    }
}

impl Drop for Announcer {
    fn drop(&mut self) {
        self.kill.cancel();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A Service with these addresses.
pub fn service(namespace: &str, name: &str, addresses: &[&str], eligible: bool) -> Announced {
    Announced {
        service: (namespace.into(), name.into()),
        addresses: addresses.iter().map(|one| one.parse().unwrap()).collect(),
        eligible,
    }
}
