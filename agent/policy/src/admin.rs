//! What all policies of administrators have in common: a subject, and rules of which the first decides.

use std::sync::Arc;

use serde_json::Value;

use crate::domains::Pattern;
use crate::network_policy::cidr;
use crate::object::{audit, fields, id, list, selector};
use crate::rule::{Action, Block, Direction, Peer, Place, Policy, Ports, Rule, Source, Tier};
use crate::selector::{Key, Selector};

/// What one kind has of its own.
pub(crate) struct Form {
    pub(crate) source: Source,
    /// Its words for what rules do.
    pub(crate) actions: &'static [(&'static str, Action)],
    /// Where a rule names its ports.
    pub(crate) ports: &'static str,
    /// Reads one of them.
    pub(crate) port: fn(&Value) -> Result<Vec<Ports>, String>,
}

/// When a policy is asked, or why that is not known.
pub(crate) type Turn = Result<(Tier, i32), String>;

/// Reads `spec.priority`.
pub(crate) fn priority(spec: &Value) -> Result<i32, String> {
    let value = spec["priority"].as_i64();
    let known = value.filter(|one| (0..=1000).contains(one));
    known.map(|one| one as i32).ok_or_else(|| {
        format!(
            "spec.priority: {} is no priority; use 0 to 1000",
            spec["priority"]
        )
    })
}

/// Reads a policy. What can't be understood lets nothing through: a rule that allows is left out; one that denies, or
/// passes on, denies everything. Where it is not known for whom a policy is, it is for everybody; where it is not known
/// when it is asked, it is the first; and either way its rules deny, but for those that allow, which are left out.
pub(crate) fn read(object: &Value, form: &Form, turn: Turn) -> (Vec<Policy>, Vec<String>) {
    let spec = &object["spec"];
    let mut errors = Vec::new();
    let mut doubt = |error: String, meanwhile: &str| {
        errors.push(format!(
            "{error}; until then {meanwhile}, and all its rules deny but those that allow, which are left out"
        ));
    };
    let doubtful = turn.is_err();
    let (tier, priority) = turn.unwrap_or_else(|error| {
        doubt(error, "it is asked first");
        (Tier::Admin, 0)
    });
    const KNOWN: [&str; 5] = ["tier", "priority", "subject", "ingress", "egress"];
    let subject = match fields(spec).find(|one| !KNOWN.contains(one)) {
        Some(field) => Err(format!("{field}: is not known; leave it out")),
        None => pods(&spec["subject"]).map_err(|error| format!("subject: {error}")),
    };
    let doubtful = doubtful || subject.is_err();
    let subject = subject.unwrap_or_else(|error| {
        doubt(format!("spec.{error}"), "it is for all pods");
        Selector::default()
    });
    let mut rules = Vec::new();
    for (direction, name) in [
        (Direction::Ingress, "ingress"),
        (Direction::Egress, "egress"),
    ] {
        let all = match spec.is_object() {
            true => list(spec, name).map_err(|error| format!(".{error}")),
            false => Err(": is no object; write one".to_owned()),
        };
        let all = all.unwrap_or_else(|error| {
            errors.push(format!("spec{error}; everything is denied until then"));
            rules.push(Rule::deny_all(direction, name, 0));
            None
        });
        for (index, one) in all.into_iter().flatten().enumerate() {
            let (action, about) = match action(one, form) {
                Ok(action) => (action, about(one, form, direction, action)),
                Err(error) => (Action::Deny, Err(error)),
            };
            match about {
                Ok((peers, ports)) => rules.push(Rule {
                    direction,
                    list: name,
                    index,
                    action,
                    peers,
                    ports,
                }),
                Err(error) if action == Action::Allow => {
                    errors.push(format!(
                        "spec.{name}[{index}]{error}; the rule lets nothing through"
                    ));
                }
                Err(error) => {
                    errors.push(format!(
                        "spec.{name}[{index}]{error}; the rule denies everything until then"
                    ));
                    rules.push(Rule::deny_all(direction, name, index));
                }
            }
        }
    }
    if doubtful {
        rules.retain(|rule| rule.action != Action::Allow);
        rules.iter_mut().for_each(|rule| rule.action = Action::Deny);
    }
    let policy = Policy {
        id: Arc::new(id(form.source, object)),
        tier,
        priority,
        subject: Arc::new(subject),
        for_nodes: false,
        isolates: [false, false],
        audit: audit(object),
        rules,
    };
    (vec![policy], errors)
}

/// What a rule does with what it is about.
fn action(rule: &Value, form: &Form) -> Result<Action, String> {
    let word = rule["action"].as_str().unwrap_or_default();
    let known = form.actions.iter().find(|(name, _)| *name == word);
    known.map(|(_, action)| *action).ok_or_else(|| {
        let words: Vec<&str> = form.actions.iter().map(|(name, _)| *name).collect();
        format!(
            ".action: {} is not known; use {}",
            rule["action"],
            words.join(" or ")
        )
    })
}

/// Whom and what a rule is about.
fn about(
    rule: &Value,
    form: &Form,
    direction: Direction,
    action: Action,
) -> Result<(Vec<Peer>, Vec<Ports>), String> {
    let word = match direction {
        Direction::Ingress => "from",
        Direction::Egress => "to",
    };
    let known = ["name", "action", word, form.ports];
    if let Some(field) = fields(rule).find(|field| !known.contains(field)) {
        return Err(format!(".{field}: is not known here; leave it out"));
    }
    let of = |error| format!(".{error}");
    let mut whom = Vec::new();
    for (at, one) in list(rule, word)
        .map_err(of)?
        .into_iter()
        .flatten()
        .enumerate()
    {
        let found =
            peer(one, direction, action).map_err(|error| format!(".{word}[{at}]: {error}"))?;
        whom.extend(found);
    }
    if whom.is_empty() {
        return Err(format!(".{word}: there is no peer; name one"));
    }
    let Some(ports) = list(rule, form.ports).map_err(of)? else {
        return Ok((whom, vec![Ports::All]));
    };
    let mut what = Vec::new();
    for (at, one) in ports.iter().enumerate() {
        let found = (form.port)(one).map_err(|error| format!(".{}[{at}]: {error}", form.ports))?;
        what.extend(found);
    }
    if what.is_empty() {
        return Err(format!(
            ".{}: the list is empty; leave it out for all ports",
            form.ports
        ));
    }
    let named = what.iter().any(|one| matches!(one, Ports::Named { .. }));
    if named && whom.iter().any(|one| !matches!(one, Peer::Pods(_))) {
        return Err(format!(
            ".{}: only pods name their ports; use numbers, or a rule for pods alone",
            form.ports
        ));
    }
    Ok((whom, what))
}

/// The only field that an object has.
fn only(value: &Value) -> Result<&str, String> {
    let mut all = fields(value);
    match (all.next(), all.next()) {
        (Some(field), None) => Ok(field),
        (None, _) => Err("nothing that is known is named; name one of the API's fields".to_owned()),
        (Some(one), Some(other)) => Err(format!(
            "{one} and {other} can't be together; make two entries of them"
        )),
    }
}

/// The only field of a peer or port, which must be one of these.
pub(crate) fn only_of<'a>(value: &'a Value, known: &[&str]) -> Result<&'a str, String> {
    let field = only(value)?;
    if known.contains(&field) {
        return Ok(field);
    }
    Err(format!(
        "{field} is not known here; use {}",
        known.join(" or ")
    ))
}

fn of_namespace(key: &str) -> Key {
    Key::NamespaceLabel(key.to_owned())
}

/// Pods by their namespaces, or by those and their own labels.
fn pods(value: &Value) -> Result<Selector, String> {
    let all = match only_of(value, &["namespaces", "pods"])? {
        "namespaces" => selector(&value["namespaces"], of_namespace)
            .map_err(|error| format!("namespaces: {error}"))?,
        _ => {
            let pods = &value["pods"];
            let mut all = selector(&pods["namespaceSelector"], of_namespace)
                .map_err(|error| format!("pods.namespaceSelector: {error}"))?;
            let own = selector(&pods["podSelector"], |key| Key::Label(key.to_owned()));
            all.extend(own.map_err(|error| format!("pods.podSelector: {error}"))?);
            all
        }
    };
    Ok(all.into_iter().collect())
}

fn peer(value: &Value, direction: Direction, action: Action) -> Result<Vec<Peer>, String> {
    let known: &[&str] = match direction {
        Direction::Ingress => &["namespaces", "pods"],
        Direction::Egress => &["namespaces", "pods", "nodes", "networks", "domainNames"],
    };
    match only_of(value, known)? {
        "nodes" => {
            let all = selector(&value["nodes"], |key| Key::Label(key.to_owned()))
                .map_err(|error| format!("nodes: {error}"))?;
            let nodes = Arc::new(all.into_iter().collect());
            Ok(vec![Peer::Place(Place::Nodes(nodes))])
        }
        "networks" => {
            let all = list(value, "networks")?.into_iter().flatten();
            let all: Vec<Peer> = all.map(network).collect::<Result<_, _>>()?;
            match all.is_empty() {
                true => Err("networks: the list is empty; name an address block".to_owned()),
                false => Ok(all),
            }
        }
        "domainNames" if action != Action::Allow => Err(
            "domainNames: of names not all addresses are known, so only rules that allow can have them; use networks"
                .to_owned(),
        ),
        "domainNames" => {
            let all = list(value, "domainNames")?.into_iter().flatten();
            let all: Vec<Peer> = all.map(domain).collect::<Result<_, _>>()?;
            match all.is_empty() {
                true => Err("domainNames: the list is empty; write a name".to_owned()),
                false => Ok(all),
            }
        }
        _ => Ok(vec![Peer::Pods(Arc::new(pods(value)?))]),
    }
}

fn domain(value: &Value) -> Result<Peer, String> {
    let pattern = Pattern::domain(value.as_str().unwrap_or_default())
        .map_err(|error| format!("domainNames: {error}"))?;
    Ok(Peer::Place(Place::Domains(Arc::new(pattern))))
}

fn network(value: &Value) -> Result<Peer, String> {
    let text = value.as_str().unwrap_or_default();
    let cidr = cidr(text).map_err(|error| format!("networks: {error}"))?;
    Ok(Peer::Block(Block {
        cidr,
        except: Vec::new(),
        outside: false,
    }))
}

/// Ports of a name, whichever protocol they are of.
pub(crate) fn named(value: &Value) -> Result<Vec<Ports>, String> {
    use xebec_dataplane_common::{SCTP, TCP, UDP};
    let name = value.as_str().filter(|name| !name.is_empty());
    let name = name.ok_or_else(|| format!("{value} is no name of a port; use a string"))?;
    Ok([TCP, UDP, SCTP]
        .map(|protocol| Ports::Named {
            protocol,
            name: name.into(),
        })
        .into())
}
