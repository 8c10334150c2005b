//! One watch of one kind, kept in memory and shared by all controllers.

use std::collections::BTreeMap;
use std::collections::HashSet;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use futures::TryStreamExt;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// Namespace (empty where there is none) and name of an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key {
    pub namespace: String,
    pub name: String,
}

impl Key {
    pub(crate) fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
    pub(crate) fn of<K: Resource>(object: &K) -> Self {
        Self {
            namespace: object.meta().namespace.clone().unwrap_or_default(),
            name: object.meta().name.clone().unwrap_or_default(),
        }
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.namespace.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

/// Called with the object before and after; at least one is there. It must be quick: it only fills queues.
type Handler<K> = Box<dyn Fn(Option<&Arc<K>>, Option<&Arc<K>>) + Send + Sync>;

/// All objects of one kind, as far as the watch has told.
pub(crate) struct Informer<K> {
    api: Api<K>,
    config: watcher::Config,
    cache: RwLock<Cache<K>>,
    handlers: Mutex<Vec<Handler<K>>>,
    synced: watch::Sender<bool>,
}

struct Cache<K> {
    objects: BTreeMap<Key, Arc<K>>,
    /// The newest resourceVersion that the watch itself brought.
    seen: u64,
}

/// An object's resourceVersion as a number; they can be compared within one kind (KEP-5504).
fn version<K: Resource>(object: &K) -> u64 {
    let version = object.meta().resource_version.as_deref();
    version
        .and_then(|version| version.parse().ok())
        .unwrap_or(0)
}

impl<K> Informer<K>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    pub(crate) fn new(api: Api<K>, config: watcher::Config) -> Self {
        Self {
            api,
            config,
            cache: RwLock::new(Cache {
                objects: BTreeMap::new(),
                seen: 0,
            }),
            handlers: Mutex::new(Vec::new()),
            synced: watch::Sender::new(false),
        }
    }

    /// Tells of each change from now on; to be called before `run`.
    pub(crate) fn on_change(
        &self,
        handler: impl Fn(Option<&Arc<K>>, Option<&Arc<K>>) + Send + Sync + 'static,
    ) {
        self.handlers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Box::new(handler));
    }

    pub(crate) fn get(&self, key: &Key) -> Option<Arc<K>> {
        self.read().objects.get(key).cloned()
    }

    /// All objects of a namespace, by name.
    pub(crate) fn in_namespace(&self, namespace: &str) -> Vec<Arc<K>> {
        self.read()
            .objects
            .range(Key::new(namespace, "")..)
            .take_while(|(key, _)| key.namespace == namespace)
            .map(|(_, object)| object.clone())
            .collect()
    }

    pub(crate) fn all(&self) -> Vec<Arc<K>> {
        self.read().objects.values().cloned().collect()
    }

    /// Returns once the first list is in the cache.
    pub(crate) async fn synced(&self) {
        // The sender lives as long as `self`: this can't fail.
        let _ = self.synced.subscribe().wait_for(|synced| *synced).await;
    }

    /// Takes the answer to a write of ours before the watch brings it, so that the next reconcile
    /// does not act on what was.
    pub(crate) fn note(&self, object: K) {
        self.set(object, false);
    }

    /// The object is gone, by a delete of ours.
    pub(crate) fn note_gone(&self, object: &K) {
        let key = Key::of(object);
        if self
            .get(&key)
            .is_some_and(|known| known.meta().uid == object.meta().uid)
        {
            self.remove(&key);
        }
    }

    /// Watches until `shutdown`.
    pub(crate) async fn run(&self, shutdown: CancellationToken) {
        let kind = std::any::type_name::<K>().rsplit("::").next().unwrap_or("");
        let stream = watcher(self.api.clone(), self.config.clone()).default_backoff();
        let mut stream = std::pin::pin!(stream);
        let mut listed = HashSet::new();
        loop {
            let event = tokio::select! {
                () = shutdown.cancelled() => return,
                event = stream.try_next() => event,
            };
            match event {
                Ok(Some(Event::Init)) => listed.clear(),
                Ok(Some(Event::InitApply(object))) => {
                    listed.insert(Key::of(&object));
                    self.set(object, true);
                }
                Ok(Some(Event::InitDone)) => {
                    let gone: Vec<Key> = {
                        let cache = self.read();
                        cache
                            .objects
                            .keys()
                            .filter(|key| !listed.contains(*key))
                            .cloned()
                            .collect()
                    };
                    listed = HashSet::new();
                    gone.iter().for_each(|key| self.remove(key));
                    self.synced.send_replace(true);
                }
                Ok(Some(Event::Apply(object))) => {
                    self.set(object, true);
                }
                Ok(Some(Event::Delete(object))) => {
                    let key = Key::of(&object);
                    if self.see_gone(&key, version(&object)) {
                        self.remove(&key);
                    }
                }
                Ok(None) => return,
                // The API server is an expected absence while it restarts.
                Err(watcher::Error::InitialListFailed(error)) => {
                    warn!(kind, %error, "could not list; trying again")
                }
                Err(error) => debug!(kind, %error, "the watch was interrupted; resuming"),
            }
        }
    }

    fn set(&self, mut object: K, watched: bool) {
        // Nobody here reads it, and it is often the larger half.
        object.meta_mut().managed_fields = None;
        let object = Arc::new(object);
        let version = version(object.as_ref());
        let old = {
            let mut cache = self.write();
            // What the watch has passed may be outdated, even deleted; what it brings may be older than
            // what a write of ours told.
            if watched {
                cache.seen = cache.seen.max(version);
            } else if version <= cache.seen {
                return;
            }
            let key = Key::of(object.as_ref());
            let known = cache
                .objects
                .get(&key)
                .map_or(0, |known| self::version(known.as_ref()));
            if version != 0 && version <= known {
                return;
            }
            cache.objects.insert(key, object.clone())
        };
        self.tell(old.as_ref(), Some(&object));
    }

    /// Whether what is known under this key is what was deleted at this version.
    fn see_gone(&self, key: &Key, at: u64) -> bool {
        let mut cache = self.write();
        cache.seen = cache.seen.max(at);
        cache
            .objects
            .get(key)
            .is_some_and(|known| version(known.as_ref()) <= at)
    }

    fn remove(&self, key: &Key) {
        let old = {
            let mut cache = self.write();
            cache.objects.remove(key)
        };
        if let Some(old) = old {
            self.tell(Some(&old), None);
        }
    }

    fn tell(&self, old: Option<&Arc<K>>, new: Option<&Arc<K>>) {
        let handlers = self.handlers.lock().unwrap_or_else(PoisonError::into_inner);
        handlers.iter().for_each(|handler| handler(old, new));
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Cache<K>> {
        self.cache.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Cache<K>> {
        self.cache.read().unwrap_or_else(PoisonError::into_inner)
    }
}
