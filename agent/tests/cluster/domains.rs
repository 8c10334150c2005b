//! Rules that name domains, with a real resolver: the pod's first packet to what it was told of is let through, and
//! nothing else is.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use simple_dns::rdata::RData;
use simple_dns::{CLASS, Name, Packet, PacketFlag, QCLASS, QTYPE, Question, TYPE};

use crate::alone;
use crate::stage::{
    FAR_POD, OTHER, OUTSIDE, Options, Stage, TARGET, Talk, left_out, retransmissions,
};

/// How many names have an address of their own.
const SITES: u32 = 200;
/// How long anything may take that is not forbidden.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it is waited for what is.
const MOMENT: Duration = Duration::from_millis(300);

/// Debian's dnsmasq at some addresses of the other node; it ends with this.
pub struct Resolver {
    process: Child,
    _folder: tempfile::TempDir,
}

impl Resolver {
    /// Answers with these records at these addresses.
    pub fn start(stage: &Stage, at: &[&str], records: &[String]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("dnsmasq.conf");
        let mut text = String::from(
            "no-resolv\nno-hosts\nbind-interfaces\nuser=root\npid-file=\nlocal-ttl=300\n",
        );
        for address in at {
            text.push_str(&format!("listen-address={address}\n"));
        }
        text.push_str(&records.join("\n"));
        text.push('\n');
        std::fs::write(&path, text).unwrap();
        let process = stage.on_other_node(|| {
            Command::new("dnsmasq")
                .arg("--keep-in-foreground")
                .arg(format!("--conf-file={}", path.display()))
                .stdin(Stdio::null())
                .spawn()
                .expect("the Debian package dnsmasq-base is needed")
        });
        Self {
            process,
            _folder: folder,
        }
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn question(name: &str, kind: TYPE) -> Vec<u8> {
    let mut message = Packet::new_query(4711);
    message.set_flags(PacketFlag::RECURSION_DESIRED);
    message.questions.push(Question::new(
        Name::new_unchecked(name),
        QTYPE::TYPE(kind),
        QCLASS::CLASS(CLASS::IN),
        false,
    ));
    message.build_bytes_vec().unwrap()
}

fn addresses(answer: &[u8]) -> Vec<IpAddr> {
    let answer = Packet::parse(answer).unwrap();
    let all = answer.answers.iter();
    all.filter_map(|record| match &record.rdata {
        RData::A(one) => Some(IpAddr::V4(one.address.into())),
        RData::AAAA(one) => Some(IpAddr::V6(one.address.into())),
        _ => None,
    })
    .collect()
}

/// What the pod is told of a name by UDP; none where no answer comes.
pub fn ask(
    stage: &Stage,
    server: &str,
    name: &str,
    kind: TYPE,
    patience: Duration,
) -> Option<Vec<IpAddr>> {
    let server: IpAddr = server.parse().unwrap();
    stage.pod.run(|| {
        let any = if server.is_ipv4() {
            "0.0.0.0:0"
        } else {
            "[::]:0"
        };
        let socket = UdpSocket::bind(any).unwrap();
        socket.set_read_timeout(Some(patience)).unwrap();
        socket.send_to(&question(name, kind), (server, 53)).unwrap();
        let mut buffer = [0; 2048];
        let length = socket.recv(&mut buffer).ok()?;
        Some(addresses(&buffer[..length]))
    })
}

/// The same by TCP.
pub fn ask_by_tcp(stage: &Stage, server: &str, name: &str) -> Vec<IpAddr> {
    stage.pod.run(|| {
        let mut stream = TcpStream::connect((server, 53)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let question = question(name, TYPE::A);
        let length = u16::try_from(question.len()).unwrap();
        stream.write_all(&length.to_be_bytes()).unwrap();
        stream.write_all(&question).unwrap();
        let mut length = [0; 2];
        stream.read_exact(&mut length).unwrap();
        let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
        stream.read_exact(&mut answer).unwrap();
        addresses(&answer)
    })
}

/// A connection of the pod; none where none is made.
fn dial(stage: &Stage, to: IpAddr, patience: Duration) -> Option<TcpStream> {
    let to = SocketAddr::new(to, TARGET);
    stage.pod.run(|| {
        let stream = TcpStream::connect_timeout(&to, patience).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Some(stream)
    })
}

fn policy(egress: Value) -> Value {
    json!({
        "apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy",
        "metadata": {"namespace": "n", "name": "sites"},
        "spec": {"endpointSelector": {}, "egress": egress},
    })
}

fn site(number: u32) -> IpAddr {
    IpAddr::V4((0x0a80_4000 + number).into())
}

fn records() -> Vec<String> {
    let mut records: Vec<String> = (0..SITES)
        .map(|number| format!("host-record=n{number}.sites.example,{}", site(number)))
        .collect();
    records.extend([
        format!("host-record=site.example,{},{}", OUTSIDE[0], OUTSIDE[1]),
        "cname=alias.example,site.example".to_owned(),
        format!("host-record=short.sites.example,{},1", site(1_000)),
        format!("host-record=used.sites.example,{},1", site(1_001)),
        format!("host-record=other.example,{}", site(1_002)),
        format!("host-record=tcp.sites.example,{}", site(1_003)),
        format!("host-record=late.sites.example,{}", site(1_004)),
    ]);
    records
}

/// A stage with a pod that may ask the resolver, and speak with sites; the pod's addresses.
fn stage() -> (Stage, [IpAddr; 2]) {
    let mut stage = Stage::new();
    stage.api.set(
        "customresourcedefinitions",
        [json!({"metadata": {"name": "ciliumnetworkpolicies.cilium.io"}})],
    );
    stage.api.set(
        "ciliumnetworkpolicies",
        [policy(json!([
            {"toEntities": ["remote-node"], "toPorts": [{"ports": [{"port": "53", "protocol": "ANY"}]}]},
            {"toCIDR": [FAR_POD[0]], "toPorts": [{"ports": [{"port": "53", "protocol": "ANY"}]}]},
            {"toFQDNs": [{"matchName": "site.example"}, {"matchName": "alias.example"}, {"matchPattern": "*.sites.example"}],
             "toPorts": [{"ports": [{"port": TARGET.to_string(), "protocol": "TCP"}]}]},
        ]))],
    );
    stage.start(&Options::default());
    stage.wait_until_ready();
    let own = stage.connect();
    stage.wait("the policy is in force", |stage| {
        let policies = stage.try_ask("GET", "/tables/policies", "").unwrap();
        policies[0]["state"] == "in force"
    });
    (stage, own)
}

fn answers(stage: &Stage) -> [u64; 2] {
    let status = stage.try_ask("GET", "/status", "").unwrap();
    ["held", "not_held"].map(|name| status["dns_answers"][name].as_u64().unwrap())
}

#[test]
fn the_first_packet_to_a_name_is_let_through() {
    if left_out() {
        return;
    }
    let _alone = alone();
    let (mut stage, own) = stage();
    let resolver = Resolver::start(&stage, &OTHER, &records());
    let mut up = None;
    for _ in 0..100 {
        up = ask(&stage, OTHER[0], "other.example", TYPE::A, MOMENT);
        if up.is_some() {
            break;
        }
    }
    assert_eq!(up, Some(vec![site(1_002)]));
    // Nothing but what was asked for, and allowed.
    assert!(dial(&stage, site(1_002), MOMENT).is_none());
    assert!(dial(&stage, site(0), MOMENT).is_none());
    for number in 0..SITES {
        let told = ask(
            &stage,
            OTHER[0],
            &format!("N{number}.sites.example"),
            TYPE::A,
            PATIENCE,
        );
        assert_eq!(told, Some(vec![site(number)]));
        let stream = dial(&stage, site(number), PATIENCE);
        let stream = stream.unwrap_or_else(|| panic!("{number}\n{}", stage.log()));
        assert_eq!(retransmissions(&stream), 0, "{number}");
    }
    // By both families and by TCP, and by an alias.
    let told = ask(&stage, OTHER[1], "alias.example", TYPE::AAAA, PATIENCE).unwrap();
    assert_eq!(told, [OUTSIDE[1].parse::<IpAddr>().unwrap()]);
    assert_eq!(
        ask_by_tcp(&stage, OTHER[0], "tcp.sites.example"),
        [site(1_003)]
    );
    assert!(dial(&stage, site(1_003), PATIENCE).is_some());
    let [held, passed] = answers(&stage);
    assert!(held > u64::from(SITES) && passed == 0, "{held}, {passed}");
    let rows = stage.try_ask("GET", "/tables/fqdns", "").unwrap();
    let row = rows
        .as_array()
        .unwrap()
        .iter()
        .find(|row| row["domain"] == "n7.sites.example");
    let row = row.unwrap();
    assert_eq!(row["address"], json!(site(7)));
    assert_eq!(row["policies"], json!(["CiliumNetworkPolicy n/sites"]));
    assert_eq!(
        stage.metric("xebec_dns_answers_held_total"),
        Some(held as f64)
    );
    // As the kubelet tells the API.
    let pod = json!({
        "metadata": {"namespace": "n", "name": "client", "labels": {}},
        "spec": {"nodeName": "a", "containers": []},
        "status": {"phase": "Running", "podIPs": own.map(|ip| json!({"ip": ip}))},
    });
    stage.api.set("pods", [pod]);
    let path = "/policy/explain?from=n/client&to=domain:alias.example&port=8080&family=6";
    stage.wait("a name is explained", |stage| {
        let said = stage.try_ask("GET", path, "").unwrap();
        said["egress"]["rule"] == "CiliumNetworkPolicy n/sites egress[2]"
    });
    drop(resolver);
}

#[test]
fn whom_nobody_believes_opens_nothing() {
    if left_out() {
        return;
    }
    let _alone = alone();
    let (stage, _) = stage();
    // The pod may ask it, but it is neither a node nor the cluster's resolver.
    let _resolver = Resolver::start(&stage, &FAR_POD, &records());
    let mut told = None;
    for _ in 0..100 {
        told = ask(&stage, FAR_POD[0], "n1.sites.example", TYPE::A, MOMENT);
        if told.is_some() {
            break;
        }
    }
    // The pod gets its answer all the same.
    assert_eq!(told, Some(vec![site(1)]));
    assert!(dial(&stage, site(1), MOMENT).is_none());
    assert_eq!(stage.try_ask("GET", "/tables/fqdns", ""), Some(json!([])));
}

#[test]
fn names_outlive_agents_and_connections_names() {
    if left_out() {
        return;
    }
    let _alone = alone();
    let (mut stage, _) = stage();
    let _resolver = Resolver::start(&stage, &OTHER, &records());
    stage.wait("the resolver answers", |stage| {
        ask(stage, OTHER[0], "site.example", TYPE::A, MOMENT).is_some()
    });
    let of = |name: &str| format!("{name}.sites.example");
    for name in ["short", "used", "n5"] {
        assert!(ask(&stage, OTHER[0], &of(name), TYPE::A, PATIENCE).is_some());
    }
    let used = Talk::begin(dial(&stage, site(1_001), PATIENCE).unwrap());
    let kept = Talk::begin(dial(&stage, site(5), PATIENCE).unwrap());
    // Without an agent, nobody sends on what is held: soon nothing is, and pods get their answers, of which no rule
    // learns.
    stage.kill();
    let told = (0..100).find_map(|_| ask(&stage, OTHER[0], &of("late"), TYPE::A, MOMENT));
    assert_eq!(told, Some(vec![site(1_004)]));
    assert!(dial(&stage, site(1_004), MOMENT).is_none());
    assert!(dial(&stage, site(5), PATIENCE).is_some());
    stage.start(&Options::default());
    stage.wait_until_ready();
    // What ended and is not used any more goes, what is used stays.
    stage.wait("what ended is forgotten", |stage| {
        let rows = stage.try_ask("GET", "/tables/fqdns", "").unwrap();
        let rows = rows.as_array().unwrap();
        !rows
            .iter()
            .any(|row| row["domain"] == "short.sites.example")
    });
    assert!(dial(&stage, site(1_000), MOMENT).is_none());
    for (name, address) in [("used", site(1_001)), ("n5", site(5))] {
        assert!(
            dial(&stage, address, PATIENCE).is_some(),
            "{name}\n{}",
            stage.log()
        );
    }
    for talk in [used, kept] {
        let (count, _, again) = talk.end();
        assert!(count > 0 && again == 0, "{count} {again}");
    }
    // Asked again, it is known.
    assert!(ask(&stage, OTHER[0], &of("late"), TYPE::A, PATIENCE).is_some());
    assert!(dial(&stage, site(1_004), PATIENCE).is_some());
}
