//! `xebec policy`: which policies there are, what they make of a flow and why, and whether a file of them is right.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use serde::Deserialize;
use serde_json::Value;
use xebec_policy::read::Said;
use xebec_policy::rule::Source;

use crate::paths::Layout;
use crate::tables::{self, ListArgs};
use crate::unix_http;

/// What is asked of policies.
#[derive(Subcommand)]
pub enum Policy {
    /// List them, as they are in the kernel
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// One of them
    Get {
        /// [NAMESPACE/]NAME
        name: String,
        #[command(flatten)]
        list: ListArgs,
    },
    /// What becomes of a flow, which rule decides, and what would let it through; exits with 1 where it is denied
    Explain(Explain),
    /// Check a file of policies; needs no cluster. Exits with 1 where one is wrong
    Validate {
        /// YAML or JSON, `-` for standard input
        #[arg(short, long = "filename")]
        filename: PathBuf,
    },
}

/// From where, to what.
#[derive(Args)]
pub struct Explain {
    /// Who begins: [NAMESPACE/]POD, node:NAME or an address
    #[arg(long)]
    from: String,
    /// With whom: [NAMESPACE/]POD, node:NAME, an address, or a domain: a name with a dot that resolvers told pods of
    #[arg(long)]
    to: String,
    /// Port and protocol: 80, 80/TCP, 53/UDP, 9/SCTP, icmp, icmp/TYPE, icmpv6/TYPE
    #[arg(long, default_value = "80/TCP")]
    port: String,
    /// Only of this family; the first that both have otherwise
    #[arg(long, value_enum)]
    family: Option<Family>,
    /// Output form
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Family {
    Ipv4,
    Ipv6,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Output {
    Text,
    Json,
}

impl Policy {
    /// Does what is asked; false where the answer is no.
    pub async fn run(self, layout: &Layout) -> Result<bool> {
        match self {
            Self::List(args) => tables::list(layout, "/tables/policies", &args).await?,
            Self::Get { name, list } => {
                let (namespace, name) = name.split_once('/').unwrap_or(("", &name));
                let wanted = |row: &Value| {
                    row["policy"] == name && (namespace.is_empty() || row["namespace"] == namespace)
                };
                let found = tables::list_some(layout, "/tables/policies", &list, wanted).await?;
                if !found {
                    bail!("there is no policy {name} (see `xebec policy list`)");
                }
            }
            Self::Explain(explain) => return explain.run(layout).await,
            Self::Validate { filename } => return validate(&filename),
        }
        Ok(true)
    }
}

/// IP protocol number and port; of ICMP, type and code.
fn port(text: &str, v6: bool) -> Result<(u8, u16)> {
    let lower = text.to_ascii_lowercase();
    let (word, rest) = lower.split_once('/').unwrap_or((&lower, ""));
    if let "icmp" | "icmpv6" | "icmp6" = word {
        let v6 = v6 || word != "icmp";
        let kind: u8 = match rest {
            // An echo request.
            "" if v6 => 128,
            "" => 8,
            rest => rest
                .parse()
                .with_context(|| format!("{rest:?} is no type of ICMP"))?,
        };
        return Ok((if v6 { 58 } else { 1 }, u16::from(kind) << 8));
    }
    let protocol = match rest {
        "" | "tcp" => 6,
        "udp" => 17,
        "sctp" => 132,
        other => bail!("{other:?} is no protocol; use TCP, UDP, SCTP or icmp"),
    };
    let port = word
        .parse()
        .with_context(|| format!("{text:?} is no port (such as 80/TCP)"))?;
    Ok((protocol, port))
}

/// A party as the agent's socket takes it.
fn party(text: &str) -> String {
    let known = text.contains('/') || ["node:", "domain:"].iter().any(|one| text.starts_with(one));
    if known || text.parse::<std::net::IpAddr>().is_ok() {
        text.to_owned()
    } else if text.contains('.') {
        format!("domain:{text}")
    } else {
        format!("default/{text}")
    }
}

/// One side of an explanation, as the agent tells it.
#[derive(Clone, Debug, Deserialize)]
struct Side {
    allowed: bool,
    why: String,
    asked: Vec<Step>,
    #[serde(default)]
    remedies: Vec<String>,
    audit: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
struct Step {
    tier: String,
    set: Option<u32>,
    policies: Vec<String>,
    said: String,
}

impl Explain {
    async fn run(self, layout: &Layout) -> Result<bool> {
        let v6 = self.family == Some(Family::Ipv6);
        let (protocol, port) = port(
            &self.port,
            v6 || self.to.contains(':') && !self.to.starts_with("node:"),
        )?;
        let mut query = form_urlencoded::Serializer::new(String::new());
        query
            .append_pair("from", &party(&self.from))
            .append_pair("to", &party(&self.to))
            .append_pair("protocol", &protocol.to_string())
            .append_pair("port", &port.to_string());
        if let Some(family) = self.family {
            let number = if family == Family::Ipv4 { "4" } else { "6" };
            query.append_pair("family", number);
        }
        let path = format!("/policy/explain?{}", query.finish());
        let (mut answers, mut errors) = (Vec::new(), Vec::new());
        for (_, socket) in unix_http::agents(layout, None)? {
            let answer = unix_http::get_json(&socket, &path).await?;
            match answer["error"].as_str() {
                Some(error) => errors.push(error.to_owned()),
                None => answers.push(answer),
            }
        }
        // Domains are known where pods asked for them.
        if let (true, Some(error)) = (answers.is_empty(), errors.first()) {
            bail!("{error}");
        }
        let mut answer = answers.first().cloned().context("no agent runs here")?;
        // Each side is told by the agent that has its sets in the kernel, where one of this machine has.
        for side in ["egress", "ingress"] {
            let here = answers.iter().find(|answer| {
                let steps = answer[side]["asked"].as_array();
                steps.is_some_and(|steps| {
                    !steps.is_empty() && steps.iter().all(|step| step["set"].is_u64())
                })
            });
            if let Some(here) = here {
                answer[side] = here[side].clone();
            }
        }
        let side = |name: &str| -> Result<Side> {
            serde_json::from_value(answer[name].clone())
                .with_context(|| format!("the agent's answer has no {name}"))
        };
        let (egress, ingress) = (side("egress")?, side("ingress")?);
        let allowed = egress.allowed && ingress.allowed;
        answer["allowed"] = allowed.into();
        if self.output == Output::Json {
            println!("{}", serde_json::to_string_pretty(&answer)?);
            return Ok(allowed);
        }
        let (from, to) = (&answer["from"], &answer["to"]);
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        println!(
            "{} to {}, {}: {}",
            text(from),
            text(to),
            self.port,
            if allowed { "ALLOWED" } else { "DENIED" }
        );
        print_side("egress", &text(from), &egress);
        print_side("ingress", &text(to), &ingress);
        Ok(allowed)
    }
}

fn print_side(direction: &str, whose: &str, side: &Side) {
    let verdict = if side.allowed { "allowed" } else { "denied" };
    println!("{direction} of {whose}: {verdict}, {}", side.why);
    for step in &side.asked {
        let set = match step.set {
            Some(set) => format!("set {set}"),
            None => "not of this machine".to_owned(),
        };
        println!(
            "  tier {} ({set}), {}: {}",
            step.tier,
            step.policies.join(", "),
            step.said
        );
    }
    if let Some(audit) = &side.audit {
        println!("  in audit mode, {audit}");
    }
    for remedy in &side.remedies {
        println!("  to allow it: {remedy}");
    }
}

/// Says what is wrong with the policies in a file; whether nothing is.
fn validate(file: &Path) -> Result<bool> {
    let text = if file == Path::new("-") {
        std::io::read_to_string(std::io::stdin()).context("could not read standard input")?
    } else {
        std::fs::read_to_string(file)
            .with_context(|| format!("could not read {}", file.display()))?
    };
    let mut right = true;
    let mut any = false;
    for document in serde_yaml_ng::Deserializer::from_str(&text) {
        let object = Value::deserialize(document)
            .with_context(|| format!("{} is no YAML", file.display()))?;
        let objects = match object {
            Value::Null => continue,
            Value::Object(mut list) if list.contains_key("items") => {
                serde_json::from_value(list["items"].take()).context("items is no list")?
            }
            one => vec![one],
        };
        for object in objects {
            any = true;
            let kind = object["kind"].as_str().unwrap_or_default();
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            let (what, errors) = read(&object);
            if errors.is_empty() {
                println!("{kind} {name}: {what}");
            } else {
                right = false;
                for error in errors {
                    println!("{kind} {name}: {error}");
                }
            }
        }
    }
    if !any {
        bail!("{} holds no objects", file.display());
    }
    Ok(right)
}

/// What an object is, and what is wrong with it.
fn read(object: &Value) -> (String, Vec<String>) {
    let (api, kind) = (object["apiVersion"].as_str(), object["kind"].as_str());
    let (Some(api), Some(kind)) = (api, kind) else {
        return (
            String::new(),
            vec!["it has no apiVersion and kind".to_owned()],
        );
    };
    let Some(source) = Source::of(api, kind) else {
        return (
            "no policy that is known here, left alone".to_owned(),
            Vec::new(),
        );
    };
    let (said, errors) = xebec_policy::read::read(source, object);
    let what = match said {
        Said::Group(group) => format!("valid, {} address blocks", group.blocks.len()),
        Said::Policies(policies) => {
            let rules: usize = policies.iter().map(|policy| policy.rules.len()).sum();
            let plural = if rules == 1 { "" } else { "s" };
            format!("valid, {rules} rule{plural}")
        }
    };
    (what, errors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn ports_are_read_as_they_are_written() {
        for (text, wanted) in [
            ("80", (6, 80)),
            ("80/TCP", (6, 80)),
            ("53/udp", (17, 53)),
            ("9/SCTP", (132, 9)),
            ("icmp", (1, 8 << 8)),
            ("icmp/0", (1, 0)),
            ("ICMPv6", (58, 128 << 8)),
        ] {
            assert_eq!(port(text, false).unwrap(), wanted, "{text}");
        }
        assert_eq!(port("icmp", true).unwrap(), (58, 128 << 8));
        for text in ["http", "80/GRE", "70000", "icmp/256", ""] {
            port(text, false).unwrap_err();
        }
    }

    #[test]
    fn a_party_without_namespace_is_of_the_default_one() {
        for (text, wanted) in [
            ("web", "default/web"),
            ("shop/web", "shop/web"),
            ("node:a", "node:a"),
            ("10.0.0.1", "10.0.0.1"),
            ("fd00::1", "fd00::1"),
        ] {
            assert_eq!(party(text), wanted);
        }
    }

    #[test]
    fn what_is_wrong_with_an_object_is_said() {
        let policy = |spec: Value| json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "p"}, "spec": spec});
        let good = policy(json!({"podSelector": {}, "ingress": [{}]}));
        assert_eq!(read(&good), ("valid, 1 rule".to_owned(), Vec::new()));
        let bad =
            policy(json!({"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": "x"}}]}]}));
        let (_, errors) = read(&bad);
        assert!(
            errors[0].starts_with("spec.ingress[0].from[0]:"),
            "{errors:?}"
        );
        let (_, errors) = read(&policy(json!({"podSelector": 7})));
        assert_eq!(errors.len(), 1);
        let http = json!({
            "apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": {"name": "p", "namespace": "n"},
            "spec": {"endpointSelector": {}, "ingress": [{"toPorts": [{"ports": [{"port": "80", "protocol": "TCP"}], "rules": {"http": [{"method": "GET"}]}}]}]},
        });
        let (_, errors) = read(&http);
        assert!(errors[0].contains("rules.http"), "{errors:?}");
    }
}
