//! `kubectl exec`, `attach` and `port-forward` through API server, kubelet and runtime, in both protocols.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xebec_tests::{Cluster, Machine, assert_nothing_left, eventually, succeed, xebec_bin};

const MINUTE: Duration = Duration::from_secs(60);
/// More than all buffers between kubectl and a process.
const MUCH: usize = 8 << 20;

/// A server, and for each protocol a pod to attach to. The demo image has no shell: the machine's is lent to it.
const PODS: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: server, labels: {app: streams}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: demo
    image: xebec.local/demo:latest
    imagePullPolicy: IfNotPresent
    ports:
    - {name: http, containerPort: 8080}
    readinessProbe:
      httpGet: {path: /healthz, port: http}
      periodSeconds: 1
    volumeMounts:
    - {name: shell, mountPath: /bin/busybox, readOnly: true}
  volumes:
  - name: shell
    hostPath: {path: /bin/busybox, type: File}
"#;

fn reader(name: &str) -> String {
    format!(
        r#"---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: streams}}}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  containers:
  - name: reader
    image: xebec.local/demo:latest
    imagePullPolicy: IfNotPresent
    stdin: true
    stdinOnce: true
    command: [/bin/busybox, sh, -c, 'while read line; do echo "got $line"; done; echo over; echo err >&2']
    volumeMounts:
    - {{name: shell, mountPath: /bin/busybox, readOnly: true}}
  volumes:
  - name: shell
    hostPath: {{path: /bin/busybox, type: File}}
"#
    )
}

/// What kubectl speaks: WebSocket, or SPDY as older ones do.
#[derive(Clone, Copy, Debug)]
enum Protocol {
    WebSocket,
    Spdy,
}

impl Protocol {
    fn apply(self, command: &mut Command) -> &mut Command {
        let websocket = match self {
            Self::WebSocket => "true",
            Self::Spdy => "false",
        };
        command
            .env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", websocket)
            .env("KUBECTL_PORT_FORWARD_WEBSOCKETS", websocket)
    }

    fn reader(self) -> &'static str {
        match self {
            Self::WebSocket => "reader-websocket",
            Self::Spdy => "reader-spdy",
        }
    }
}

/// A process that is ended with its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs kubectl with this input.
fn kubectl(cluster: &Cluster, protocol: Protocol, args: &[&str], input: &[u8]) -> Result<Output> {
    let mut child = protocol
        .apply(&mut cluster.kubectl(args))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("could not start kubectl")?;
    let mut stdin = child.stdin.take().context("kubectl has no input")?;
    std::thread::scope(|scope| {
        // It may end before it has taken all.
        scope.spawn(move || stdin.write_all(input));
        child
            .wait_with_output()
            .context("could not wait for kubectl")
    })
}

const SH: [&str; 6] = ["exec", "-i", "server", "--", "/bin/busybox", "sh"];

fn sh(cluster: &Cluster, protocol: Protocol, script: &str, input: &[u8]) -> Result<Output> {
    kubectl(
        cluster,
        protocol,
        &[&SH[..], &["-c", script]].concat(),
        input,
    )
}

fn text(bytes: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

fn exec(cluster: &Cluster, protocol: Protocol) -> Result<()> {
    let version = succeed(
        "kubectl exec",
        kubectl(
            cluster,
            protocol,
            &["exec", "server", "--", "/bin/xebec", "--version"],
            b"",
        )?,
    )?;
    assert!(version.starts_with("xebec "), "{version}");

    let output = sh(cluster, protocol, "echo out; echo err >&2; exit 7", b"")?;
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    assert_eq!(text(&output.stdout), "out\n");
    assert_eq!(
        text(&output.stderr),
        "err\ncommand terminated with exit code 7\n"
    );

    let output = kubectl(
        cluster,
        protocol,
        &["exec", "server", "--", "/no/such"],
        b"",
    )?;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(text(&output.stderr).contains("/no/such"), "{output:?}");

    // Input, its end, and as much output.
    let much: Vec<u8> = (0..MUCH).map(|n| (n % 251) as u8).collect();
    let output = sh(cluster, protocol, "/bin/busybox cat; exit 3", &much)?;
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    assert!(
        output.stdout == much,
        "{} bytes came back",
        output.stdout.len()
    );

    let outcomes = std::thread::scope(|scope| {
        let all: Vec<_> = (1..=12)
            .map(|n| {
                let script = "read number; echo got $number; exit $number";
                scope.spawn(move || {
                    (
                        n,
                        sh(cluster, protocol, script, format!("{n}\n").as_bytes()),
                    )
                })
            })
            .collect();
        all.into_iter().map(|one| one.join()).collect::<Vec<_>>()
    });
    for outcome in outcomes {
        let (n, output) = outcome.expect("no thread panics");
        let output = output?;
        assert_eq!(output.status.code(), Some(n), "{output:?}");
        assert_eq!(text(&output.stdout), format!("got {n}\n"));
    }
    Ok(())
}

/// Reads until this text has come; what came.
fn until(from: &mut impl Read, wanted: &str) -> Result<String> {
    let (mut all, mut piece) = (Vec::new(), [0; 4096]);
    while !text(&all).contains(wanted) {
        let read = from.read(&mut piece).context("could not read")?;
        ensure!(read > 0, "ended before {wanted:?}: {}", text(&all));
        all.extend_from_slice(&piece[..read]);
    }
    Ok(text(&all).into_owned())
}

/// A terminal of another size half-way, and keys pressed in it.
fn exec_in_a_terminal(cluster: &Cluster, protocol: Protocol) -> Result<()> {
    let inside = "size() { until [ \"$(/bin/busybox stty size)\" = \"$1\" ]; do /bin/busybox sleep 0.1; done; }; \
        size '30 100'; echo fir''st; size '43 132'; echo sec''ond; read line; echo \"got <$line>\"; \
        trap 'echo interr''upted; exit 9' INT; echo rea''dy; while :; do /bin/busybox sleep 0.1; done";
    // `script` gives kubectl a terminal, and ends with its exit code.
    let outside = "tty > \"$TERMINAL\"; stty rows 30 cols 100; \
        exec \"$KUBECTL_BIN\" exec -it server -- /bin/busybox timeout 50 /bin/busybox sh -c \"$INSIDE\"";
    let terminal = std::env::temp_dir().join(format!("xebec-test-terminal-{}", std::process::id()));
    let kubectl = cluster.kubectl(&[]);
    let mut command = Command::new("timeout");
    command.args(["60", "script", "-qec", outside, "/dev/null"]);
    for (key, value) in kubectl.get_envs() {
        command.env(key, value.unwrap_or_default());
    }
    let child = protocol
        .apply(&mut command)
        .env("SHELL", "/bin/sh")
        .env("KUBECTL_BIN", kubectl.get_program())
        .env("INSIDE", inside)
        .env("TERMINAL", &terminal)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("could not start script")?;
    let mut child = Running(child);
    let mut keys = child.0.stdin.take().context("script has no input")?;
    let mut screen = child.0.stdout.take().context("script has no output")?;
    until(&mut screen, "first")?;
    let name = std::fs::read_to_string(&terminal).context("the terminal has no name")?;
    std::fs::remove_file(&terminal).context("could not remove the terminal's name")?;
    succeed(
        "stty",
        Command::new("stty")
            .args(["-F", name.trim(), "rows", "43", "cols", "132"])
            .output()
            .context("could not start stty")?,
    )?;
    until(&mut screen, "second")?;
    keys.write_all(b"hello\r")?;
    let seen = until(&mut screen, "ready")?;
    assert!(seen.contains("got <hello>\r\n"), "{seen}");
    keys.write_all(b"\x03")?;
    until(&mut screen, "interrupted")?;
    let status = child.0.wait().context("could not wait for script")?;
    assert_eq!(status.code(), Some(9));
    Ok(())
}

fn attach(cluster: &Cluster, protocol: Protocol) -> Result<()> {
    let args = ["attach", "-i", protocol.reader()];
    let output = kubectl(cluster, protocol, &args, b"one\ntwo\n")?;
    assert!(output.status.success(), "{output:?}");
    assert_eq!(text(&output.stdout), "got one\ngot two\nover\n");
    assert!(text(&output.stderr).contains("err\n"), "{output:?}");
    eventually("the pod has ended with its input", MINUTE, || {
        let pod = cluster.get(&["pod", protocol.reader()])?;
        Ok(pod["status"]["phase"] == "Succeeded")
    })
}

/// `xebec demo get`, many times.
fn get(port: u16) -> Result<String> {
    succeed(
        "demo get",
        Command::new(xebec_bin())
            .args(["demo", "get", &format!("http://127.0.0.1:{port}/whoami")])
            .args(["-n", "50", "--summary"])
            .output()
            .context("could not start the client")?,
    )
}

fn port_forward(cluster: &Cluster, protocol: Protocol) -> Result<()> {
    let child = protocol
        .apply(&mut cluster.kubectl(&["port-forward", "pod/server", ":http", ":81"]))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("could not start kubectl")?;
    let mut child = Running(child);
    let stdout = child.0.stdout.take().context("kubectl has no output")?;
    let mut lines = BufReader::new(stdout).lines();
    let mut port_of = |pod: &str| -> Result<u16> {
        loop {
            let line = lines.next().context("kubectl has ended")??;
            let port = line
                .strip_prefix("Forwarding from 127.0.0.1:")
                .and_then(|rest| rest.strip_suffix(&format!(" -> {pod}")));
            if let Some(port) = port {
                return port.parse().context("kubectl's port is no number");
            }
        }
    };
    let (open, closed) = (port_of("8080")?, port_of("81")?);
    // kubectl writes a line for each connection, which must not fill the pipe.
    std::thread::spawn(move || lines.count());
    let answers = std::thread::scope(|scope| {
        let all: Vec<_> = (0..8).map(|_| scope.spawn(move || get(open))).collect();
        all.into_iter().map(|one| one.join()).collect::<Vec<_>>()
    });
    for answer in answers {
        let answer = answer.expect("no thread panics")?;
        assert!(answer.contains("50 server\n"), "{answer}");
    }

    // Where nobody listens, kubectl hears why; it then ends by itself.
    let mut nobody =
        std::net::TcpStream::connect(("127.0.0.1", closed)).context("could not reach kubectl")?;
    // A reset is as good an end.
    let _ = nobody.read(&mut [0; 1]);
    let mut stderr = child.0.stderr.take().context("kubectl has no errors")?;
    until(&mut stderr, "Connection refused")?;
    Ok(())
}

fn exec_and_port_forward(cluster: &Cluster) -> Result<()> {
    let readers = [Protocol::WebSocket, Protocol::Spdy].map(|one| reader(one.reader()));
    let manifest = [PODS, &readers[0], &readers[1]].concat();
    let apply = kubectl(
        cluster,
        Protocol::WebSocket,
        &["apply", "-f", "-"],
        manifest.as_bytes(),
    )?;
    succeed("kubectl apply", apply)?;
    eventually("all pods are Ready", MINUTE, || {
        Ok(cluster.ready_pods("default", "app=streams")?.len() == 3)
    })?;
    for protocol in [Protocol::WebSocket, Protocol::Spdy] {
        eprintln!("over {protocol:?}");
        exec(cluster, protocol)?;
        exec_in_a_terminal(cluster, protocol)?;
        attach(cluster, protocol)?;
        port_forward(cluster, protocol)?;
    }
    Ok(())
}

#[test]
fn streams_to_pods_in_both_protocols() -> Result<()> {
    let before = Machine::now()?;
    let mut cluster = Cluster::up("exec", &[])?;
    exec_and_port_forward(&cluster)?;
    cluster.down()?;
    assert_nothing_left(&before)?;
    Ok(())
}
