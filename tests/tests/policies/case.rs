//! What a case is: steps, each of which changes something and then says who may reach whom.

use std::collections::BTreeMap;

use serde_json::Value;
use xebec_policy_oracle::Protocol;

use super::{Facts, Name, actions, conflicts, peers, ports, rules, specs, upstream};

/// What cases are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    Targets,
    Rules,
    Peers,
    Ports,
    Example,
    Actions,
    Conflicts,
    Namespaces,
    Upstream,
    /// Those whose expectations are written down here.
    Specs,
}

/// Labels by key.
pub type Labels = BTreeMap<String, String>;

/// Labels of these keys and values.
pub fn labels(pairs: &[(&str, &str)]) -> Labels {
    let own = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    pairs.iter().map(own).collect()
}

/// Something that is done to the cluster.
#[derive(Clone, Debug)]
pub enum Action {
    Create(Value),
    Update(Value),
    Delete(Name),
    CreateNamespace(String, Labels),
    LabelNamespace(String, Labels),
    DeleteNamespace(String),
    CreatePod(Name, Labels),
    LabelPod(Name, Labels),
    DeletePod(Name),
}

/// Namespace and name.
pub fn name(namespace: &str, name: &str) -> Name {
    (namespace.to_owned(), name.to_owned())
}

/// What should be seen.
#[derive(Clone, Debug)]
pub enum Expected {
    /// What the evaluator says, at these ports, or at all of them.
    Judged(Option<(Protocol, u16)>),
    /// What is written down: for each port, lines of which a later one counts. All that no line names is allowed. A line
    /// is "yes" or "no" and a pair such as `x/a>*`, `y>z/b`.
    Stated(Vec<(Protocol, u16, &'static [&'static str])>),
}

/// Something is changed, and then it is looked who reaches whom.
#[derive(Clone, Debug)]
pub struct Step {
    pub actions: Vec<Action>,
    pub expected: Expected,
}

/// A step that the evaluator judges.
pub fn step(actions: impl IntoIterator<Item = impl Into<Action>>) -> Step {
    Step {
        actions: actions.into_iter().map(Into::into).collect(),
        expected: Expected::Judged(None),
    }
}

/// Nothing is done, and all are looked at again.
pub fn again() -> Step {
    step([Action::Create(Value::Null); 0])
}

/// One case.
#[derive(Clone, Debug)]
pub struct Case {
    pub group: Group,
    pub name: String,
    pub steps: Vec<Step>,
    /// If it is about addresses of one family: whether of IPv4.
    pub family: Option<bool>,
}

impl Case {
    pub fn new(group: Group, name: impl Into<String>, steps: Vec<Step>) -> Self {
        Self {
            group,
            name: name.into(),
            steps,
            family: None,
        }
    }

    /// The same, about addresses of a family.
    #[must_use]
    pub fn of_family(mut self, v4: bool) -> Self {
        self.family = Some(v4);
        self
    }

    /// With its group, as messages call it.
    pub fn title(&self) -> String {
        let family = match self.family {
            Some(false) => ", addresses of IPv6",
            _ => "",
        };
        format!("{:?}: {}{family}", self.group, self.name)
    }
}

/// All cases; what they say of addresses is of the facts' family.
pub fn all(facts: &Facts) -> Vec<Case> {
    [
        rules::targets(),
        rules::rules(),
        peers::cases(facts),
        ports::cases(),
        rules::example(),
        actions::cases(),
        conflicts::cases(facts),
        rules::namespaces(),
        upstream::cases(),
        specs::cases(facts),
    ]
    .concat()
}
