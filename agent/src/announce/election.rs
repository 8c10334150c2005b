//! Which node holds a Lease: one candidate for one Lease.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tracing::{debug, info, warn};

use super::leases::{KIND, LABEL, Leases, NAMESPACE, Refused};

/// How an election goes.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// How long the others wait for a holder that is silent (15 s).
    pub lease: Duration,
    /// How often a holder renews, and how long before its lease ends it gives up if it could not (5 s).
    pub renew: Duration,
    /// When what failed is tried again (2 s).
    pub retry: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            lease: Duration::from_secs(15),
            renew: Duration::from_secs(5),
            retry: Duration::from_secs(2),
        }
    }
}

/// Candidates for a lease that is free wait for up to so long, each for its own time: so not one node gets all leases.
const SPREAD: Duration = Duration::from_millis(300);
/// A lease that is given up is written within this time, or runs out.
const FAREWELL: Duration = Duration::from_secs(2);

/// What is wanted of a candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// To hold the lease if nobody else does.
    Compete,
    /// To leave it to others.
    Abstain,
    /// To leave it to others, and end.
    Leave,
    /// To take the lease away if it is held, and end: nobody needs it any more.
    Remove,
}

/// What is known of a lease.
#[derive(Clone, Debug, Default)]
pub(super) enum Seen {
    /// Nothing yet.
    #[default]
    Unknown,
    /// There is none.
    Absent,
    /// It was seen to change to this at this time by this node's clock: clocks of others tell nothing.
    Lease(Box<Lease>, Instant),
}

impl Seen {
    /// A lease that was just seen; one that is the same as before was seen before.
    pub(super) fn now(&mut self, lease: Option<Lease>) -> bool {
        let Some(lease) = lease else {
            let news = !matches!(self, Self::Absent);
            *self = Self::Absent;
            return news;
        };
        if let Self::Lease(known, _) = self
            && known.metadata.resource_version == lease.metadata.resource_version
        {
            return false;
        }
        *self = Self::Lease(Box::new(lease), Instant::now());
        true
    }
}

/// A candidate for a lease.
pub(super) struct Candidate<L, H> {
    pub(super) leases: std::sync::Arc<L>,
    /// The lease's name.
    pub(super) name: String,
    /// The node's name.
    pub(super) node: String,
    pub(super) timing: Timing,
    pub(super) seen: watch::Sender<Seen>,
    pub(super) order: watch::Receiver<Order>,
    /// Is told when the lease is held, and when it is not any more, before others can know.
    pub(super) holds: H,
}

/// How the lease stands for a candidate.
enum Standing {
    /// It may be taken at once: it is ours already.
    Ours(Option<Box<Lease>>),
    /// It may be taken.
    Free(Option<Box<Lease>>),
    /// Another's until then, unless it is renewed.
    Taken(Instant),
    Unknown,
}

impl<L: Leases, H: Fn(bool)> Candidate<L, H> {
    /// Until it is ordered to end.
    pub(super) async fn run(mut self) {
        let mut seen = self.seen.subscribe();
        loop {
            let order = *self.order.borrow_and_update();
            match order {
                Order::Compete => {}
                Order::Abstain => {
                    if self.order.changed().await.is_err() {
                        return;
                    }
                    continue;
                }
                Order::Leave => return,
                Order::Remove => return self.clear().await,
            }
            let standing = self.standing(&seen.borrow_and_update());
            let work = async {
                match standing {
                    Standing::Unknown => {
                        self.look().await;
                        None
                    }
                    Standing::Taken(until) => {
                        tokio::select! {
                            _ = seen.changed() => {}
                            () = sleep_until(until) => {}
                        }
                        None
                    }
                    Standing::Free(lease) => {
                        // Somebody may be faster.
                        if timeout(self.delay(), seen.changed()).await.is_ok() {
                            return None;
                        }
                        self.take(lease).await
                    }
                    Standing::Ours(lease) => self.take(lease).await,
                }
            };
            let mut order = self.order.clone();
            let taken = tokio::select! {
                // What is being written may be written nevertheless; then it is seen as ours, or runs out.
                _ = order.changed() => None,
                taken = work => taken,
            };
            if let Some((lease, since)) = taken {
                info!("this node announces for the Lease {}", self.name);
                (self.holds)(true);
                self.hold(lease, since).await;
                info!("this node announces for the Lease {} no longer", self.name);
            }
        }
    }

    fn standing(&self, seen: &Seen) -> Standing {
        let (lease, at) = match seen {
            Seen::Unknown => return Standing::Unknown,
            Seen::Absent => return Standing::Free(None),
            Seen::Lease(lease, at) => (lease, *at),
        };
        let spec = lease.spec.as_ref();
        let holder = spec.and_then(|spec| spec.holder_identity.as_deref());
        let seconds = spec.and_then(|spec| spec.lease_duration_seconds);
        let given = seconds.and_then(|seconds| u64::try_from(seconds).ok());
        // One that is written by another hand with no end in sight does not block for longer than a day.
        let until = at
            + given
                .map_or(self.timing.lease, Duration::from_secs)
                .min(DAY);
        match holder {
            Some(holder) if holder == self.node => Standing::Ours(Some(lease.clone())),
            Some(holder) if !holder.is_empty() && until > Instant::now() => Standing::Taken(until),
            _ => Standing::Free(Some(lease.clone())),
        }
    }

    /// This node's time before it takes a free lease; the same each time.
    fn delay(&self) -> Duration {
        let mut hasher = DefaultHasher::new();
        (&self.node, &self.name).hash(&mut hasher);
        SPREAD * (hasher.finish() % 256) as u32 / 256
    }

    /// Asks how the lease is; without news, not soon again.
    async fn look(&self) {
        match self.leases.get(&self.name).await {
            Ok(lease) => {
                if self.seen.send_if_modified(|seen| seen.now(lease)) {
                    return;
                }
            }
            Err(error) => debug!("could not look at the Lease {}: {error:#}", self.name),
        }
        sleep(self.timing.retry).await;
    }

    /// Takes a lease away that nobody holds; its holder does it otherwise.
    async fn clear(&self) {
        let standing = self.standing(&self.seen.borrow());
        if let Standing::Free(Some(lease)) | Standing::Ours(Some(lease)) = standing {
            // Another candidate may be faster.
            let _ = timeout(FAREWELL, self.leases.delete(&lease)).await;
        }
    }

    /// Takes a lease that is free or ours, and tells since when it is held.
    async fn take(&self, known: Option<Box<Lease>>) -> Option<(Lease, Instant)> {
        let now = Instant::now();
        let written = match known {
            Some(lease) => self.leases.replace(self.ours(*lease)).await,
            None => self.leases.create(self.ours(Lease::default())).await,
        };
        match written {
            Ok(lease) => return Some((lease, now)),
            Err(Refused::Conflict) => self.look().await,
            Err(Refused::Failed(error)) => {
                warn!("could not take the Lease {}: {error:#}", self.name);
                sleep(self.timing.retry).await;
            }
        }
        None
    }

    /// The lease as this node's, from now.
    fn ours(&self, mut lease: Lease) -> Lease {
        let now = Some(MicroTime(Timestamp::now()));
        lease.metadata = ObjectMeta {
            name: Some(self.name.clone()),
            namespace: Some(NAMESPACE.into()),
            ..lease.metadata
        };
        let labels = lease.metadata.labels.get_or_insert_default();
        labels.insert(LABEL.into(), KIND.into());
        let before = lease.spec.take().unwrap_or_default();
        let kept = before.holder_identity.as_deref() == Some(&self.node);
        let first = before.lease_transitions.is_none();
        lease.spec = Some(LeaseSpec {
            holder_identity: Some(self.node.clone()),
            lease_duration_seconds: Some(self.timing.lease.as_secs().max(1) as i32),
            acquire_time: before.acquire_time.filter(|_| kept).or(now.clone()),
            renew_time: now,
            lease_transitions: Some(
                before.lease_transitions.unwrap_or(0) + i32::from(!kept && !first),
            ),
            ..LeaseSpec::default()
        });
        lease
    }

    /// Renews the lease until it is lost or given up, and tells that first; `since` is when it was last surely held.
    async fn hold(&mut self, mut lease: Lease, mut since: Instant) {
        let timing = self.timing;
        let mut next = since + timing.renew;
        loop {
            let end = since + timing.lease.saturating_sub(timing.renew);
            tokio::select! {
                changed = self.order.changed() => {
                    let order = *self.order.borrow();
                    if changed.is_ok() && order == Order::Compete {
                        continue;
                    }
                    (self.holds)(false);
                    if timeout(FAREWELL, self.give_up(lease, order)).await.is_err() {
                        debug!("the Lease {} is left to run out", self.name);
                    }
                    return;
                }
                () = sleep_until(next.min(end)) => {}
            }
            let now = Instant::now();
            if now >= end {
                (self.holds)(false);
                warn!("the Lease {} could not be renewed in time", self.name);
                return;
            }
            let renewed = self.leases.replace(self.ours(lease.clone()));
            match timeout_at(end, renewed).await {
                Ok(Ok(renewed)) => {
                    (lease, since, next) = (renewed, now, now + timing.renew);
                    continue;
                }
                Ok(Err(Refused::Conflict)) => {}
                Ok(Err(Refused::Failed(error))) => {
                    warn!("could not renew the Lease {}: {error:#}", self.name);
                    next = Instant::now() + timing.retry;
                    continue;
                }
                Err(_) => continue,
            }
            // Another hand wrote it: a label is no loss, another holder is.
            match timeout_at(end, self.leases.get(&self.name)).await {
                Ok(Ok(Some(told))) if self.is_ours(&told) => {
                    lease = told;
                    next = Instant::now();
                }
                Ok(Ok(told)) => {
                    (self.holds)(false);
                    self.seen.send_if_modified(|seen| seen.now(told));
                    return;
                }
                Ok(Err(_)) => next = Instant::now() + timing.retry,
                Err(_) => {}
            }
        }
    }

    fn is_ours(&self, lease: &Lease) -> bool {
        let spec = lease.spec.as_ref();
        spec.and_then(|spec| spec.holder_identity.as_deref()) == Some(&self.node)
    }

    /// Lets others have it at once.
    async fn give_up(&self, lease: Lease, order: Order) {
        let written = if order == Order::Remove {
            self.leases.delete(&lease).await
        } else {
            let mut lease = self.ours(lease);
            if let Some(spec) = &mut lease.spec {
                spec.holder_identity = None;
                spec.lease_duration_seconds = Some(1);
            }
            self.leases.replace(lease).await.map(|lease| {
                self.seen.send_if_modified(|seen| seen.now(Some(lease)));
            })
        };
        if let Err(Refused::Failed(error)) = written {
            debug!("could not give up the Lease {}: {error:#}", self.name);
        }
    }
}

const DAY: Duration = Duration::from_secs(86_400);
