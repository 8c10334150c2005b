//! Messages that pods exchange, as they are told of.

use std::net::Ipv4Addr;

use simple_dns::rdata::{A, CNAME, RData};
use simple_dns::{CLASS, Name, Packet, QCLASS, QTYPE, Question, RCODE, ResourceRecord, TYPE};
use xebec_dataplane_common::{TCP, UDP};
use xebec_hubble::flow::{Dns, Http};

use super::*;

const WEB: [u8; 4] = [10, 244, 0, 5];
const DNS: [u8; 4] = [10, 244, 0, 9];
const API: [u8; 4] = [10, 244, 0, 6];

fn pod(name: &str) -> Arc<Peer> {
    let name = ("shop".to_owned(), name.to_owned());
    Arc::new(Peer::pod(&name, 1000, &Default::default(), None))
}

fn event(from: ([u8; 4], u16), to: ([u8; 4], u16), protocol: u8, at: u64) -> Event {
    Event {
        time: at,
        source: Ipv4Addr::from(from.0).into(),
        source_port: from.1.to_be(),
        destination: Ipv4Addr::from(to.0).into(),
        destination_port: to.1.to_be(),
        protocol,
        socket: at,
        ..bytemuck::Zeroable::zeroed()
    }
}

fn question(id: u16, name: &str, kind: TYPE) -> Packet<'_> {
    let mut message = Packet::new_query(id);
    message.questions.push(Question::new(
        Name::new_unchecked(name),
        QTYPE::TYPE(kind),
        QCLASS::CLASS(CLASS::IN),
        false,
    ));
    message
}

fn answer(id: u16, name: &str, records: Vec<(&str, u32, RData<'static>)>) -> Vec<u8> {
    let mut message = question(id, name, TYPE::A).into_reply();
    for (name, ttl, data) in records {
        let name = Name::new_unchecked(name).into_owned();
        message
            .answers
            .push(ResourceRecord::new(name, CLASS::IN, ttl, data));
    }
    message.build_bytes_vec_compressed().unwrap()
}

fn address(address: [u8; 4]) -> RData<'static> {
    let address = u32::from_be_bytes(address);
    RData::A(A { address })
}

/// What the packets say, with how long each took and its line.
fn heard(listener: &mut Listener, event: &Event, bytes: &[u8]) -> Vec<(u64, String)> {
    let said = listener.hear(event, bytes, &pod("web-1"));
    said.iter()
        .map(|one| (one.latency_ns, summary(one)))
        .collect()
}

fn dns(said: &Layer7) -> &Dns {
    match &said.record {
        Some(Record::Dns(dns)) => dns,
        other => panic!("{other:?}"),
    }
}

fn http(said: &Layer7) -> &Http {
    match &said.record {
        Some(Record::Http(http)) => http,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_answer_tells_what_was_asked_and_how_long_it_took() {
    let mut listener = Listener::default();
    let (own, resolver) = ((WEB, 4000), (DNS, 53));
    let asks = question(7, "WWW.Example.com", TYPE::A);
    let asks = asks.build_bytes_vec().unwrap();
    let asked = event(own, resolver, UDP, 1_000);
    assert_eq!(
        heard(&mut listener, &asked, &asks),
        [(0, "DNS Query WWW.Example.com. A".to_owned())]
    );
    let alias = RData::CNAME(CNAME(Name::new_unchecked("cdn.example.net")));
    let bytes = answer(
        7,
        "WWW.Example.com",
        vec![
            ("www.example.com", 60, alias),
            ("cdn.example.net", 30, address([192, 0, 2, 1])),
            ("cdn.example.net", 30, address([192, 0, 2, 2])),
        ],
    );
    let given = event(resolver, own, UDP, 5_000);
    let said = listener.hear(&given, &bytes, &pod("web-1"));
    assert_eq!((said.len(), said[0].latency_ns), (1, 4_000));
    assert_eq!(
        *dns(&said[0]),
        Dns {
            query: "WWW.Example.com.".to_owned(),
            ips: vec!["192.0.2.1".to_owned(), "192.0.2.2".to_owned()],
            ttl: 30,
            cnames: vec!["cdn.example.net.".to_owned()],
            observation_source: "datapath".to_owned(),
            rcode: 0,
            qtypes: vec!["A".to_owned()],
            rrtypes: ["CNAME", "A", "A"].map(str::to_owned).to_vec(),
        }
    );
    assert_eq!(
        summary(&said[0]),
        "DNS Answer \"192.0.2.1,192.0.2.2\" CNAMEs: \"cdn.example.net.\" TTL: 30 (Query WWW.Example.com. A)"
    );
    assert!(is_response(&said[0]));
    // A second answer to one question has no time, nor does another client's.
    assert_eq!(heard(&mut listener, &given, &bytes)[0].0, 0);
    // The pod that asked calls the address so, and nobody else does.
    let (web, other) = (Ipv4Addr::from(WEB).into(), Ipv4Addr::from(API).into());
    let there = Ipv4Addr::new(192, 0, 2, 2).into();
    let called = listener.names(&pod("web-1"), web, there, 6_000);
    assert_eq!(*called.unwrap(), ["www.example.com"]);
    assert_eq!(listener.names(&pod("api-1"), other, there, 6_000), None);
}

#[test]
fn failures_and_odd_names_are_told() {
    let mut listener = Listener::default();
    let given = event((DNS, 53), (WEB, 4000), UDP, 5_000);
    let mut failed = question(7, "nowhere.example", TYPE::AAAA).into_reply();
    *failed.rcode_mut() = RCODE::NameError;
    let failed = failed.build_bytes_vec().unwrap();
    let line = "DNS Answer RCode: Non-Existent Domain TTL: 0 (Query nowhere.example. AAAA)";
    assert_eq!(
        heard(&mut listener, &given, &failed),
        [(0, line.to_owned())]
    );
    // Cut off where it was too long to be told of, it still says what was asked and that it failed.
    let mut long = answer(8, "a.example", vec![("a.example", 5, address(API))]);
    long.truncate(long.len() - 1);
    let line = "DNS Answer  TTL: 0 (Query a.example. A)";
    assert_eq!(heard(&mut listener, &given, &long), [(0, line.to_owned())]);
    let asks = question(9, "aXb.example", TYPE::Unknown(65));
    let mut asks = asks.build_bytes_vec().unwrap();
    for (odd, line) in [
        (b'.', "DNS Query a\\.b.example. HTTPS"),
        (b'\n', "DNS Query a\\010b.example. HTTPS"),
        (0xff, "DNS Query a\\255b.example. HTTPS"),
    ] {
        asks[14] = odd;
        assert_eq!(heard(&mut listener, &given, &asks), [(0, line.to_owned())]);
    }
    // What is none says nothing.
    for bytes in [&[][..], b"x", &[0; 12], &[0xff; 40], &[0; 600]] {
        assert_eq!(heard(&mut listener, &given, bytes), []);
    }
}

#[test]
fn by_tcp_each_message_of_a_segment_is_told() {
    let mut listener = Listener::default();
    let mut stream = Vec::new();
    for id in [1, 2] {
        let asks = question(id, "a.example", TYPE::A);
        let asks = asks.build_bytes_vec().unwrap();
        stream.extend(u16::try_from(asks.len()).unwrap().to_be_bytes());
        stream.extend(asks);
    }
    let asked = event((WEB, 4000), (DNS, 53), TCP, 1);
    assert_eq!(heard(&mut listener, &asked, &stream).len(), 2);
    assert_eq!(
        heard(&mut listener, &asked, &stream[..stream.len() - 1]).len(),
        1
    );
    // With the length before it.
    let (length, rest) = stream.split_at(2);
    assert_eq!(heard(&mut listener, &asked, length), []);
    assert_eq!(
        heard(&mut listener, &asked, &rest[..rest.len() / 2 - 1]).len(),
        1
    );
}

#[test]
fn what_nobody_answers_is_counted() {
    let mut listener = Listener::default();
    const SECOND: u64 = 1_000_000_000;
    for (id, at) in [(1, 0), (2, 10), (3, 20)] {
        let asks = question(id, "a.example", TYPE::A);
        let asked = event((WEB, 4000), (DNS, 53), UDP, at * SECOND);
        listener.hear(&asked, &asks.build_bytes_vec().unwrap(), &pod("dns-1"));
    }
    let given = event((DNS, 53), (WEB, 4000), UDP, 11 * SECOND);
    listener.hear(&given, &answer(2, "a.example", vec![]), &pod("web-1"));
    assert_eq!(
        [10, 16, 17, 36].map(|at| listener.tidy(at * SECOND)),
        [0, 1, 0, 1]
    );
}

#[test]
fn requests_are_told_with_their_answers() {
    let mut listener = Listener::default();
    let (client, server) = ((WEB, 4000), (API, 8080));
    let mut at = 0;
    let mut hear = |from, to, bytes: &[u8]| {
        at += 2_000_000;
        heard(&mut listener, &event(from, to, TCP, at), bytes)
    };
    let one = |took: u64, line: &str| vec![(took, line.to_owned())];
    // Two at once; then their answers, one of which says first that it is being worked on.
    let asks = b"GET /cart?token=secret HTTP/1.1\r\nHost: api.shop\r\nCookie: secret\r\n\r\n";
    let line = "HTTP/1.1 GET http://api.shop/cart";
    assert_eq!(hear(client, server, asks), one(0, line));
    let asks = b"POST /buy HTTP/1.1\r\nhOST:  shop \r\n\r\nbody";
    let line = "HTTP/1.1 POST http://shop/buy";
    assert_eq!(hear(client, server, asks), one(0, line));
    for (bytes, took, line) in [
        (
            &b"HTTP/1.1 200 OK\r\n\r\n"[..],
            4_000_000,
            "HTTP/1.1 200 4ms (GET http://api.shop/cart)",
        ),
        (
            b"HTTP/1.1 100 Continue\r\n\r\n",
            4_000_000,
            "HTTP/1.1 100 4ms (POST http://shop/buy)",
        ),
        (
            b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1",
            6_000_000,
            "HTTP/1.1 503 6ms (POST http://shop/buy)",
        ),
        // Nobody knows what this answers.
        (b"HTTP/1.0 404 Not Found\r\n\r\n", 0, "HTTP/1.0 404 0ms ( )"),
    ] {
        assert_eq!(hear(server, client, bytes), one(took, line));
    }
}

#[test]
fn what_is_sent_twice_is_told_once() {
    let mut listener = Listener::default();
    let asked = event((WEB, 4000), (API, 80), TCP, 5);
    let asks = b"GET / HTTP/1.1\r\n\r\n";
    let again = Event { time: 9, ..asked };
    assert_eq!(heard(&mut listener, &asked, asks).len(), 1);
    assert_eq!(heard(&mut listener, &again, asks).len(), 0);
    let answer = event((API, 80), (WEB, 4000), TCP, 15);
    assert_eq!(
        heard(&mut listener, &answer, b"HTTP/1.1 204 No Content\r\n\r\n")[0].0,
        10
    );
    assert_eq!(
        heard(&mut listener, &answer, b"HTTP/1.1 204 No Content\r\n\r\n").len(),
        0
    );
}

#[test]
fn of_too_many_requests_at_once_no_answer_is_told_another_ones() {
    let mut listener = Listener::default();
    for at in 1..=17 {
        let asked = event((WEB, 4000), (API, 80), TCP, at);
        heard(&mut listener, &asked, b"GET / HTTP/1.1\r\n\r\n");
    }
    let answer = event((API, 80), (WEB, 4000), TCP, 20);
    let said = listener.hear(&answer, b"HTTP/1.1 200 OK\r\n\r\n", &pod("web-1"));
    assert_eq!(
        (said[0].latency_ns, http(&said[0]).method.as_str()),
        (0, "")
    );
}

#[test]
fn urls_are_told_without_what_may_be_secret() {
    let url = |target: &str, redact_query| {
        let mut listener = Listener::new(HttpOptions { redact_query });
        let bytes = format!("GET {target} HTTP/1.1\r\nHost: shop\r\n\r\n");
        let asked = event((WEB, 4000), (API, 80), TCP, 1);
        let said = listener.hear(&asked, bytes.as_bytes(), &pod("api-1"));
        http(&said[0]).url.clone()
    };
    for (target, told, whole) in [
        ("/a?b=c", "http://shop/a", "http://shop/a?b=c"),
        ("/a#b?c", "http://shop/a", "http://shop/a#b?c"),
        ("*", "*", "*"),
        ("http://me:pass@x/a?b", "http://x/a", "http://x/a?b"),
        ("http://me:pass@x?b@c", "http://x", "http://x?b@c"),
    ] {
        assert_eq!([url(target, true), url(target, false)], [told, whole]);
    }
    // Of a line that is too long, what there is.
    let mut listener = Listener::default();
    let asked = event((WEB, 4000), (API, 80), TCP, 1);
    let bytes = b"DELETE /a/very/long/path";
    let line = "DELETE /a/very/long/path\u{2026}".to_owned();
    let told = heard(&mut listener, &asked, bytes);
    assert_eq!(told[0].1.trim(), line);
}

#[test]
fn what_is_no_http_says_nothing() {
    let mut listener = Listener::default();
    let asked = event((WEB, 4000), (API, 80), TCP, 1);
    for bytes in [
        &b"GET"[..],
        b"GET \x00/ HTTP/1.1\r\n\r\n",
        b"PUT / HTTP/9.9\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.",
        b"HTTP/2 200 OK\r\n",
        b"HEAD\xff\xff\xff",
    ] {
        assert_eq!(heard(&mut listener, &asked, bytes), [], "{bytes:?}");
    }
}
