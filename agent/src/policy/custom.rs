//! Policies that are custom resources: each kind is followed while the API has a definition of it.

use std::collections::BTreeSet;

use futures::StreamExt;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Api;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind};
use kube::core::PartialObjectMeta;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{Config, Error, Event, watcher};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tracing::warn;
use xebec_policy::rule::Source;

use super::listing::{Listing, Taken};

/// The kinds that need a definition.
pub(super) const KINDS: [Source; 6] = [
    Source::ClusterNetworkPolicy,
    Source::AdminNetworkPolicy,
    Source::BaselineAdminNetworkPolicy,
    Source::CiliumNetworkPolicy,
    Source::CiliumClusterwideNetworkPolicy,
    Source::CiliumCidrGroup,
];

/// How many changes wait for whoever takes them.
const WAITING: usize = 64;

/// What is told of a kind.
pub(super) enum Change {
    /// Of its objects.
    Event(Box<Event<DynamicObject>>),
    /// The API has no such objects.
    Absent,
}

/// All kinds, followed as long as this is there.
pub(super) struct Custom {
    changes: mpsc::Receiver<(Source, Change)>,
    _followers: JoinSet<()>,
}

/// What is known of the definitions.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Defined {
    /// Nothing yet.
    Unknown,
    /// These of the kinds are defined.
    Kinds(BTreeSet<Source>),
    /// That it can't be asked: each kind is tried.
    Hidden,
}

impl Defined {
    /// Whether a kind is worth a try, once that is known.
    fn has(&self, source: Source) -> Option<bool> {
        match self {
            Self::Unknown => None,
            Self::Kinds(kinds) => Some(kinds.contains(&source)),
            Self::Hidden => Some(true),
        }
    }
}

impl Custom {
    /// Follows them all.
    pub fn follow(client: &kube::Client) -> Self {
        let (tell, changes) = mpsc::channel(WAITING);
        let (defined, known) = watch::channel(Defined::Unknown);
        let mut followers = JoinSet::new();
        followers.spawn(definitions(client.clone(), defined));
        for source in KINDS {
            let kind = Kind {
                client: client.clone(),
                source,
                defined: known.clone(),
                tell: tell.clone(),
            };
            followers.spawn(async move {
                // It ends when nobody listens any more.
                let _ = kind.follow().await;
            });
        }
        Self {
            changes,
            _followers: followers,
        }
    }

    /// The next change; waits for ever where there will be none.
    pub async fn next(&mut self) -> (Source, Change) {
        match self.changes.recv().await {
            Some(change) => change,
            None => std::future::pending().await,
        }
    }

    /// The next change, if there is one now.
    pub fn try_next(&mut self) -> Option<(Source, Change)> {
        self.changes.try_recv().ok()
    }
}

/// The name of the definition of a kind.
fn definition(source: Source) -> String {
    let group = source.api_version().split('/').next().unwrap_or_default();
    format!("{}.{group}", source.plural())
}

/// The code by which the API refused.
fn refused(error: &Error) -> Option<u16> {
    match error {
        Error::InitialListFailed(kube::Error::Api(status))
        | Error::WatchStartFailed(kube::Error::Api(status)) => Some(status.code),
        _ => None,
    }
}

/// Tells of the definitions of these kinds.
async fn definitions(client: kube::Client, defined: watch::Sender<Defined>) {
    let api = Api::<PartialObjectMeta<CustomResourceDefinition>>::all(client);
    let mut events = watcher(api, Config::default()).default_backoff().boxed();
    let mut listing = Listing::<String>::default();
    let mut known = BTreeSet::<Source>::new();
    let of = |name: &str| KINDS.into_iter().find(|one| definition(*one) == name);
    while let Some(event) = events.next().await {
        let name = |one: &PartialObjectMeta<_>| one.metadata.name.clone();
        let event = match event {
            Ok(event) => event,
            // Without the right to read them, or without custom resources.
            Err(error) if matches!(refused(&error), Some(403 | 404)) && !listing.done => {
                let news = defined.send_if_modified(|before| {
                    let news = *before != Defined::Hidden;
                    *before = Defined::Hidden;
                    news
                });
                if news {
                    warn!(%error, "definitions of custom resources can't be read; policies of each kind are asked for");
                }
                continue;
            }
            Err(error) => {
                warn!(%error, "the watch of definitions of custom resources failed; trying again");
                continue;
            }
        };
        match listing.take(event, |one| name(one).unwrap_or_default()) {
            Taken::Set(one) => known.extend(name(&one).as_deref().and_then(of)),
            Taken::Gone(names) => {
                let gone: Vec<Source> = names.iter().filter_map(|name| of(name)).collect();
                known.retain(|one| !gone.contains(one));
            }
            Taken::Listed(names) => known = names.iter().filter_map(|name| of(name)).collect(),
            Taken::Nothing => {}
        }
        if listing.done {
            defined.send_if_modified(|before| {
                let now = Defined::Kinds(known.clone());
                let news = *before != now;
                *before = now;
                news
            });
        }
    }
}

/// One of the kinds.
struct Kind {
    client: kube::Client,
    source: Source,
    defined: watch::Receiver<Defined>,
    tell: mpsc::Sender<(Source, Change)>,
}

/// Nobody listens any more.
struct Ended;

impl Kind {
    async fn follow(mut self) -> Result<(), Ended> {
        loop {
            if !self.when(|has| has.is_some()).await? {
                self.tell(Change::Absent).await?;
                self.when(|has| has == Some(true)).await?;
            }
            self.watch().await?;
        }
    }

    /// Waits until what is known of the kind is like this; whether it is worth a try then.
    async fn when(&mut self, is: impl Fn(Option<bool>) -> bool) -> Result<bool, Ended> {
        let source = self.source;
        let now = self.defined.wait_for(|now| is(now.has(source))).await;
        now.map(|now| now.has(source) == Some(true))
            .map_err(|_| Ended)
    }

    async fn tell(&self, change: Change) -> Result<(), Ended> {
        let told = self.tell.send((self.source, change)).await;
        told.map_err(|_| Ended)
    }

    /// Tells of the objects until their definition is gone.
    async fn watch(&mut self) -> Result<(), Ended> {
        let (group, version) = self
            .source
            .api_version()
            .split_once('/')
            .unwrap_or_default();
        let kind = GroupVersionKind::gvk(group, version, self.source.kind());
        let resource = ApiResource::from_gvk_with_plural(&kind, self.source.plural());
        let api = Api::<DynamicObject>::all_with(self.client.clone(), &resource);
        let mut events = watcher(api, Config::default()).default_backoff().boxed();
        let (mut listed, mut told) = (false, false);
        loop {
            let event = tokio::select! {
                gone = self.when(|has| has == Some(false)) => return gone.map(drop),
                event = events.next() => event,
            };
            match event {
                Some(Ok(event)) => {
                    listed |= matches!(event, Event::InitDone);
                    self.tell(Change::Event(event.into())).await?;
                }
                // Not in this version, or not yet.
                Some(Err(error)) if refused(&error) == Some(404) && !listed => {
                    if !std::mem::replace(&mut told, true) {
                        self.tell(Change::Absent).await?;
                    }
                }
                // What was told stays in force.
                Some(Err(error)) => {
                    let kind = self.source.kind();
                    warn!(%error, kind, "a watch of policies failed; trying again (their rules stay as they are, and need the right to list and watch them)");
                }
                None => return Ok(()),
            }
        }
    }
}
