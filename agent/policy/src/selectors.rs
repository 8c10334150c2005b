//! Whom selectors select, kept in step with the pods that there are.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hashbrown::{HashMap, HashSet};

use crate::kind::{Kind, Kinds};
use crate::selector::{Labels, Selector};

/// One selector.
#[derive(Debug, Default)]
struct Row {
    matching: BTreeSet<u32>,
    /// The sets that have entries for whom it selects.
    sets: HashSet<u32>,
    /// How often rules use it.
    uses: usize,
}

/// All selectors of peers that rules have.
#[derive(Debug, Default)]
pub struct Selectors {
    rows: HashMap<Arc<Selector>, Row>,
    /// Those that select pods of one namespace alone.
    by_namespace: BTreeMap<String, HashSet<Arc<Selector>>>,
    /// The others.
    wide: HashSet<Arc<Selector>>,
}

impl Selectors {
    /// Counts a use of a selector.
    pub fn add(
        &mut self,
        selector: &Arc<Selector>,
        kinds: &Kinds,
        namespaces: &BTreeMap<String, Labels>,
    ) {
        if let Some(row) = self.rows.get_mut(selector) {
            row.uses += 1;
            return;
        }
        let selects = |identity: &u32| {
            let kind = kinds.get(*identity);
            kind.is_some_and(|kind| selector.selects(kind, namespaces.get(&kind.namespace)))
        };
        let matching = match selector.namespace() {
            Some(namespace) => {
                let all = self.by_namespace.entry(namespace.to_owned()).or_default();
                all.insert(selector.clone());
                kinds.of_namespace(namespace).filter(selects).collect()
            }
            None => {
                self.wide.insert(selector.clone());
                let all = kinds.all().map(|(identity, _)| identity);
                all.filter(selects).collect()
            }
        };
        let row = Row {
            matching,
            uses: 1,
            ..Row::default()
        };
        self.rows.insert(selector.clone(), row);
    }

    /// One use less.
    pub fn remove(&mut self, selector: &Arc<Selector>) {
        let Some(row) = self.rows.get_mut(selector) else {
            return;
        };
        row.uses -= 1;
        if row.uses > 0 {
            return;
        }
        self.rows.remove(selector);
        self.wide.remove(selector);
        if let Some(namespace) = selector.namespace() {
            if let Some(all) = self.by_namespace.get_mut(namespace) {
                all.remove(selector);
                if all.is_empty() {
                    self.by_namespace.remove(namespace);
                }
            }
        }
    }

    /// Takes in a kind of pods that is new. The sets that need entries for it.
    pub fn begin(
        &mut self,
        identity: u32,
        kind: &Kind,
        namespaces: &BTreeMap<String, Labels>,
    ) -> HashSet<u32> {
        let labels = namespaces.get(&kind.namespace);
        let mut sets = HashSet::new();
        let near = self.by_namespace.get(&kind.namespace);
        for selector in near.into_iter().flatten().chain(&self.wide) {
            if selector.selects(kind, labels) {
                if let Some(row) = self.rows.get_mut(selector) {
                    row.matching.insert(identity);
                    sets.extend(&row.sets);
                }
            }
        }
        sets
    }

    /// The sets that have entries for a kind of pods.
    pub fn sets_of(&self, identity: u32, kind: &Kind) -> HashSet<u32> {
        let near = self.by_namespace.get(&kind.namespace);
        near.into_iter()
            .flatten()
            .chain(&self.wide)
            .filter_map(|selector| self.rows.get(selector))
            .filter(|row| row.matching.contains(&identity))
            .flat_map(|row| row.sets.iter().copied())
            .collect()
    }

    /// Lets go of a kind of pods.
    pub fn end(&mut self, identity: u32, kind: &Kind) {
        let near = self.by_namespace.get(&kind.namespace);
        for selector in near.into_iter().flatten().chain(&self.wide) {
            if let Some(row) = self.rows.get_mut(selector) {
                row.matching.remove(&identity);
            }
        }
    }

    /// Looks again at the pods of a namespace, whose labels are others now. The sets that are no longer right.
    pub fn relabelled(
        &mut self,
        namespace: &str,
        kinds: &Kinds,
        namespaces: &BTreeMap<String, Labels>,
    ) -> HashSet<u32> {
        let labels = namespaces.get(namespace);
        let mut sets = HashSet::new();
        for (selector, row) in &mut self.rows {
            if !selector.looks_at_namespaces() {
                continue;
            }
            let mut changed = false;
            for identity in kinds.of_namespace(namespace) {
                let Some(kind) = kinds.get(identity) else {
                    continue;
                };
                changed |= if selector.selects(kind, labels) {
                    row.matching.insert(identity)
                } else {
                    row.matching.remove(&identity)
                };
            }
            if changed {
                sets.extend(&row.sets);
            }
        }
        sets
    }

    /// Notes that a set has entries for whom a selector selects; counts as a use.
    pub fn use_in(
        &mut self,
        selector: &Arc<Selector>,
        set: u32,
        kinds: &Kinds,
        namespaces: &BTreeMap<String, Labels>,
    ) {
        let news = |row: &mut Row| row.sets.insert(set);
        if self.rows.get_mut(selector).is_none_or(news) {
            self.add(selector, kinds, namespaces);
        }
        if let Some(row) = self.rows.get_mut(selector) {
            row.sets.insert(set);
        }
    }

    /// Notes that it has none any more.
    pub fn unuse_in(&mut self, selector: &Arc<Selector>, set: u32) {
        let row = self.rows.get_mut(selector);
        if row.is_some_and(|row| row.sets.remove(&set)) {
            self.remove(selector);
        }
    }

    /// The identities of whom a selector selects.
    pub fn matching(&self, selector: &Selector) -> impl Iterator<Item = u32> {
        self.rows
            .get(selector)
            .into_iter()
            .flat_map(|row| row.matching.iter().copied())
    }

    /// Whether it selects whoever has this identity.
    pub fn has(&self, selector: &Selector, identity: u32) -> bool {
        let row = self.rows.get(selector);
        row.is_some_and(|row| row.matching.contains(&identity))
    }
}
