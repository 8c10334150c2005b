//! Whether the node may be sent traffic, as load balancers ask kube-proxy: one state, changed by the agent's parts.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};

use super::Register;

/// How long a change may wait for the kernel before the node counts as sick: twice the period in which kube-proxy
/// writes everything anew.
const PATIENCE: Duration = Duration::from_secs(60);

/// The node's health; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Health {
    state: Arc<Mutex<State>>,
    healthz: Answers,
    livez: Answers,
}

/// How many answers had which status.
type Answers = Family<[(&'static str, &'static str); 1], Counter>;

fn count(answers: &Answers, well: bool) {
    let code = if well { "200" } else { "503" };
    answers.get_or_create(&[("code", code)]).inc();
}

#[derive(Clone, Copy, Debug)]
struct State {
    /// When the kernel was last brought in step; none before it was for the first time.
    updated: Option<Timestamp>,
    /// Since when something waits to be written.
    queued: Option<Timestamp>,
    /// False while the node is being deleted.
    eligible: bool,
}

impl Default for State {
    fn default() -> Self {
        Self {
            updated: None,
            queued: None,
            eligible: true,
        }
    }
}

impl Register for Health {
    fn register(&self, registry: &mut Registry) {
        let (healthz, livez) = (self.healthz.clone(), self.livez.clone());
        let help = "Cumulative proxy healthz HTTP status";
        registry.register("kubeproxy_proxy_healthz", help, healthz);
        let help = "Cumulative proxy livez HTTP status";
        registry.register("kubeproxy_proxy_livez", help, livez);
    }
}

impl Health {
    fn state<T>(&self, with: impl FnOnce(&mut State) -> T) -> T {
        with(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Something is to be written to the kernel.
    pub fn queued(&self) {
        self.state(|state| {
            state.queued.get_or_insert_with(Timestamp::now);
        });
    }

    /// The kernel is in step with all that is known.
    pub fn updated(&self) {
        self.state(|state| {
            state.updated = Some(Timestamp::now());
            state.queued = None;
        });
    }

    /// Whether new connections may be sent to the node.
    pub(super) fn set_eligible(&self, eligible: bool) {
        self.state(|state| state.eligible = eligible);
    }

    /// The answer of `/healthz`.
    pub(super) fn healthz(&self) -> (bool, Value) {
        let told = self.state(|state| {
            let (alive, mut answer) = state.at(Timestamp::now());
            answer["nodeEligible"] = state.eligible.into();
            (alive && state.eligible, answer)
        });
        count(&self.healthz, told.0);
        told
    }

    /// The answer of `/livez`, which a node that is being deleted still gives.
    pub(super) fn livez(&self) -> (bool, Value) {
        let told = self.state(|state| state.at(Timestamp::now()));
        count(&self.livez, told.0);
        told
    }
}

impl State {
    fn at(&self, now: Timestamp) -> (bool, Value) {
        let patience = SignedDuration::try_from(PATIENCE).unwrap_or(SignedDuration::MAX);
        let waits_too_long = self
            .queued
            .is_some_and(|since| now.duration_since(since) > patience);
        // While nothing waits, what was written last is what is known now.
        let told = match (self.updated, self.queued) {
            (Some(_), None) => Some(now),
            (updated, _) => updated,
        };
        let answer = json!({
            "lastUpdated": told.map_or_else(|| "0001-01-01T00:00:00Z".to_owned(), |at| at.to_string()),
            "currentTime": now.to_string(),
        });
        (self.updated.is_some() && !waits_too_long, answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn healthy_once_the_kernel_was_written() {
        let health = Health::default();
        assert!(!health.healthz().0 && !health.livez().0);
        health.updated();
        let (healthy, answer) = health.healthz();
        assert!(healthy);
        assert_eq!(answer["lastUpdated"], answer["currentTime"]);
        let mut registry = Registry::default();
        health.register(&mut registry);
        let text = super::super::encode(&registry).unwrap();
        for line in [
            "kubeproxy_proxy_healthz_total{code=\"200\"} 1\n",
            "kubeproxy_proxy_healthz_total{code=\"503\"} 1\n",
            "kubeproxy_proxy_livez_total{code=\"503\"} 1\n",
        ] {
            assert!(text.contains(line), "{text}");
        }
        assert_eq!(answer["nodeEligible"], true);
    }

    #[test]
    fn a_node_that_is_being_deleted_is_alive_but_gets_no_traffic() {
        let health = Health::default();
        health.updated();
        health.set_eligible(false);
        let (healthy, answer) = health.healthz();
        assert!(!healthy);
        assert_eq!(answer["nodeEligible"], false);
        let (alive, answer) = health.livez();
        assert!(alive && answer.get("nodeEligible").is_none());
    }

    #[test]
    fn a_change_that_waits_too_long_is_told() {
        let now = Timestamp::now();
        let state = |ago: i64| State {
            updated: Some(now),
            queued: Some(now - SignedDuration::from_secs(ago)),
            eligible: true,
        };
        assert!(state(59).at(now).0);
        assert!(!state(61).at(now).0);
    }
}
