//! Who belongs together: pods by their labels, Services by what they select, slices by their Service.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError};

use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::ResourceExt;

use super::endpoint::selector;
use super::slices::SERVICE_NAME;
use crate::informer::Key;

/// A namespace with a label and its value. Two may look alike: who is found by one is looked at before he counts.
type Pair = u64;

fn pair(namespace: &str, name: &str, value: &str) -> Pair {
    let mut hasher = DefaultHasher::new();
    (namespace, name, value).hash(&mut hasher);
    hasher.finish()
}

fn pairs(pod: &Pod) -> impl Iterator<Item = Pair> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    pod.labels()
        .iter()
        .map(move |(name, value)| pair(namespace, name, value))
}

/// The one pair of its selector that a Service is found by: the longest value tells the most.
fn chosen(service: &Service) -> Option<Pair> {
    let namespace = service.metadata.namespace.as_deref().unwrap_or_default();
    let (name, value) = selector(service)?
        .iter()
        .max_by_key(|(_, value)| value.len())?;
    Some(pair(namespace, name, value))
}

/// The Service that a slice says it is of.
pub(super) fn service_of(slice: &EndpointSlice) -> Option<Key> {
    let service = slice.labels().get(SERVICE_NAME)?;
    let namespace = slice.metadata.namespace.as_deref().unwrap_or_default();
    Some(Key::new(namespace, service))
}

#[derive(Default)]
pub(super) struct Index {
    pods: HashMap<Pair, HashSet<Arc<str>>>,
    services: HashMap<Pair, HashSet<Key>>,
}

/// The slices of each Service, whoever made them.
#[derive(Default)]
pub(crate) struct SliceNames(Mutex<HashMap<Key, BTreeSet<String>>>);

impl SliceNames {
    /// A slice changed.
    pub(crate) fn change(&self, old: Option<&EndpointSlice>, new: Option<&EndpointSlice>) {
        let (before, after) = (old.and_then(service_of), new.and_then(service_of));
        if before == after {
            return;
        }
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(old), Some(service)) = (old, &before)
            && let Some(names) = all.get_mut(service)
        {
            names.remove(&old.name_any());
            if names.is_empty() {
                all.remove(service);
            }
        }
        if let (Some(new), Some(service)) = (new, after) {
            all.entry(service).or_default().insert(new.name_any());
        }
    }

    /// Names of the Service's slices.
    pub(crate) fn of(&self, service: &Key) -> Vec<String> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(service).into_iter().flatten().cloned().collect()
    }
}

fn remove<K, V>(map: &mut HashMap<K, HashSet<V>>, key: &K, value: &V)
where
    K: Eq + Hash,
    V: Eq + Hash,
{
    if let Some(set) = map.get_mut(key) {
        set.remove(value);
        if set.is_empty() {
            map.remove(key);
        }
    }
}

impl Index {
    /// A pod changed from `old` to what it is now.
    pub(super) fn pod(&mut self, old: Option<&Pod>, now: Option<&Pod>) {
        if let (Some(old), Some(now)) = (old, now)
            && old.labels() == now.labels()
        {
            return;
        }
        let name = |pod: &Pod| -> Arc<str> { pod.name_any().into() };
        if let Some(old) = old {
            let name = name(old);
            pairs(old).for_each(|pair| remove(&mut self.pods, &pair, &name));
        }
        if let Some(now) = now {
            let name = name(now);
            for pair in pairs(now) {
                self.pods.entry(pair).or_default().insert(name.clone());
            }
        }
    }

    /// A Service changed from `old` to what it is now.
    pub(super) fn service(&mut self, old: Option<&Service>, now: Option<&Service>) {
        let (before, after) = (old.and_then(chosen), now.and_then(chosen));
        if let (Some(old), Some(pair)) = (old, before)
            && before != after
        {
            remove(&mut self.services, &pair, &Key::of(old));
        }
        if let (Some(now), Some(pair)) = (now, after) {
            self.services.entry(pair).or_default().insert(Key::of(now));
        }
    }

    /// Services that may select the pod.
    pub(super) fn services_of(&self, pod: &Pod) -> Vec<Key> {
        let found = pairs(pod).filter_map(|pair| self.services.get(&pair));
        found.flatten().cloned().collect()
    }

    /// Names of pods that the Service may select.
    pub(super) fn pods_of(&self, service: &Service) -> Vec<Arc<str>> {
        let found = chosen(service).and_then(|pair| self.pods.get(&pair));
        let mut found: Vec<_> = found.into_iter().flatten().cloned().collect();
        found.sort_unstable();
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn all_find_each_other_and_nobody_who_is_gone() {
        let service: Service =
            serde_json::from_value(json!({"metadata": {"name": "web", "namespace": "a"},
            "spec": {"selector": {"app": "web", "tier": "front"}}}))
            .unwrap();
        let pod = |name: &str, labels: serde_json::Value| -> Pod {
            let metadata = json!({"name": name, "namespace": "a", "labels": labels});
            serde_json::from_value(json!({"metadata": metadata})).unwrap()
        };
        let (one, other) = (
            pod("p", json!({"app": "web", "tier": "front"})),
            pod("p", json!({"app": "web", "tier": "back"})),
        );
        let mut index = Index::default();
        index.service(None, Some(&service));
        index.pod(None, Some(&one));
        assert_eq!(index.services_of(&one), [Key::new("a", "web")]);
        assert_eq!(index.pods_of(&service).len(), 1);
        index.pod(Some(&one), Some(&other));
        assert!(index.pods_of(&service).is_empty() && index.services_of(&other).is_empty());
        index.pod(Some(&other), None);
        index.service(Some(&service), None);
        assert!(index.pods.is_empty() && index.services.is_empty());

        let slice: EndpointSlice =
            serde_json::from_value(json!({"addressType": "IPv4", "endpoints": [],
            "metadata": {"name": "web-1", "namespace": "a", "labels": {SERVICE_NAME: "web"}}}))
            .unwrap();
        let names = SliceNames::default();
        names.change(None, Some(&slice));
        assert_eq!(names.of(&Key::new("a", "web")), ["web-1"]);
        names.change(Some(&slice), None);
        assert!(names.of(&Key::new("a", "web")).is_empty());
    }
}
