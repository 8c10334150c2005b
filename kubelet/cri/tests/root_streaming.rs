//! Exec, attach and port-forward through the streaming server, as its clients use it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod harness;

use std::time::Duration;

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use harness::spdy::{self, Spdy};
use harness::{Client, Node, pod, shell};
use http::{Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;
use xebec_cri_api::v1;

const LIMIT: Duration = Duration::from_secs(30);
/// The key of RFC 6455's example, and its answer.
const KEY: (&str, &str) = ("dGhlIHNhbXBsZSBub25jZQ==", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");

/// Asks for an upgrade with these headers.
async fn ask(url: &str, headers: &[(&str, &str)]) -> Response<Incoming> {
    let uri: Uri = url.parse().unwrap();
    let stream = TcpStream::connect(uri.authority().unwrap().as_str())
        .await
        .unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection.with_upgrades());
    let mut request = Request::post(uri.path()).header("Host", "localhost");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Empty::<Bytes>::new()).unwrap();
    sender.send_request(request).await.unwrap()
}

async fn body(response: Response<Incoming>) -> String {
    let body = response.into_body().collect().await.unwrap().to_bytes();
    String::from_utf8(body.to_vec()).unwrap()
}

fn websocket_headers(protocols: &str) -> [(&str, &str); 5] {
    [
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", KEY.0),
        ("Sec-WebSocket-Protocol", protocols),
    ]
}

type Socket = WebSocketStream<TokioIo<Upgraded>>;

async fn websocket(url: &str, protocols: &str, agreed: &str) -> Socket {
    let response = ask(url, &websocket_headers(protocols)).await;
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    let headers = response.headers();
    assert_eq!(headers["Sec-WebSocket-Accept"], KEY.1);
    assert_eq!(headers["Sec-WebSocket-Protocol"], agreed);
    let upgraded = hyper::upgrade::on(response).await.unwrap();
    WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Client, None).await
}

async fn spdy(url: &str, protocol: &str) -> Spdy<TokioIo<Upgraded>> {
    let headers = [
        ("Connection", "Upgrade"),
        ("Upgrade", "SPDY/3.1"),
        ("X-Stream-Protocol-Version", "v9.channel.k8s.io"),
        ("X-Stream-Protocol-Version", protocol),
    ];
    let response = ask(url, &headers).await;
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    assert_eq!(response.headers()["X-Stream-Protocol-Version"], protocol);
    Spdy::new(TokioIo::new(hyper::upgrade::on(response).await.unwrap()))
}

/// A message's channel and bytes.
fn message(channel: u8, data: &[u8]) -> Message {
    let mut all = vec![channel];
    all.extend_from_slice(data);
    Message::Binary(all.into())
}

/// All that came on each channel until the server closed the connection.
#[derive(Debug, Default)]
struct Heard {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    status: Value,
}

impl Heard {
    fn stdout(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }

    fn code(&self) -> &str {
        assert_eq!(self.status["reason"], "NonZeroExitCode", "{self:?}");
        self.status["details"]["causes"][0]["message"]
            .as_str()
            .unwrap()
    }

    async fn message(&mut self, socket: &mut Socket) -> bool {
        match socket.next().await.unwrap().unwrap() {
            Message::Binary(message) => {
                let (channel, data) = message.split_first().unwrap();
                match channel {
                    1 => self.stdout.extend_from_slice(data),
                    2 => self.stderr.extend_from_slice(data),
                    3 => self.status = serde_json::from_slice(data).unwrap(),
                    other => panic!("the server spoke on channel {other}"),
                }
                true
            }
            Message::Close(frame) => {
                assert_eq!(u16::from(frame.unwrap().code), 1000);
                false
            }
            other => panic!("{other:?}"),
        }
    }

    async fn until(&mut self, socket: &mut Socket, text: &str) {
        let find = async {
            while !self.stdout().contains(text) {
                assert!(self.message(socket).await, "closed before {text:?}");
            }
        };
        tokio::time::timeout(LIMIT, find).await.unwrap();
    }

    async fn all(mut self, socket: &mut Socket) -> Self {
        tokio::time::timeout(LIMIT, async { while self.message(socket).await {} })
            .await
            .unwrap();
        // The server waits for the answer to its close message, which reading sends.
        assert!(socket.next().await.is_none());
        self
    }
}

async fn exec_url(c: &mut Client, id: &str, script: &str, stdin: bool, tty: bool) -> String {
    c.0.exec(v1::ExecRequest {
        container_id: id.to_owned(),
        cmd: vec!["sh".to_owned(), "-c".to_owned(), script.to_owned()],
        tty,
        stdin,
        stdout: true,
        stderr: !tty,
    })
    .await
    .unwrap()
    .into_inner()
    .url
}

async fn run_in(c: &mut Client, id: &str, script: &str, stdin: bool, tty: bool) -> Socket {
    let url = exec_url(c, id, script, stdin, tty).await;
    websocket(
        &url,
        "v5.channel.k8s.io, v4.channel.k8s.io",
        "v5.channel.k8s.io",
    )
    .await
}

#[tokio::test]
async fn exec_over_websocket() {
    if harness::not_root() {
        return;
    }
    let node = Node::start();
    node.busybox();
    let mut c = Client(node.runtime().await);
    let sandbox = c.sandbox(pod(&node, "ws")).await;
    let id = c.run(&sandbox, shell("main", "sleep 1000")).await;

    // Both outputs, and success.
    let mut socket = run_in(&mut c, &id, "echo out; echo err >&2", false, false).await;
    let heard = Heard::default().all(&mut socket).await;
    assert_eq!(
        (heard.stdout(), &heard.stderr[..]),
        ("out\n", &b"err\n"[..])
    );
    assert_eq!(heard.status["status"], "Success");

    // An exit code, with the older protocol.
    let url = exec_url(&mut c, &id, "exit 42", false, false).await;
    let mut socket = websocket(&url, "v4.channel.k8s.io", "v4.channel.k8s.io").await;
    assert_eq!(Heard::default().all(&mut socket).await.code(), "42");

    // A command that is not there.
    let request = v1::ExecRequest {
        container_id: id.clone(),
        cmd: vec!["/no/such/file".to_owned()],
        stdout: true,
        ..v1::ExecRequest::default()
    };
    let url = c.0.exec(request).await.unwrap().into_inner().url;
    let mut socket = websocket(&url, "v5.channel.k8s.io", "v5.channel.k8s.io").await;
    let heard = Heard::default().all(&mut socket).await;
    assert_eq!(heard.status["reason"], "InternalError", "{heard:?}");
    let why = heard.status["message"].as_str().unwrap();
    assert!(why.contains("/no/such/file"), "{why}");

    // Input, its end, and output larger than all buffers in between.
    let mut socket = run_in(&mut c, &id, "cat; echo end; exit 3", true, false).await;
    let (mut sink, mut source) = (&mut socket).split();
    const PIECES: usize = 500;
    let piece: Vec<u8> = (0..20_000u32).map(|n| (n % 251) as u8).collect();
    let send = async {
        for _ in 0..PIECES {
            sink.send(message(0, &piece)).await.unwrap();
        }
        sink.send(message(255, &[0])).await.unwrap();
    };
    let receive = async {
        let mut all = Vec::new();
        while all.len() < PIECES * piece.len() {
            let message = source.next().await.unwrap().unwrap().into_data();
            assert_eq!(message[0], 1);
            all.extend_from_slice(&message[1..]);
        }
        all
    };
    let ((), mut all) = tokio::time::timeout(LIMIT, async { tokio::join!(send, receive) })
        .await
        .unwrap();
    drop((sink, source));
    // What is written after the input's end may come in one message with its last bytes.
    let stdout = all.split_off(PIECES * piece.len());
    let differ = all
        .iter()
        .zip(piece.iter().cycle())
        .position(|(a, b)| a != b);
    assert_eq!(differ, None, "bytes differ");
    let heard = Heard {
        stdout,
        ..Heard::default()
    };
    let heard = heard.all(&mut socket).await;
    assert_eq!((heard.stdout(), heard.code()), ("end\n", "3"));
    c.remove_sandbox(&sandbox).await;
}

#[tokio::test]
async fn a_terminal_has_a_size_and_echoes() {
    if harness::not_root() {
        return;
    }
    let node = Node::start();
    node.busybox();
    let mut c = Client(node.runtime().await);
    let sandbox = c.sandbox(pod(&node, "tty")).await;
    let id = c.run(&sandbox, shell("main", "sleep 1000")).await;
    let url = exec_url(&mut c, &id, "sh", true, true).await;
    let mut socket = websocket(&url, "v5.channel.k8s.io", "v5.channel.k8s.io").await;
    let mut heard = Heard::default();
    for (width, height) in [(132, 43), (81, 25)] {
        let size = format!("{{\"Width\":{width},\"Height\":{height}}}\n");
        socket.send(message(4, size.as_bytes())).await.unwrap();
        socket.send(message(0, b"stty size\n")).await.unwrap();
        heard
            .until(&mut socket, &format!("{height} {width}\r\n"))
            .await;
    }
    assert!(heard.stdout().contains("stty size"), "no echo: {heard:?}");
    socket.send(message(0, b"exit 9\n")).await.unwrap();
    assert_eq!(heard.all(&mut socket).await.code(), "9");
    c.remove_sandbox(&sandbox).await;
}

#[tokio::test]
async fn attach_joins_the_first_process() {
    if harness::not_root() {
        return;
    }
    let node = Node::start();
    node.busybox();
    let mut c = Client(node.runtime().await);
    let sandbox = c.sandbox(pod(&node, "attach")).await;
    let mut config = shell("main", "cat; echo input has ended; exit 4");
    config.stdin = true;
    config.stdin_once = true;
    let id = c.run(&sandbox, config).await;
    let request = v1::AttachRequest {
        container_id: id.clone(),
        stdin: true,
        stdout: true,
        stderr: true,
        tty: false,
    };
    let url = c.0.attach(request).await.unwrap().into_inner().url;
    let mut socket = websocket(&url, "v5.channel.k8s.io", "v5.channel.k8s.io").await;
    let mut heard = Heard::default();
    socket.send(message(0, b"hello\n")).await.unwrap();
    heard.until(&mut socket, "hello\n").await;
    socket.send(message(255, &[0])).await.unwrap();
    let heard = heard.all(&mut socket).await;
    assert_eq!(heard.stdout(), "hello\ninput has ended\n");
    // The container's status has its exit code; attach does not.
    assert_eq!(heard.status["status"], "Success");
    assert_eq!(c.wait_exit(&id).await.exit_code, 4);
    c.remove_sandbox(&sandbox).await;
}

#[tokio::test]
async fn only_a_fresh_token_opens_a_stream() {
    if harness::not_root() {
        return;
    }
    let node = Node::start();
    node.busybox();
    let mut c = Client(node.runtime().await);
    let sandbox = c.sandbox(pod(&node, "token")).await;
    let id = c.run(&sandbox, shell("main", "sleep 1000")).await;
    let headers = websocket_headers("v5.channel.k8s.io");

    let url = exec_url(&mut c, &id, "echo once", false, false).await;
    let uri: Uri = url.parse().unwrap();
    assert_eq!(uri.host(), Some("127.0.0.1"));
    let mut socket = websocket(&url, "v5.channel.k8s.io", "v5.channel.k8s.io").await;
    let again = ask(&url, &headers).await;
    assert_eq!(again.status(), StatusCode::NOT_FOUND);
    assert_eq!(Heard::default().all(&mut socket).await.stdout(), "once\n");
    assert_eq!(ask(&url, &headers).await.status(), StatusCode::NOT_FOUND);
    let guess = url.rsplit_once('/').unwrap().0.to_owned() + "/AAAAAAAAAAAAAAAAAAAAAA";
    assert_eq!(ask(&guess, &headers).await.status(), StatusCode::NOT_FOUND);

    let url = exec_url(&mut c, &id, "echo", false, false).await;
    let answer = ask(&url, &[]).await;
    assert_eq!(answer.status(), StatusCode::BAD_REQUEST);
    let url = exec_url(&mut c, &id, "echo", false, false).await;
    let answer = ask(&url, &websocket_headers("v9.channel.k8s.io")).await;
    assert_eq!(answer.status(), StatusCode::FORBIDDEN);
    let why = body(answer).await;
    assert!(why.contains("server accepts [v5.channel.k8s.io"), "{why}");

    // What makes no sense gets no URL.
    let wrong = v1::ExecRequest {
        container_id: id.clone(),
        cmd: vec!["true".to_owned()],
        ..v1::ExecRequest::default()
    };
    let code = |err: tonic::Status| err.code();
    assert_eq!(
        c.0.exec(wrong).await.map(|_| ()).map_err(code),
        Err(tonic::Code::InvalidArgument)
    );
    c.0.stop_container(v1::StopContainerRequest {
        container_id: id.clone(),
        timeout: 0,
    })
    .await
    .unwrap();
    let late = v1::ExecRequest {
        container_id: id.clone(),
        cmd: vec!["true".to_owned()],
        stdout: true,
        ..v1::ExecRequest::default()
    };
    c.0.exec(late).await.unwrap_err();
    c.remove_sandbox(&sandbox).await;
}

#[tokio::test]
async fn a_process_ends_with_its_client() {
    if harness::not_root() {
        return;
    }
    let node = Node::start();
    node.busybox();
    let mut c = Client(node.runtime().await);
    let sandbox = c.sandbox(pod(&node, "leave")).await;
    let id = c.run(&sandbox, shell("main", "sleep 1000")).await;
    let script = "echo ready; exec sleep 777";
    let mut socket = run_in(&mut c, &id, script, false, false).await;
    Heard::default().until(&mut socket, "ready").await;
    let running = c.exec(&id, &["ps"]).await;
    assert!(String::from_utf8_lossy(&running.stdout).contains("sleep 777"));
    drop(socket);
    let gone = async {
        loop {
            let running = c.exec(&id, &["ps"]).await;
            if !String::from_utf8_lossy(&running.stdout).contains("sleep 777") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(LIMIT, gone).await.unwrap();
    c.remove_sandbox(&sandbox).await;
}

#[tokio::test]
async fn exec_over_spdy() {
    if harness::not_root() {
        return;
    }
    let node = Node::start();
    node.busybox();
    let mut c = Client(node.runtime().await);
    let sandbox = c.sandbox(pod(&node, "spdy")).await;
    let id = c.run(&sandbox, shell("main", "sleep 1000")).await;

    let url = exec_url(&mut c, &id, "cat; echo oops >&2; exit 7", true, false).await;
    let mut client = spdy(&url, "v4.channel.k8s.io").await;
    let mut streams = Vec::new();
    for kind in ["error", "stdin", "stdout", "stderr"] {
        let id = client.open(&[("streamtype", kind)]).await;
        assert_eq!(client.hear().await, spdy::Heard::Reply(id));
        streams.push(id);
    }
    let [error, stdin, stdout, stderr] = streams[..] else {
        unreachable!()
    };
    client.ping(1).await;
    assert_eq!(client.hear().await, spdy::Heard::Ping(1));
    let sent = vec![b'x'; 100_000];
    client.data(stdin, &sent, false).await;
    client.data(stdin, b"\nlast\n", true).await;
    let mut heard: std::collections::HashMap<u32, Vec<u8>> = Default::default();
    let mut ended = Vec::new();
    while ended.len() < 4 {
        let frame = tokio::time::timeout(LIMIT, client.hear()).await.unwrap();
        let spdy::Heard::Data(id, data, fin) = frame else {
            panic!("{frame:?}");
        };
        assert!(!ended.contains(&id), "data after the end of stream {id}");
        heard.entry(id).or_default().extend_from_slice(&data);
        if fin {
            ended.push(id);
        }
    }
    let mut expected = sent;
    expected.extend_from_slice(b"\nlast\n");
    assert_eq!(heard[&stdout], expected);
    assert_eq!(heard[&stderr], b"oops\n");
    let heard = Heard {
        status: serde_json::from_slice(&heard[&error]).unwrap(),
        ..Heard::default()
    };
    assert_eq!(heard.code(), "7");
    assert_eq!(ended.last(), Some(&error), "the status comes last");
    drop(client);

    let url = exec_url(&mut c, &id, "sleep 0.2; stty size", true, true).await;
    let mut client = spdy(&url, "v4.channel.k8s.io").await;
    let mut ids = Vec::new();
    for kind in ["error", "stdin", "stdout", "resize"] {
        ids.push(client.open(&[("streamtype", kind)]).await);
    }
    client
        .data(ids[3], b"{\"Width\":99,\"Height\":33}\n", false)
        .await;
    let mut text = Vec::new();
    loop {
        match tokio::time::timeout(LIMIT, client.hear()).await.unwrap() {
            spdy::Heard::Data(id, data, fin) if id == ids[2] => {
                text.extend_from_slice(&data);
                if fin {
                    break;
                }
            }
            spdy::Heard::End => panic!("ended with {text:?}"),
            _ => {}
        }
    }
    assert_eq!(text, b"33 99\r\n");
    c.remove_sandbox(&sandbox).await;
}

/// A WebSocket as bytes.
fn untunnel(socket: Socket) -> tokio::io::DuplexStream {
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    let (mut from, mut to) = tokio::io::split(theirs);
    let (mut sink, mut source) = socket.split();
    tokio::spawn(async move {
        use tokio::io::AsyncReadExt;
        let mut piece = vec![0; 5000];
        while let Ok(read @ 1..) = from.read(&mut piece).await {
            let message = Message::Binary(Bytes::copy_from_slice(&piece[..read]));
            sink.send(message).await.unwrap();
        }
    });
    tokio::spawn(async move {
        use tokio::io::AsyncWriteExt;
        while let Some(Ok(message)) = source.next().await {
            if to.write_all(&message.into_data()).await.is_err() {
                return;
            }
        }
    });
    ours
}

/// Two connections at once through one client, then a port where nobody listens.
async fn forward<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>(mut client: Spdy<T>) {
    let pair = async |client: &mut Spdy<T>, port: &str, request: &str| {
        let mut ids = [0; 2];
        for (kind, id) in ["error", "data"].iter().zip(&mut ids) {
            let headers = [
                ("streamtype", *kind),
                ("port", port),
                ("requestid", request),
            ];
            *id = client.open(&headers).await;
            loop {
                // Answers of other streams come in between.
                match client.hear().await {
                    spdy::Heard::Reply(replied) if replied == *id => break,
                    spdy::Heard::End => panic!("the server left"),
                    _ => {}
                }
            }
        }
        client.data(ids[0], b"", true).await;
        ids
    };
    let one = pair(&mut client, "7000", "0").await;
    let two = pair(&mut client, "7000", "1").await;
    let sent: Vec<u8> = (0..200_000u32).map(|n| (n % 253) as u8).collect();
    client.data(one[1], &sent, false).await;
    client.data(two[1], b"two\n", false).await;
    let (mut first, mut second) = (Vec::new(), Vec::new());
    while first.len() < sent.len() || second.len() < 4 {
        match tokio::time::timeout(LIMIT, client.hear()).await.unwrap() {
            spdy::Heard::Data(id, data, false) if id == one[1] => first.extend(data),
            spdy::Heard::Data(id, data, false) if id == two[1] => second.extend(data),
            other => panic!("{other:?}"),
        }
    }
    assert!(first == sent, "bytes differ");
    assert_eq!(second, b"two\n");
    // The echo ends when its input does, and so does the stream.
    client.data(one[1], b"", true).await;
    client.reset(two[1]).await;
    let mut ended = Vec::new();
    while ended.len() < 3 {
        match tokio::time::timeout(LIMIT, client.hear()).await.unwrap() {
            spdy::Heard::Data(id, data, true) if data.is_empty() => ended.push(id),
            other => panic!("{other:?}"),
        }
    }
    ended.sort_unstable();
    assert_eq!(
        ended,
        [one[0], one[1], two[0]],
        "a stream reset is not answered"
    );

    let closed = pair(&mut client, "7001", "2").await;
    let mut why = Vec::new();
    loop {
        match tokio::time::timeout(LIMIT, client.hear()).await.unwrap() {
            spdy::Heard::Data(id, data, fin) if id == closed[0] => {
                why.extend(data);
                if fin {
                    break;
                }
            }
            other => panic!("{other:?}"),
        }
    }
    let why = String::from_utf8(why).unwrap();
    assert!(why.contains("7001") && why.contains("refused"), "{why}");
}

#[tokio::test]
async fn a_port_is_forwarded() {
    if harness::not_root() {
        return;
    }
    let node = Node::start();
    node.busybox();
    let mut c = Client(node.runtime().await);
    let sandbox = c.sandbox(pod(&node, "forward")).await;
    let id = c
        .run(&sandbox, shell("main", "exec nc -ll -p 7000 -e cat"))
        .await;
    let listens = async {
        while !String::from_utf8_lossy(
            &c.exec(&id, &["cat", "/proc/net/tcp6", "/proc/net/tcp"])
                .await
                .stdout,
        )
        .contains(":1B58 ")
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LIMIT, listens).await.unwrap();
    let request = v1::PortForwardRequest {
        pod_sandbox_id: sandbox.clone(),
        port: vec![],
    };
    let url = c.0.port_forward(request.clone()).await.unwrap();
    forward(spdy(&url.into_inner().url, "portforward.k8s.io").await).await;
    let url = c.0.port_forward(request).await.unwrap();
    let protocol = "SPDY/3.1+portforward.k8s.io";
    let socket = websocket(&url.into_inner().url, protocol, protocol).await;
    forward(Spdy::new(untunnel(socket))).await;
    c.remove_sandbox(&sandbox).await;
}
