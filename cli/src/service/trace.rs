//! `xebec service trace`: which frontend is meant, which backends a client may get, and why. It tells what the agent's
//! rows say, and says what they do not.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::Value;

use super::rows::{self, Backend, Row};
use crate::paths::Layout;

/// From where, and to what.
#[derive(Args)]
pub struct Trace {
    /// The client: [NAMESPACE/]POD, an IP address, `node` (a process of the node) or `outside`
    #[arg(long)]
    from: String,
    /// What it connects to: [NAMESPACE/]SERVICE[:PORT][/PROTOCOL], SERVICE.NAMESPACE[.svc...] or IP:PORT[/PROTOCOL]
    #[arg(long)]
    to: String,
    /// Ask this node's agent; by default the one that has the pod, or the first
    #[arg(long)]
    node: Option<String>,
    /// Output form
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Output {
    Text,
    Json,
}

/// Who connects.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Client {
    /// A pod that an agent of this machine has connected.
    Pod { name: String, address: IpAddr },
    /// A process of the node.
    Node,
    /// Somebody who is no part of the cluster.
    Outside,
    /// An address that no agent of this machine knows.
    Unknown(IpAddr),
}

/// What is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    /// A Service, perhaps one port of it, by number or name.
    Service { name: String, port: Option<String> },
    /// An address and port.
    Address(SocketAddr),
}

/// What holds for one frontend.
#[derive(Debug, Serialize)]
struct Answer {
    service: String,
    port: String,
    #[serde(rename = "type")]
    kind: String,
    frontend: String,
    /// Under which condition it is meant at all.
    #[serde(skip_serializing_if = "Option::is_none")]
    condition: Option<String>,
    state: String,
    /// One for each run that may apply.
    runs: Vec<Chosen>,
    affinity: String,
    notes: Vec<String>,
}

/// A run, and who gets it.
#[derive(Debug, Serialize)]
struct Chosen {
    run: &'static str,
    why: String,
    choice: String,
    backends: Vec<Share>,
}

/// A backend's part of new connections.
#[derive(Debug, Serialize)]
struct Share {
    backend: String,
    node: String,
    zone: String,
    state: String,
    /// Of all new connections, in percent.
    percent: f64,
}

impl Trace {
    /// Asks the agents and prints.
    pub async fn run(self, layout: &Layout) -> Result<()> {
        let endpoints = rows::table(layout, self.node.as_deref(), "endpoints").await?;
        let (client, home) = client(&self.from, &endpoints)?;
        let agent = self.node.or(home).or_else(|| {
            let first = endpoints.first()?;
            Some(first.0.clone())
        });
        let found = rows::frontends(layout, agent.as_deref()).await?;
        let (target, protocol) = target(&self.to)?;
        let mut answers = trace(&found, &client, &target, protocol.as_deref())?;
        let policies = rows::table(layout, agent.as_deref(), "policies").await?;
        let policies: Vec<Value> = policies.into_iter().flat_map(|(_, rows)| rows).collect();
        for answer in &mut answers {
            answer
                .notes
                .extend(policy(&policies, &client, &answer.service));
        }
        if self.output == Output::Json {
            let text = serde_json::to_string_pretty(&answers).context("could not write JSON")?;
            println!("{text}");
            return Ok(());
        }
        println!("From      {}", describe(&client));
        for answer in &answers {
            println!();
            print(answer)?;
        }
        Ok(())
    }
}

/// Who is meant by `--from`, and the node that it is on.
fn client(from: &str, endpoints: &[(String, Vec<Value>)]) -> Result<(Client, Option<String>)> {
    match from {
        "outside" => return Ok((Client::Outside, None)),
        "node" | "host" => return Ok((Client::Node, None)),
        _ => {}
    }
    let asked = from.parse::<IpAddr>().ok();
    let (namespace, pod) = from.split_once('/').unwrap_or(("default", from));
    for (node, rows) in endpoints {
        for row in rows {
            // A pod of two families has two addresses.
            let text = ["address", "address6"].map(|key| row[key].as_str());
            let listed = row["addresses"].as_array().into_iter().flatten();
            let all = text
                .into_iter()
                .flatten()
                .chain(listed.filter_map(Value::as_str));
            let addresses: Vec<IpAddr> = all.filter_map(|one| one.parse().ok()).collect();
            let is = match asked {
                Some(asked) => addresses.contains(&asked),
                None => row["namespace"] == namespace && row["pod"] == pod,
            };
            let Some(address) = asked.or_else(|| addresses.first().copied()) else {
                continue;
            };
            if is {
                let name = |key: &str| row[key].as_str().unwrap_or_default();
                let name = format!("{}/{}", name("namespace"), name("pod"));
                return Ok((Client::Pod { name, address }, Some(node.clone())));
            }
        }
    }
    match asked {
        Some(asked) => Ok((Client::Unknown(asked), None)),
        None => bail!(
            "no agent on this machine has the pod {namespace}/{pod} (see `xebec endpoint list`); ask on its node, or give its IP address"
        ),
    }
}

/// What is meant by `--to`, and the protocol if it is named.
fn target(to: &str) -> Result<(Target, Option<String>)> {
    let (rest, protocol) = match to.rsplit_once('/') {
        Some((rest, last)) if matches!(&*last.to_ascii_uppercase(), "TCP" | "UDP" | "SCTP") => {
            (rest, Some(last.to_ascii_uppercase()))
        }
        _ => (to, None),
    };
    if let Ok(address) = rest.parse::<SocketAddr>() {
        return Ok((Target::Address(address), protocol));
    }
    if rest.parse::<IpAddr>().is_ok() {
        bail!("{to:?} has no port: name it as {rest}:80, for example (IPv6 as [{rest}]:80)");
    }
    let (name, port) = match rest.split_once(':') {
        Some((name, port)) => (name, Some(port.to_owned())),
        None => (rest, None),
    };
    let name = match (name.contains('/'), name.split_once('.')) {
        (true, _) => name.to_owned(),
        // A DNS name: the Service, then its namespace.
        (false, Some((service, rest))) => {
            let namespace = rest.split('.').next().unwrap_or_default();
            format!("{namespace}/{service}")
        }
        (false, None) => format!("default/{name}"),
    };
    if name.split('/').any(str::is_empty) {
        bail!("{to:?} names no Service: try NAMESPACE/NAME or IP:PORT");
    }
    Ok((Target::Service { name, port }, protocol))
}

fn trace(
    rows: &[Row],
    client: &Client,
    target: &Target,
    protocol: Option<&str>,
) -> Result<Vec<Answer>> {
    let meant = match target {
        Target::Address(address) => by_address(rows, *address, protocol)?,
        Target::Service { name, port } => {
            let all = by_service(rows, name, port.as_deref(), protocol)?;
            all.into_iter().map(|row| (row, None)).collect()
        }
    };
    let meant: Vec<_> = match target {
        // An address was chosen already.
        Target::Address(_) => meant,
        Target::Service { .. } => as_clients_do(meant, client),
    };
    Ok(meant
        .into_iter()
        .map(|(row, condition)| answer(row, condition, client))
        .collect())
}

/// The frontend of an address: its own, or the one of a node port, if the address is a node's.
fn by_address<'a>(
    rows: &'a [Row],
    to: SocketAddr,
    protocol: Option<&str>,
) -> Result<Vec<(&'a Row, Option<String>)>> {
    let of = |wanted: &dyn Fn(SocketAddr) -> bool| -> Vec<&Row> {
        let rows = rows.iter().filter(|row| {
            row.address().is_some_and(|(address, told)| {
                wanted(address) && protocol.is_none_or(|protocol| protocol == told)
            })
        });
        rows.collect()
    };
    let exact = of(&|address| address == to);
    if !exact.is_empty() {
        return Ok(exact.into_iter().map(|row| (row, None)).collect());
    }
    let every = of(&|address| {
        address.port() == to.port()
            && address.ip().is_unspecified()
            && address.is_ipv4() == to.is_ipv4()
    });
    if every.is_empty() {
        bail!(
            "the agent has no frontend {to}{}: packets go there untranslated",
            protocol
                .map(|protocol| format!("/{protocol}"))
                .unwrap_or_default()
        );
    }
    let condition = format!(
        "{} is a node's address with node ports (the rows do not tell which are)",
        to.ip()
    );
    Ok(every
        .into_iter()
        .map(|row| (row, Some(condition.clone())))
        .collect())
}

/// The frontends of a Service's port; with several ports one must be named.
fn by_service<'a>(
    rows: &'a [Row],
    name: &str,
    port: Option<&str>,
    protocol: Option<&str>,
) -> Result<Vec<&'a Row>> {
    let all: Vec<&Row> = rows
        .iter()
        .filter(|row| row.service == name && row.address().is_some())
        .collect();
    if all.is_empty() {
        bail!(
            "the agent has no frontend of a Service {name} (see `xebec service list`; headless and ExternalName Services have none)"
        );
    }
    let is_meant = |row: &&Row| {
        row.address().is_some_and(|(address, told)| {
            protocol.is_none_or(|protocol| protocol == told)
                && port.is_none_or(|port| row.port == port || address.port().to_string() == port)
        })
    };
    let meant: Vec<&Row> = all.iter().copied().filter(is_meant).collect();
    let mut numbers: Vec<(u64, &str)> = meant.iter().map(|row| (row.number, &*row.port)).collect();
    numbers.sort_unstable();
    numbers.dedup();
    if numbers.len() == 1 {
        return Ok(meant);
    }
    let mut ports: Vec<String> = all
        .iter()
        .filter(|row| row.kind == "ClusterIP")
        .filter_map(|row| row.address())
        .map(|(address, protocol)| format!("{}/{protocol}", address.port()))
        .collect();
    ports.sort();
    ports.dedup();
    let what = if numbers.is_empty() {
        "no such port"
    } else {
        "several ports"
    };
    bail!("{name} has {what}: name one of {}", ports.join(", "))
}

/// Of a Service's frontends, those that a client of this kind uses: inside its ClusterIP, outside what leads in.
fn as_clients_do<'a>(
    meant: Vec<(&'a Row, Option<String>)>,
    client: &Client,
) -> Vec<(&'a Row, Option<String>)> {
    let family = match client {
        Client::Pod { address, .. } | Client::Unknown(address) => Some(address.is_ipv4()),
        Client::Node | Client::Outside => None,
    };
    let narrowed = |wanted: &dyn Fn(&Row) -> bool, from: &[(&'a Row, Option<String>)]| {
        let some: Vec<_> = from
            .iter()
            .filter(|(row, _)| wanted(row))
            .cloned()
            .collect();
        if some.is_empty() { from.to_vec() } else { some }
    };
    let by_kind = match client {
        Client::Outside => narrowed(&|row| row.kind != "ClusterIP", &meant),
        _ => narrowed(&|row| row.kind == "ClusterIP", &meant),
    };
    let of_family = |row: &Row| {
        row.address()
            .is_none_or(|(address, _)| family.is_none_or(|v4| v4 == address.is_ipv4()))
    };
    narrowed(&of_family, &by_kind)
}

fn answer(row: &Row, condition: Option<String>, client: &Client) -> Answer {
    let external = row.has("external");
    let inside = |why: &str| chosen(row, true, why);
    let outside = |why: &str| chosen(row, false, why);
    let closed = "the frontend is not meant for the outside, so all get the inside's";
    let runs = match client {
        Client::Pod { .. } => vec![inside("the client is a pod")],
        Client::Node => vec![inside("the client is a process of a node")],
        _ if !external => vec![inside(closed)],
        Client::Outside => vec![outside("the client is outside the cluster")],
        Client::Unknown(address) => vec![
            inside(&format!(
                "if {address} is a pod's or a node's on another machine"
            )),
            outside(&format!("if {address} is outside the cluster")),
        ],
    };
    let affinity = match row.affinity_seconds {
        0 => "none: each new connection chooses anew".into(),
        seconds => format!(
            "a client keeps its backend while no more than {seconds} s pass between connections; which one it has now, the rows do not tell"
        ),
    };
    let mut notes = Vec::new();
    let flags = [
        (
            "source-ranges",
            "only sources in loadBalancerSourceRanges are let in; others are dropped",
        ),
        (
            "keep-source",
            "backends see an outside client's own address (externalTrafficPolicy: Local)",
        ),
        ("direct-return", "backends answer outside clients directly"),
    ];
    for (flag, text) in flags {
        if row.has(flag) {
            notes.push(text.to_owned());
        }
    }
    if row.state != "ok" && !row.state.is_empty() {
        notes.push(format!(
            "the frontend's state is {:?}: the kernel may not do what the rows say",
            row.state
        ));
    }
    Answer {
        service: row.service.clone(),
        port: row.port.clone(),
        kind: row.kind.clone(),
        frontend: row.frontend.clone(),
        condition,
        state: row.state.clone(),
        runs,
        affinity,
        notes,
    }
}

/// A run with each backend's share of new connections.
fn chosen(row: &Row, inside: bool, why: &str) -> Chosen {
    let (run, algorithm, drops): (&[Backend], _, _) = if inside {
        (&row.inside, &row.algorithm.inside, row.has("drop-inside"))
    } else {
        (
            &row.outside,
            &row.algorithm.outside,
            row.has("drop-outside"),
        )
    };
    let total: u64 = run.iter().map(|one| one.weight).sum();
    let choice = match (total, drops, algorithm.as_str()) {
        (0, true, _) => {
            "dropped: there are backends, but none that may be used from here (traffic policy Local)".into()
        }
        (0, false, _) => {
            "refused: there is no backend (TCP reset, ICMP port unreachable)".to_owned()
        }
        (_, _, "random") => "at random, by weight".into(),
        (_, _, "maglev") if row.affinity_seconds > 0 => {
            "by a hash of the client's address (Maglev): the same client gets the same backend on every node".into()
        }
        (_, _, "maglev") => {
            "by a hash of addresses and ports (Maglev): the same connection gets the same backend on every node".into()
        }
        (_, _, "") => "the rows do not tell how".into(),
        (_, _, other) => other.to_owned(),
    };
    let percent = |weight: u64| {
        let share = weight as f64 * 100.0 / total.max(1) as f64;
        (share * 10.0).round() / 10.0
    };
    let backends = run
        .iter()
        .map(|one| Share {
            backend: one.backend.clone(),
            node: one.node.clone(),
            zone: one.zone.clone(),
            state: one.state.clone(),
            percent: percent(one.weight),
        })
        .collect();
    Chosen {
        run: if inside { "inside" } else { "outside" },
        why: why.to_owned(),
        choice,
        backends,
    }
}

/// Which policies may have a say. Which pods they select, the rows do not tell.
fn policy(rows: &[Value], client: &Client, service: &str) -> Vec<String> {
    let of = |namespace: &str, direction: &str| -> Vec<String> {
        let rows = rows.iter().filter(|row| {
            let types = row["types"].as_array().into_iter().flatten();
            row["namespace"] == namespace
                && types
                    .filter_map(Value::as_str)
                    .any(|one| one.eq_ignore_ascii_case(direction))
        });
        rows.filter_map(|row| row["policy"].as_str().map(str::to_owned))
            .collect()
    };
    let namespace_of = |name: &str| name.split('/').next().unwrap_or_default().to_owned();
    let mut notes = Vec::new();
    if let Client::Pod { name, .. } = client {
        let names = of(&namespace_of(name), "egress");
        if !names.is_empty() {
            notes.push(format!(
                "policies that may restrict what {name} sends: {}",
                names.join(", ")
            ));
        }
    }
    let names = of(&namespace_of(service), "ingress");
    if !names.is_empty() {
        notes.push(format!(
            "policies that may restrict what the backends receive: {} (`xebec observe --verdict DROPPED` shows what they drop)",
            names.join(", ")
        ));
    }
    notes
}

fn describe(client: &Client) -> String {
    match client {
        Client::Pod { name, address } => format!("{name} ({address})"),
        Client::Node => "a process of the node".into(),
        Client::Outside => "outside the cluster".into(),
        Client::Unknown(address) => {
            format!("{address}, which is no pod of an agent on this machine")
        }
    }
}

fn print(answer: &Answer) -> Result<()> {
    let port = match answer.port.as_str() {
        "" => String::new(),
        port => format!(" port {port}"),
    };
    println!(
        "To        {}{port}: {} {} ({})",
        answer.service,
        answer.kind,
        answer.frontend,
        if answer.state.is_empty() {
            "state not told"
        } else {
            &answer.state
        }
    );
    if let Some(condition) = &answer.condition {
        println!("If        {condition}");
    }
    println!("Affinity  {}", answer.affinity);
    for note in &answer.notes {
        println!("Note      {note}");
    }
    for run in &answer.runs {
        println!("Run       {}: {}", run.run, run.why);
        println!("Choice    {}", run.choice);
        if run.backends.is_empty() {
            continue;
        }
        let rows: Vec<[String; 5]> = run
            .backends
            .iter()
            .map(|one| {
                let share = format!("{:.1} %", one.percent);
                let of = |text: &str| if text.is_empty() { "<none>" } else { text }.to_owned();
                [
                    of(&one.backend),
                    share,
                    of(&one.state),
                    of(&one.node),
                    of(&one.zone),
                ]
            })
            .collect();
        println!();
        let header = ["BACKEND", "SHARE", "STATE", "NODE", "ZONE"];
        crate::text::write_table(&mut std::io::stdout(), &header, &rows)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rows() -> Vec<Row> {
        let backend = |last: u8, weight: u8, state: &str| json!({"backend": format!("10.244.0.{last}:80"), "state": state, "weight": weight, "node": "a"});
        let row = |kind: &str, frontend: &str, flags: &[&str], outside: Value| {
            json!({
                "service": "shop/cart", "port": "http", "type": kind, "frontend": frontend, "number": 4,
                "algorithm": {"inside": "random", "outside": "maglev"}, "flags": flags, "state": "ok",
                "inside": [backend(5, 3, "active"), backend(6, 1, "active"), backend(7, 0, "terminating")],
                "outside": outside,
            })
        };
        let mut dns = row("ClusterIP", "10.96.0.10:53/UDP", &[], json!([]));
        dns["service"] = "kube-system/kube-dns".into();
        dns["number"] = 1.into();
        let mut dns_tcp = dns.clone();
        dns_tcp["frontend"] = "10.96.0.10:53/TCP".into();
        dns_tcp["number"] = 2.into();
        dns_tcp["inside"] = json!([]);
        let all = json!([
            row("ClusterIP", "10.96.1.1:80/TCP", &[], json!([])),
            row(
                "NodePort",
                "0.0.0.0:30080/TCP",
                &["external", "drop-outside"],
                json!([])
            ),
            dns,
            dns_tcp,
        ]);
        serde_json::from_value(all).unwrap()
    }

    fn ask(client: &Client, to: &str) -> Result<Vec<Answer>> {
        let (target, protocol) = target(to)?;
        trace(&rows(), client, &target, protocol.as_deref())
    }

    fn pod() -> Client {
        Client::Pod {
            name: "shop/web".into(),
            address: [10, 244, 0, 9].into(),
        }
    }

    #[test]
    fn a_pod_gets_the_inside_by_weight() {
        for to in [
            "shop/cart",
            "cart.shop:80",
            "cart.shop.svc.cluster.local:http/tcp",
            "10.96.1.1:80",
        ] {
            let answers = ask(&pod(), to).unwrap();
            let [answer] = answers.as_slice() else {
                panic!("{to}: {answers:?}")
            };
            assert_eq!(answer.frontend, "10.96.1.1:80/TCP");
            let [run] = answer.runs.as_slice() else {
                panic!("{answer:?}")
            };
            assert_eq!(run.run, "inside");
            let shares: Vec<f64> = run.backends.iter().map(|one| one.percent).collect();
            assert_eq!(shares, [75.0, 25.0, 0.0]);
        }
    }

    #[test]
    fn the_outside_gets_what_leads_in() {
        let answers = ask(&Client::Outside, "shop/cart").unwrap();
        assert_eq!(answers.len(), 1);
        assert_eq!(answers[0].kind, "NodePort");
        assert!(answers[0].runs[0].choice.starts_with("dropped"));
        // The ClusterIP is no way in; whoever reaches it all the same is served as the inside.
        let answers = ask(&Client::Outside, "10.96.1.1:80").unwrap();
        assert_eq!(answers[0].runs[0].run, "inside");
    }

    #[test]
    fn what_the_rows_do_not_tell_is_said() {
        let unknown = Client::Unknown([10, 244, 3, 3].into());
        let answers = ask(&unknown, "192.0.2.1:30080").unwrap();
        assert!(answers[0].condition.as_ref().unwrap().contains("192.0.2.1"));
        let runs: Vec<_> = answers[0].runs.iter().map(|run| run.run).collect();
        assert_eq!(runs, ["inside", "outside"]);
    }

    #[test]
    fn ports_are_told_apart() {
        let error = ask(&pod(), "kube-system/kube-dns").unwrap_err().to_string();
        assert!(error.contains("53/TCP, 53/UDP"), "{error}");
        let answers = ask(&pod(), "kube-system/kube-dns/UDP").unwrap();
        assert_eq!(answers[0].frontend, "10.96.0.10:53/UDP");
        let answers = ask(&pod(), "10.96.0.10:53/TCP").unwrap();
        assert!(answers[0].runs[0].choice.starts_with("refused"));
        for (to, says) in [
            ("shop/cart:81", "no such port"),
            ("shop/nothing", "service list"),
            ("10.96.1.1:81", "untranslated"),
            ("10.96.1.1", "no port"),
            ("/x", "NAMESPACE/NAME"),
        ] {
            let error = ask(&pod(), to).unwrap_err().to_string();
            assert!(error.contains(says), "{to}: {error}");
        }
    }

    #[test]
    fn clients_are_known_by_name_or_address() {
        let endpoints = [(
            "a".to_owned(),
            vec![json!({"namespace": "shop", "pod": "web", "address": "10.244.0.9"})],
        )];
        for from in ["shop/web", "10.244.0.9"] {
            assert_eq!(client(from, &endpoints).unwrap(), (pod(), Some("a".into())));
        }
        let (unknown, home) = client("10.244.0.8", &endpoints).unwrap();
        assert_eq!(
            (unknown, home),
            (Client::Unknown([10, 244, 0, 8].into()), None)
        );
        assert_eq!(client("outside", &endpoints).unwrap().0, Client::Outside);
        assert!(
            client("web", &endpoints).is_err(),
            "of the default namespace"
        );
    }

    #[test]
    fn policies_that_may_matter_are_named() {
        let rows = [
            json!({"namespace": "shop", "policy": "in", "types": ["Ingress"]}),
            json!({"namespace": "shop", "policy": "out", "types": ["Egress"]}),
            json!({"namespace": "other", "policy": "x", "types": ["Ingress", "Egress"]}),
        ];
        let notes = policy(&rows, &pod(), "shop/cart");
        assert_eq!(notes.len(), 2);
        assert!(
            notes[0].ends_with(": out") && notes[1].contains(": in "),
            "{notes:?}"
        );
        assert!(policy(&rows, &Client::Node, "kube-system/kube-dns").is_empty());
    }
}
