//! What objects that are policies say of themselves: a condition in their status, which agents of the cluster write for
//! each other.
//!
//! Whether a policy can be enforced is the same on every node, so one writer is enough. Its agents take turns: where the
//! first has written nothing after a while (its node may be gone), the next does.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::Hasher;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::warn;
use xebec_policy::rule::{PolicyRef, Source};

/// How many agents may come to write an object's condition.
const WRITERS: usize = 3;
/// How long each of them waits for the one before.
const TURN: Duration = Duration::from_secs(5);
/// How many conditions wait to be written; the others wait where they are.
const WAITING: usize = 256;
/// A message is at most so long.
const LONGEST: usize = 4_000;
/// Who owns the condition (`metadata.managedFields`).
const MANAGER: &str = "xebec-agent";
/// How often the API is asked to take one, and how long it is given time before the second time; then twice that.
const TRIES: u32 = 4;
const PAUSE: Duration = Duration::from_secs(1);

/// The type of the condition that objects of a kind have: as Cilium has it, and as the network policy API's users know
/// it from the Gateway API. None for kinds without a status.
fn condition_type(source: Source) -> Option<&'static str> {
    match source {
        Source::NetworkPolicy | Source::CiliumCidrGroup => None,
        Source::CiliumNetworkPolicy | Source::CiliumClusterwideNetworkPolicy => Some("Valid"),
        Source::ClusterNetworkPolicy
        | Source::AdminNetworkPolicy
        | Source::BaselineAdminNetworkPolicy => Some("Accepted"),
    }
}

/// Whether conditions of a kind tell which version of the object they are of.
fn has_generation(source: Source) -> bool {
    source.api_version() != Source::CiliumNetworkPolicy.api_version()
}

/// A condition without its time.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Said {
    holds: bool,
    message: String,
    generation: Option<i64>,
}

impl Said {
    /// What there is to say of a version of an object.
    fn of(errors: Option<&Vec<String>>, generation: Option<i64>) -> Self {
        let message = errors.map_or_else(
            || "all of its rules are understood".to_owned(),
            |errors| errors.join("; ").chars().take(LONGEST).collect(),
        );
        Self {
            holds: errors.is_none(),
            message,
            generation,
        }
    }

    /// Whether an object that has this need not be told the other. Whatever words say that all is well are good.
    fn does_for(&self, wanted: &Self, source: Source) -> bool {
        self.holds == wanted.holds
            && (self.holds || self.message == wanted.message)
            && (!has_generation(source) || self.generation == wanted.generation)
    }
}

/// An object of a kind that has a status.
#[derive(Debug)]
struct Object {
    uid: Option<String>,
    generation: Option<i64>,
    /// What it says, and since when.
    says: Option<(Said, String)>,
    /// When it is this agent's turn to write what it does not say.
    turn: Option<Instant>,
    /// What this agent wrote last. It is not written again: others may be of another mind, and each would go on for ever.
    wrote: Option<Said>,
}

/// A condition to be written.
#[derive(Debug)]
pub(super) struct Write {
    about: PolicyRef,
    object: Value,
}

/// What objects say, and what they are still to say.
#[derive(Debug)]
pub(super) struct Conditions {
    objects: BTreeMap<PolicyRef, Object>,
    /// Those to be looked at, and when.
    due: BTreeMap<PolicyRef, Instant>,
    node: String,
    write: mpsc::Sender<Write>,
}

impl Conditions {
    /// For the agent of a node; what is to be written comes out of the receiver, for [`write`].
    pub fn new(node: &str) -> (Self, mpsc::Receiver<Write>) {
        let (write, waiting) = mpsc::channel(WAITING);
        let conditions = Self {
            objects: BTreeMap::new(),
            due: BTreeMap::new(),
            node: node.to_owned(),
            write,
        };
        (conditions, waiting)
    }

    /// An object was seen.
    pub fn saw(&mut self, id: &PolicyRef, object: &DynamicObject) {
        let Some(kind) = condition_type(id.source) else {
            return;
        };
        let metadata = &object.metadata;
        let before = self.objects.remove(id);
        let same = before.filter(|before| before.uid == metadata.uid);
        let (turn, wrote) = same.map_or((None, None), |before| (before.turn, before.wrote));
        let object = Object {
            uid: metadata.uid.clone(),
            generation: metadata.generation,
            says: find(&object.data["status"], kind),
            turn,
            wrote,
        };
        self.objects.insert(id.clone(), object);
        self.changed(id);
    }

    /// An object is gone.
    pub fn forget(&mut self, id: &PolicyRef) {
        self.objects.remove(id);
        self.due.remove(id);
    }

    /// What is wrong with an object may have changed.
    pub fn changed(&mut self, id: &PolicyRef) {
        if self.objects.contains_key(id) {
            self.due.insert(id.clone(), Instant::now());
        }
    }

    /// When there is something to do next.
    pub fn next(&self) -> Option<Instant> {
        self.due.values().min().copied()
    }

    /// Has conditions written whose time has come: `errors` tells what is wrong with an object, `nodes` whose agents may
    /// write.
    pub fn tell<'a>(
        &mut self,
        errors: impl Fn(&PolicyRef) -> Option<&'a Vec<String>>,
        nodes: impl FnOnce() -> Vec<String>,
    ) {
        let now = Instant::now();
        let due = self.due.iter().filter(|(_, at)| **at <= now);
        let due: Vec<PolicyRef> = due.map(|(id, _)| id.clone()).collect();
        if due.is_empty() {
            return;
        }
        // In an order that all agents know.
        let nodes: BTreeSet<String> = nodes().into_iter().collect();
        let own = nodes.iter().position(|one| *one == self.node);
        for id in due {
            self.due.remove(&id);
            let (Some(object), Some(own)) = (self.objects.get_mut(&id), own) else {
                continue;
            };
            let wanted = Said::of(errors(&id), object.generation);
            let says = object.says.as_ref();
            if says.is_some_and(|(said, _)| said.does_for(&wanted, id.source))
                || object.wrote.as_ref() == Some(&wanted)
            {
                object.turn = None;
                continue;
            }
            let rank = rank(&id, own, nodes.len());
            if rank >= WRITERS {
                continue;
            }
            let turn = *object.turn.get_or_insert(now + TURN * rank as u32);
            if turn > now {
                self.due.insert(id, turn);
                continue;
            }
            let write = Write {
                object: status(&id, object, &wanted),
                about: id.clone(),
            };
            if self.write.try_send(write).is_err() {
                self.due.insert(id, now + TURN);
                continue;
            }
            object.turn = None;
            object.wrote = Some(wanted);
        }
    }
}

/// How many agents come before that of a node, which has this place among all.
fn rank(id: &PolicyRef, own: usize, nodes: usize) -> usize {
    let mut hash = fnv::FnvHasher::default();
    hash.write(id.to_string().as_bytes());
    let first = (hash.finish() % nodes as u64) as usize;
    (own + nodes - first) % nodes
}

/// What a status says by its condition of a type, and since when.
fn find(status: &Value, kind: &str) -> Option<(Said, String)> {
    let mut conditions = status["conditions"].as_array().into_iter().flatten();
    let one = conditions.find(|one| one["type"] == kind)?;
    let text = |field: &str| one[field].as_str().unwrap_or_default();
    let said = Said {
        holds: match text("status") {
            "True" => true,
            "False" => false,
            _ => return None,
        },
        message: text("message").to_owned(),
        generation: one["observedGeneration"].as_i64(),
    };
    Some((said, text("lastTransitionTime").to_owned()))
}

/// An object with nothing but the condition.
fn status(id: &PolicyRef, object: &Object, wanted: &Said) -> Value {
    let before = object.says.as_ref();
    let since = before.filter(|(said, since)| said.holds == wanted.holds && !since.is_empty());
    let since = since.map_or_else(
        || {
            Timestamp::from_second(Timestamp::now().as_second())
                .unwrap_or_default()
                .to_string()
        },
        |(_, since)| since.clone(),
    );
    let kind = condition_type(id.source).unwrap_or_default();
    let mut condition = json!({
        "type": kind,
        "status": if wanted.holds { "True" } else { "False" },
        "reason": if wanted.holds { kind } else { "Invalid" },
        "message": wanted.message,
        "lastTransitionTime": since,
    });
    if has_generation(id.source) {
        condition["observedGeneration"] = wanted.generation.into();
    }
    let mut metadata = json!({"name": id.name});
    if id.source.is_namespaced() {
        metadata["namespace"] = id.namespace.clone().into();
    }
    // Another object of that name is not meant.
    if let Some(uid) = &object.uid {
        metadata["uid"] = uid.clone().into();
    }
    json!({
        "apiVersion": id.source.api_version(),
        "kind": id.source.kind(),
        "metadata": metadata,
        "status": {"conditions": [condition]},
    })
}

/// Writes what is to be written, until nothing more can come.
pub(super) async fn write(client: kube::Client, mut waiting: mpsc::Receiver<Write>) {
    let mut refused = BTreeSet::new();
    while let Some(Write { about, object }) = waiting.recv().await {
        let source = about.source;
        if refused.contains(&source) {
            continue;
        }
        let (group, version) = source.api_version().split_once('/').unwrap_or_default();
        let kind = GroupVersionKind::gvk(group, version, source.kind());
        let resource = ApiResource::from_gvk_with_plural(&kind, source.plural());
        let api: Api<DynamicObject> = if source.is_namespaced() {
            Api::namespaced_with(client.clone(), &about.namespace, &resource)
        } else {
            Api::all_with(client.clone(), &resource)
        };
        let parameters = PatchParams::apply(MANAGER).force();
        let mut pause = PAUSE;
        for left in (0..TRIES).rev() {
            let patch = Patch::Apply(&object);
            match api.patch_status(&about.name, &parameters, &patch).await {
                Ok(_) => break,
                // It is gone, or another has its name, or its kind has no status.
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => break,
                Err(kube::Error::Api(status)) if status.code == 403 => {
                    warn!(
                        kind = source.kind(),
                        error = status.message,
                        "policies' status can't be written; allow the agent to patch {}/status in {group}",
                        source.plural()
                    );
                    refused.insert(source);
                    break;
                }
                Err(error) if left == 0 => {
                    warn!(%error, "the status of {about} could not be written")
                }
                Err(_) => tokio::time::sleep(pause).await,
            }
            pause *= 2;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCES: [Source; 2] = [Source::CiliumNetworkPolicy, Source::ClusterNetworkPolicy];

    fn id(source: Source) -> PolicyRef {
        let namespace = if source.is_namespaced() { "n" } else { "" };
        PolicyRef {
            source,
            namespace: namespace.to_owned(),
            name: "p".to_owned(),
        }
    }

    fn object(generation: i64, status: &Value) -> DynamicObject {
        let object = json!({
            "metadata": {"name": "p", "uid": "1", "generation": generation}, "spec": {}, "status": status,
        });
        serde_json::from_value(object).unwrap()
    }

    /// One agent among those of three nodes.
    struct Agent {
        conditions: Conditions,
        waiting: mpsc::Receiver<Write>,
    }

    impl Agent {
        fn new(node: &str) -> Self {
            let (conditions, waiting) = Conditions::new(node);
            Self {
                conditions,
                waiting,
            }
        }

        fn writes(&mut self, errors: Option<&Vec<String>>) -> Option<Value> {
            let nodes = || ["a", "b", "c"].map(str::to_owned).to_vec();
            self.conditions.tell(|_| errors, nodes);
            self.waiting.try_recv().ok().map(|write| write.object)
        }
    }

    /// The agents in the order of their turns.
    fn agents(id: &PolicyRef) -> [Agent; 3] {
        let mut nodes = [("a", 0), ("b", 1), ("c", 2)];
        nodes.sort_by_key(|(_, own)| rank(id, *own, 3));
        nodes.map(|(node, _)| Agent::new(node))
    }

    #[tokio::test(start_paused = true)]
    async fn agents_write_in_turn_what_an_object_does_not_say() {
        for source in SOURCES {
            let id = id(source);
            let wrong = vec!["this".to_owned(), "that".to_owned()];
            let mut agents = agents(&id);
            for agent in &mut agents {
                agent.conditions.saw(&id, &object(1, &Value::Null));
            }
            let mut wrote = Vec::new();
            for _ in 0..3 {
                let now = agents.iter_mut().map(|agent| agent.writes(Some(&wrong)));
                wrote.push(now.collect::<Vec<_>>());
                tokio::time::advance(TURN).await;
            }
            for (at, now) in wrote.iter().enumerate() {
                for (rank, one) in now.iter().enumerate() {
                    assert_eq!(one.is_some(), at == rank, "{source:?}: {one:?}");
                }
            }
            let told = wrote[0][0].clone().unwrap();
            assert_eq!(told["metadata"]["uid"], "1");
            let condition = &told["status"]["conditions"][0];
            assert_eq!(condition["status"], "False");
            assert_eq!(condition["message"], "this; that");
            // Those that see it written before their turn leave it.
            let mut later = self::agents(&id);
            for agent in &mut later {
                agent.conditions.saw(&id, &object(1, &Value::Null));
                assert!(agent.conditions.next().is_some());
            }
            assert!(later[0].writes(Some(&wrong)).is_some());
            for agent in &mut later {
                agent.conditions.saw(&id, &object(1, &told["status"]));
            }
            tokio::time::advance(TURN * 3).await;
            for agent in &mut later {
                assert_eq!(agent.writes(Some(&wrong)), None);
                assert_eq!(agent.conditions.next(), None);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_condition_keeps_its_time_and_is_written_once() {
        for source in SOURCES {
            let id = id(source);
            let [mut agent, ..] = agents(&id);
            let since = "2020-01-01T00:00:00Z";
            let before = json!({"conditions": [
                {"type": "Other", "status": "True"},
                {
                    "type": condition_type(source), "status": "False", "message": "that",
                    "lastTransitionTime": since, "observedGeneration": 1,
                },
            ]});
            agent.conditions.saw(&id, &object(2, &before));
            let wrong = vec!["this".to_owned()];
            let told = agent.writes(Some(&wrong)).unwrap();
            let conditions = told["status"]["conditions"].as_array().unwrap();
            assert_eq!(conditions.len(), 1, "others are left to who wrote them");
            assert_eq!(conditions[0]["lastTransitionTime"], since);
            // Another writes over it: that is left.
            agent.conditions.saw(&id, &object(2, &before));
            assert_eq!(agent.writes(Some(&wrong)), None);
            // What changes is told, with its time.
            agent.conditions.changed(&id);
            let told = agent.writes(None).unwrap();
            let condition = &told["status"]["conditions"][0];
            assert_eq!(condition["status"], "True");
            assert_ne!(condition["lastTransitionTime"], since);
            assert_eq!(
                condition.get("observedGeneration"),
                has_generation(source).then_some(&json!(2)),
                "fields that a kind does not have are refused by the API"
            );
            agent.conditions.forget(&id);
            assert_eq!(agent.conditions.next(), None);
        }
    }

    #[tokio::test]
    async fn who_else_says_that_all_is_well_is_left() {
        let id = id(Source::CiliumNetworkPolicy);
        let [mut agent, ..] = agents(&id);
        let status =
            json!({"conditions": [{"type": "Valid", "status": "True", "message": "fine"}]});
        agent.conditions.saw(&id, &object(3, &status));
        assert_eq!(agent.writes(None), None);
    }
}
