//! Kinds of pods and their identities.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hashbrown::HashMap;
use xebec_dataplane_common::policy::FIRST_POD_IDENTITY;

use crate::selector::Labels;

/// Everything that makes pods alike to policies.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Kind {
    /// Namespace.
    pub namespace: String,
    /// Service account.
    pub service_account: String,
    /// Labels that may matter.
    pub labels: Labels,
    /// Names of the containers' ports, each with protocol and number.
    pub ports: BTreeSet<(String, u8, u16)>,
}

impl Kind {
    /// FNV-1a over all of it, with separators that no label may hold.
    pub fn hash(&self) -> u32 {
        let mut hash = 0x811c_9dc5_u32;
        let mut eat = |text: &str| {
            for byte in text.bytes().chain([0]) {
                hash = (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
            }
        };
        eat(&self.namespace);
        eat(&self.service_account);
        for (key, value) in &self.labels {
            eat(key);
            eat(value);
        }
        for (name, protocol, port) in &self.ports {
            eat(name);
            eat(&format!("{protocol}/{port}"));
        }
        hash
    }
}

/// Labels that tell one pod of a controller from another.
const OWN_LABELS: [&str; 8] = [
    "apps.kubernetes.io/pod-index",
    "batch.kubernetes.io/controller-uid",
    "batch.kubernetes.io/job-completion-index",
    "controller-revision-hash",
    "controller-uid",
    "pod-template-generation",
    "pod-template-hash",
    "statefulset.kubernetes.io/pod-name",
];

/// Which labels kinds have. Others are left out, unless a policy asks for them: what is written here changes how many
/// kinds there are, and no verdict.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Relevant {
    /// Beginnings of the labels that kinds have; none for all.
    with: Vec<String>,
    /// Beginnings of those that they do not have.
    without: Vec<String>,
}

impl Relevant {
    /// Reads beginnings of labels, those that are left out with `!` before them, as Cilium's `--labels` has them: with the
    /// source `k8s:` or none.
    pub fn read<'a>(words: impl IntoIterator<Item = &'a str>) -> Result<Self, String> {
        let mut read = Self::default();
        for word in words {
            let (list, text) = match word.strip_prefix('!') {
                Some(rest) => (&mut read.without, rest),
                None => (&mut read.with, word),
            };
            let text = text.strip_prefix("k8s:").unwrap_or(text);
            // Dots of regular expressions.
            let text = text.replace("\\.", ".");
            let fits = |one: char| one.is_ascii_alphanumeric() || "-_./".contains(one);
            if text.is_empty() || !text.chars().all(fits) {
                return Err(format!(
                    "{word:?} is no beginning of a label; write one like app.kubernetes.io/, with ! before it to leave it out"
                ));
            }
            list.push(text);
        }
        Ok(read)
    }

    /// Whether kinds have a label by its key.
    pub fn has(&self, key: &str) -> bool {
        let begins = |all: &[String]| all.iter().any(|one| key.starts_with(one.as_str()));
        !OWN_LABELS.contains(&key)
            && !begins(&self.without)
            && (self.with.is_empty() || begins(&self.with))
    }
}

/// One kind of pods that are there.
#[derive(Debug)]
struct Row {
    kind: Arc<Kind>,
    pods: usize,
}

/// The kinds that are there. Only this node uses its identities, so nothing need be agreed with others.
#[derive(Debug)]
pub struct Kinds {
    by_identity: HashMap<u32, Row>,
    by_kind: HashMap<Arc<Kind>, u32>,
    by_namespace: BTreeMap<String, BTreeSet<u32>>,
    hash: fn(&Kind) -> u32,
}

impl Default for Kinds {
    fn default() -> Self {
        Self::with_hash(Kind::hash)
    }
}

impl Kinds {
    /// None yet, hashed like this.
    pub fn with_hash(hash: fn(&Kind) -> u32) -> Self {
        Self {
            by_identity: HashMap::new(),
            by_kind: HashMap::new(),
            by_namespace: BTreeMap::new(),
            hash,
        }
    }

    /// Counts a pod of this kind, and tells its identity and whether that is new: a hash of it, or the next free number
    /// where two have the same hash.
    pub fn add(&mut self, kind: Kind) -> (u32, bool) {
        if let Some(identity) = self.by_kind.get(&kind) {
            if let Some(row) = self.by_identity.get_mut(identity) {
                row.pods += 1;
            }
            return (*identity, false);
        }
        let mut identity = (self.hash)(&kind).max(FIRST_POD_IDENTITY);
        while self.by_identity.contains_key(&identity) {
            identity = identity.wrapping_add(1).max(FIRST_POD_IDENTITY);
        }
        let kind = Arc::new(kind);
        self.by_namespace
            .entry(kind.namespace.clone())
            .or_default()
            .insert(identity);
        self.by_kind.insert(kind.clone(), identity);
        self.by_identity.insert(identity, Row { kind, pods: 1 });
        (identity, true)
    }

    /// One pod less of it; whether that was the last one. The identity stays taken until [`forget`](Self::forget).
    pub fn remove(&mut self, identity: u32) -> bool {
        let Some(row) = self.by_identity.get_mut(&identity) else {
            return false;
        };
        row.pods = row.pods.saturating_sub(1);
        row.pods == 0
    }

    /// Frees the identity of a kind that has no pods, and gives its kind back; none where a pod of it has come since.
    pub fn forget(&mut self, identity: u32) -> Option<Arc<Kind>> {
        if self.pods(identity) > 0 {
            return None;
        }
        let row = self.by_identity.remove(&identity)?;
        self.by_kind.remove(&row.kind);
        if let Some(all) = self.by_namespace.get_mut(&row.kind.namespace) {
            all.remove(&identity);
            if all.is_empty() {
                self.by_namespace.remove(&row.kind.namespace);
            }
        }
        Some(row.kind)
    }

    /// What has an identity.
    pub fn get(&self, identity: u32) -> Option<&Arc<Kind>> {
        self.by_identity.get(&identity).map(|row| &row.kind)
    }

    /// How many pods have it.
    pub fn pods(&self, identity: u32) -> usize {
        self.by_identity.get(&identity).map_or(0, |row| row.pods)
    }

    /// The identities of a namespace's pods.
    pub fn of_namespace(&self, namespace: &str) -> impl Iterator<Item = u32> {
        self.by_namespace
            .get(namespace)
            .into_iter()
            .flatten()
            .copied()
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = (u32, &Arc<Kind>)> {
        self.by_identity
            .iter()
            .map(|(identity, row)| (*identity, &row.kind))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(app: &str) -> Kind {
        Kind {
            namespace: "shop".to_owned(),
            labels: [("app".to_owned(), app.to_owned())].into(),
            ..Kind::default()
        }
    }

    #[test]
    fn kinds_of_one_hash_have_identities_of_their_own() {
        let mut kinds = Kinds::with_hash(|_| u32::MAX);
        assert_eq!(kinds.add(kind("a")), (u32::MAX, true));
        // Past the end, and past what is reserved.
        assert_eq!(kinds.add(kind("b")), (FIRST_POD_IDENTITY, true));
        assert_eq!(kinds.add(kind("c")), (FIRST_POD_IDENTITY + 1, true));
        assert_eq!(kinds.add(kind("b")), (FIRST_POD_IDENTITY, false));
        assert!(!kinds.remove(FIRST_POD_IDENTITY));
        assert_eq!(kinds.forget(FIRST_POD_IDENTITY), None);
        assert!(kinds.remove(FIRST_POD_IDENTITY));
        // Its entries are still in the kernel: nobody else may have the number.
        assert_eq!(kinds.add(kind("d")), (FIRST_POD_IDENTITY + 2, true));
        let gone = kinds.forget(FIRST_POD_IDENTITY).unwrap();
        assert_eq!(*gone, kind("b"));
        assert_eq!(kinds.add(kind("e")), (FIRST_POD_IDENTITY, true));
        assert_eq!(kinds.of_namespace("shop").count(), 4);
    }

    #[test]
    fn labels_that_count_are_told_by_their_beginnings() {
        let keys = ["app", "app.kubernetes.io/name", "team", "pod-template-hash"];
        let kept = |words: &[&str]| {
            let read = Relevant::read(words.iter().copied()).unwrap();
            keys.map(|key| read.has(key))
        };
        assert_eq!(kept(&[]), [true, true, true, false]);
        assert_eq!(kept(&["k8s:app"]), [true, true, false, false]);
        assert_eq!(
            kept(&["!app\\.kubernetes\\.io/", "!k8s:team"]),
            [true, false, false, false]
        );
        assert_eq!(kept(&["app", "!app."]), [true, false, false, false]);
        for word in ["", "!", "any:app", "app.*", "a b"] {
            let error = Relevant::read([word]).unwrap_err();
            assert!(error.contains("is no beginning of a label"), "{error}");
        }
    }

    #[test]
    fn the_hash_tells_where_one_word_ends() {
        let of = |namespace: &str, account: &str| Kind {
            namespace: namespace.to_owned(),
            service_account: account.to_owned(),
            ..Kind::default()
        };
        assert_ne!(of("ab", "c").hash(), of("a", "bc").hash());
    }
}
