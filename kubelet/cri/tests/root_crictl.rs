//! The server under the real crictl, from pulling an image to removing it. Runs where `$CRICTL` names one, or
//! one is on the PATH.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod harness;

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use harness::registry::{Registry, TestImage};
use harness::{Node, not_root};
use serde_json::{Value, json};

/// crictl at one server.
struct Crictl {
    program: String,
    socket: String,
}

impl Crictl {
    /// None where there is no crictl.
    fn find(node: &Node) -> Option<Self> {
        let program = std::env::var("CRICTL").unwrap_or_else(|_| "crictl".into());
        let there = Command::new(&program)
            .arg("--version")
            .output()
            .is_ok_and(|out| out.status.success());
        there.then(|| Self {
            program,
            socket: format!("unix://{}", node.path("run/cri.sock").display()),
        })
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(["--config", "/dev/null", "--timeout", "20s"])
            .args(["-r", &self.socket, "-i", &self.socket])
            .args(args)
            .stdin(Stdio::null())
            .stderr(Stdio::piped());
        command
    }

    fn output(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// What it prints when all goes well.
    fn run(&self, args: &[&str]) -> String {
        let out = self.output(args);
        let (said, error) = (text(&out.stdout), text(&out.stderr));
        assert!(out.status.success(), "crictl {args:?}: {said}{error}");
        said
    }

    fn json(&self, args: &[&str]) -> Value {
        let said = self.run(args);
        serde_json::from_str(&said).unwrap_or_else(|_| panic!("crictl {args:?}: {said}"))
    }

    /// What it complains of.
    fn fails(&self, args: &[&str]) -> String {
        let out = self.output(args);
        assert!(!out.status.success(), "crictl {args:?} succeeds");
        text(&out.stderr)
    }

    /// Starts it with a terminal of its own.
    fn in_terminal(&self, args: &[&str]) -> Child {
        let all: Vec<String> = ["--config", "/dev/null", "-r", &self.socket]
            .iter()
            .chain(args)
            .map(|arg| format!("'{arg}'"))
            .collect();
        Command::new("script")
            .args(["-qec", &format!("'{}' {}", self.program, all.join(" "))])
            .arg("/dev/null")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the Debian package bsdutils is needed")
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Ends a child by its id, however the test ends.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Feeds a child and gives what it says until its end.
fn converse(mut child: Child, says: &[u8]) -> String {
    child.stdin.take().unwrap().write_all(says).unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success(), "{}", text(&out.stdout));
    text(&out.stdout)
}

fn pull(crictl: &Crictl, registry: &Registry) -> String {
    registry.push("app", "v1", &TestImage::shell());
    let image = format!("{}/app:v1", registry.host);
    crictl.run(&["pull", &image]);
    let shown = crictl.json(&["inspecti", &image]);
    let id = shown["status"]["id"].as_str().unwrap();
    let images = crictl.run(&["images", "--no-trunc"]);
    assert!(images.contains(id), "{id}: {images}");
    image
}

fn one_pod(node: &Node, crictl: &Crictl, image: &str) -> (String, String) {
    let write = |name: &str, config: Value| -> String {
        let path = node.path(name);
        std::fs::write(&path, config.to_string()).unwrap();
        path.to_string_lossy().into_owned()
    };
    let pod = write(
        "pod.json",
        json!({
            "metadata": {"name": "sand", "namespace": "default", "attempt": 1, "uid": "u1"},
            "hostname": "sand", "log_directory": node.path("logs"), "labels": {"app": "sand"}, "linux": {},
        }),
    );
    // Answers on a port, and to whom is attached.
    let script = "trap 'exit 7' TERM; echo ready; (while true; do echo forwarded | nc -l -p 8080; done) & \
                  while read line; do echo \"heard $line\"; done; echo end; while true; do sleep 0.1; done";
    let container = write(
        "container.json",
        json!({
            "metadata": {"name": "one"}, "image": {"image": image}, "log_path": "one.log",
            "command": ["/bin/sh", "-c"], "args": [script], "stdin": true, "stdin_once": true, "linux": {},
        }),
    );
    let sandbox = crictl.run(&["runp", &pod]).trim().to_owned();
    let id = crictl.run(&["create", &sandbox, &container, &pod]);
    let id = id.trim().to_owned();
    assert!(crictl.run(&["ps", "-a"]).contains("Created"));
    crictl.run(&["start", &id]);
    (sandbox, id)
}

fn what_is_shown(crictl: &Crictl, sandbox: &str, id: &str) {
    assert!(crictl.run(&["ps", "--no-trunc"]).contains(id));
    assert!(
        crictl
            .run(&["pods", "--no-trunc", "--label", "app=sand"])
            .contains(sandbox)
    );
    let shown = crictl.json(&["inspect", id]);
    assert_eq!(shown["status"]["state"], "CONTAINER_RUNNING");
    assert!(
        shown["info"]["pid"].as_u64().is_some_and(|pid| pid > 0),
        "{shown}"
    );
    let shown = crictl.json(&["inspectp", sandbox]);
    assert_eq!(shown["status"]["state"], "SANDBOX_READY");
    let ip = shown["status"]["network"]["ip"]
        .as_str()
        .unwrap_or_default();
    assert!(ip.starts_with("10.213.7."), "{shown}");
    assert_eq!(crictl.run(&["logs", id]), "ready\n");
    let stats = &crictl.json(&["stats", "-o", "json", id])["stats"][0];
    assert_eq!(stats["attributes"]["id"], id);
    let used = stats["memory"]["workingSetBytes"]["value"].as_str();
    assert!(used.is_some_and(|used| used != "0"), "{stats}");
    assert!(crictl.run(&["stats"]).contains("one"));
    let stats = &crictl.json(&["statsp", "-o", "json", sandbox])["stats"][0];
    assert_eq!(stats["attributes"]["id"], sandbox);
    assert!(crictl.run(&["statsp"]).contains("sand"));
    assert!(crictl.json(&["imagefsinfo"])["status"]["imageFilesystems"][0].is_object());
    assert!(crictl.run(&["runtime-config"]).contains("CGROUPFS"));
}

fn commands(crictl: &Crictl, id: &str) {
    for how in [
        &["exec", "--sync"][..],
        &["exec", "--transport", "spdy"],
        &["exec", "--transport", "websocket"],
    ] {
        let shell = |script: &str| crictl.output(&[how, &[id, "/bin/sh", "-c", script]].concat());
        let out = shell("echo out; echo err >&2");
        let (said, error) = (text(&out.stdout), text(&out.stderr));
        if how.contains(&"--sync") {
            // crictl itself prints both to its output, each with a line's end more.
            assert_eq!(said, "out\n\nerr\n\n", "{error}");
        } else {
            assert_eq!(said, "out\n", "{how:?}: {error}");
            assert!(error.contains("err\n"), "{how:?}: {error}");
        }
        let failed = shell("exit 3");
        assert!(
            !failed.status.success(),
            "{how:?}: {}",
            text(&failed.stderr)
        );
    }
    for transport in ["spdy", "websocket"] {
        let shell = ["exec", "--transport", transport, "-i", id, "/bin/sh"];
        let mut child = crictl.command(&shell);
        child.stdin(Stdio::piped()).stdout(Stdio::piped());
        let said = converse(child.spawn().unwrap(), b"echo $((40+2)); exit\n");
        assert_eq!(said, "42\n", "{transport}");
        let shell = ["exec", "--transport", transport, "-i", "-t", id, "/bin/sh"];
        let said = converse(
            crictl.in_terminal(&shell),
            b"test -t 0 && echo $((40+2)); exit\n",
        );
        assert!(said.contains("42\r\n"), "{transport}: {said:?}");
    }
}

fn updated(crictl: &Crictl, id: &str) {
    crictl.run(&[
        "update",
        "--cpu-period",
        "100000",
        "--cpu-quota",
        "50000",
        id,
    ]);
    let shown = crictl.json(&["inspect", id]);
    let limits = &shown["status"]["resources"]["linux"];
    assert_eq!(limits["cpuQuota"], "50000", "{shown}");
}

fn forwarded(crictl: &Crictl, sandbox: &str) {
    for transport in ["spdy", "websocket"] {
        let forward = ["port-forward", "--transport", transport, sandbox, ":8080"];
        let mut child = Ended(
            crictl
                .command(&forward)
                .stdout(Stdio::piped())
                .spawn()
                .unwrap(),
        );
        let mut lines = BufReader::new(child.0.stdout.take().unwrap()).lines();
        // Forwarding from 127.0.0.1:40123 -> 8080
        let line = lines.next().unwrap().unwrap();
        let address = line.split(' ').nth(2).unwrap();
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let mut answer = [0; 10];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"forwarded\n", "{transport}");
    }
}

fn attached(crictl: &Crictl, id: &str) {
    let attach = ["attach", "-i", id];
    let mut child = crictl
        .command(&attach)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map(Ended)
        .unwrap();
    let mut pipe = child.0.stdin.take().unwrap();
    let mut lines = BufReader::new(child.0.stdout.take().unwrap()).lines();
    pipe.write_all(b"you\n").unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "heard you");
    // The container wanted its input once.
    drop(pipe);
    assert_eq!(lines.next().unwrap().unwrap(), "end");
    assert_eq!(crictl.run(&["logs", "--tail", "2", id]), "heard you\nend\n");
}

fn what_goes(crictl: &Crictl, sandbox: &str, id: &str, image: &str) {
    crictl.run(&["stop", "--timeout", "5", id]);
    let shown = crictl.json(&["inspect", id]);
    assert_eq!(shown["status"]["state"], "CONTAINER_EXITED");
    assert_eq!(shown["status"]["exitCode"], 7, "{shown}");
    let said = crictl.fails(&["exec", id, "/bin/sh"]);
    assert!(
        said.contains("not running") || said.contains("is in"),
        "{said}"
    );
    crictl.run(&["rm", id]);
    assert!(crictl.fails(&["inspect", id]).contains("not found"));
    crictl.run(&["stopp", sandbox]);
    assert!(crictl.run(&["pods"]).contains("NotReady"));
    crictl.run(&["rmp", sandbox]);
    assert_eq!(crictl.run(&["pods", "-q"]), "");
    crictl.run(&["rmi", image]);
    assert_eq!(crictl.run(&["images", "-q"]), "");
    assert!(crictl.fails(&["inspecti", image]).contains("no such image"));
}

#[test]
fn crictl_does_all_its_work() {
    if not_root() {
        return;
    }
    let node = Node::start();
    let Some(crictl) = Crictl::find(&node) else {
        eprintln!("left out: no crictl on the PATH, and $CRICTL names none");
        return;
    };
    assert!(crictl.run(&["version"]).contains("RuntimeName:  xebec"));
    let info = crictl.json(&["info"]);
    assert_eq!(info["config"]["socket"], json!(node.path("run/cri.sock")));
    for condition in info["status"]["conditions"].as_array().unwrap() {
        assert_eq!(condition["status"], true, "{condition}");
    }
    let registry = Registry::start(false);
    let image = pull(&crictl, &registry);
    let (sandbox, id) = one_pod(&node, &crictl, &image);
    what_is_shown(&crictl, &sandbox, &id);
    commands(&crictl, &id);
    updated(&crictl, &id);
    forwarded(&crictl, &sandbox);
    attached(&crictl, &id);
    what_goes(&crictl, &sandbox, &id, &image);
}
