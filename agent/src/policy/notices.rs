//! What users are told of policies: by Kubernetes Events what is wrong with one and what did not fit, and by the objects'
//! status whether all of it is understood.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::api::DynamicObject;
use xebec_policy::engine::{Engine, Problem};
use xebec_policy::kernel::PolicyKernel;
use xebec_policy::rule::PolicyRef;

use super::conditions::Conditions;
use crate::events::Notice;

/// Why a user is told.
const INVALID: &str = "InvalidPolicy";
const NOT_IN_FORCE: &str = "PolicyNotInForce";

/// What was told, so that it is told once.
pub(super) struct Told {
    /// What objects say of themselves.
    pub conditions: Conditions,
    errors: BTreeMap<Arc<PolicyRef>, Vec<String>>,
    problems: Vec<Problem>,
    /// `metadata.uid` of policies.
    uids: BTreeMap<PolicyRef, String>,
}

impl Told {
    /// Nothing was told yet.
    pub fn new(conditions: Conditions) -> Self {
        Self {
            conditions,
            errors: BTreeMap::new(),
            problems: Vec::new(),
            uids: BTreeMap::new(),
        }
    }

    /// Takes an object's `metadata.uid`, which what is told of it bears.
    pub fn set_uid(&mut self, id: &PolicyRef, uid: Option<String>) {
        if let Some(uid) = uid {
            self.uids.insert(id.clone(), uid);
        }
    }

    /// Takes what an object tells beside its rules.
    pub fn saw(&mut self, id: &PolicyRef, object: &DynamicObject) {
        self.set_uid(id, object.metadata.uid.clone());
        self.conditions.saw(id, object);
    }

    /// The object is gone.
    pub fn forget(&mut self, id: &PolicyRef) {
        self.uids.remove(id);
        self.conditions.forget(id);
    }

    /// What is new.
    pub fn news<K: PolicyKernel>(&mut self, engine: &Engine<K>) -> Vec<Notice> {
        let mut news = Vec::new();
        for (policy, errors) in engine.errors() {
            if self.errors.get(policy) != Some(errors) {
                let words = errors.join("; ");
                news.push(self.about_policy(policy, INVALID, words));
                self.conditions.changed(policy);
            }
        }
        for policy in self.errors.keys() {
            if !engine.errors().contains_key(policy) {
                self.conditions.changed(policy);
            }
        }
        self.errors.clone_from(engine.errors());
        self.tell_conditions(engine);
        let problems: Vec<Problem> = engine.problems().cloned().collect();
        for problem in &problems {
            if self.problems.contains(problem) {
                continue;
            }
            let words = format!(
                "{}; the rules before it stay in force for {} pods of this node",
                problem.why,
                problem.pods.len()
            );
            for policy in &problem.policies {
                news.push(self.about_policy(policy, NOT_IN_FORCE, words.clone()));
            }
            for pod in &problem.pods {
                news.push(Notice {
                    about: ObjectReference {
                        api_version: Some("v1".to_owned()),
                        kind: Some("Pod".to_owned()),
                        namespace: Some(pod.0.clone()),
                        name: Some(pod.1.clone()),
                        uid: engine.uid(pod),
                        ..ObjectReference::default()
                    },
                    reason: NOT_IN_FORCE.to_owned(),
                    action: "Enforce",
                    words: words.clone(),
                });
            }
        }
        self.problems = problems;
        news
    }

    /// Has those conditions written whose time has come.
    pub fn tell_conditions<K: PolicyKernel>(&mut self, engine: &Engine<K>) {
        let errors = |id: &PolicyRef| engine.errors().get(id);
        self.conditions.tell(errors, || engine.known().1);
    }

    fn about_policy(&self, policy: &PolicyRef, reason: &str, words: String) -> Notice {
        Notice {
            about: ObjectReference {
                api_version: Some(policy.source.api_version().to_owned()),
                kind: Some(policy.source.kind().to_owned()),
                namespace: Some(policy.namespace.clone()).filter(|name| !name.is_empty()),
                name: Some(policy.name.clone()),
                uid: self.uids.get(policy).cloned(),
                ..ObjectReference::default()
            },
            reason: reason.to_owned(),
            action: "Enforce",
            words,
        }
    }
}
