//! Users, capabilities, mounts, namespaces, limits, terminals, events, failures.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod harness;

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use harness::{Client, Node, mounts_below, pod, shell};
use xebec_cri_api::v1;
use xebec_shim::protocol::{ExecRequest, FrameKind, Reply, Request, call, encode_json, take_frame};

fn security(config: &mut v1::ContainerConfig) -> &mut v1::LinuxContainerSecurityContext {
    config
        .linux
        .as_mut()
        .unwrap()
        .security_context
        .as_mut()
        .unwrap()
}

/// Runs a container to its end; its exit code and its output.
async fn outcome(c: &mut Client, sandbox: &str, config: v1::ContainerConfig) -> (i32, String) {
    let id = c.run(sandbox, config).await;
    let status = c.wait_exit(&id).await;
    let log = std::fs::read_to_string(&status.log_path).unwrap();
    let text = log
        .lines()
        .map(|l| l.splitn(4, ' ').nth(3).unwrap_or(""))
        .collect::<Vec<_>>()
        .join("\n");
    (status.exit_code, text)
}

#[tokio::test]
async fn security_context_and_mounts_take_effect() {
    if harness::not_root() {
        return;
    }
    let node = Node::start();
    node.busybox();
    let mut c = Client(node.runtime().await);
    let mut p = pod(&node, "sec");
    p.dns_config = Some(v1::DnsConfig {
        servers: vec!["10.96.0.10".into()],
        searches: vec!["a.b".into()],
        options: vec!["ndots:5".into()],
    });
    let sandbox = c.sandbox(p).await;

    let mut config = shell(
        "user",
        "id; grep CapEff /proc/self/status; pwd; env; cat /etc/resolv.conf; echo $HOME",
    );
    security(&mut config).run_as_username = "web".into();
    security(&mut config).supplemental_groups = vec![4000];
    security(&mut config).capabilities = Some(v1::Capability {
        drop_capabilities: vec!["ALL".into()],
        ..v1::Capability::default()
    });
    config.working_dir = "/made/here".into();
    config.envs = vec![v1::KeyValue {
        key: "X".into(),
        value: b"a=b c".to_vec(),
    }];
    let (code, text) = outcome(&mut c, &sandbox, config).await;
    assert_eq!(code, 0, "{text}");
    assert!(
        text.contains("uid=101(web) gid=102(web)")
            && text.contains("300(extra)")
            && text.contains("4000"),
        "{text}"
    );
    assert!(text.contains("CapEff:\t0000000000000000"), "{text}");
    for line in [
        "/made/here",
        "X=a=b c",
        "FROM_IMAGE=yes",
        "nameserver 10.96.0.10",
        "search a.b",
        "options ndots:5",
        "HOSTNAME=sec",
        "/srv",
    ] {
        assert!(text.lines().any(|l| l == line), "{line:?} in {text}");
    }

    let data = node.path("volume");
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("in"), "from outside").unwrap();
    let mount = |path: &str, readonly| v1::Mount {
        container_path: path.into(),
        host_path: data.to_string_lossy().into_owned(),
        readonly,
        ..v1::Mount::default()
    };
    let mut config = shell(
        "ro",
        "touch /x 2>&1; cat /ro/in; touch /ro/x 2>&1; touch /rw/made; grep NoNewPrivs /proc/self/status; cat /proc/version 2>&1 | wc -c; echo 1 2>&1 > /proc/sys/kernel/panic",
    );
    security(&mut config).readonly_rootfs = true;
    security(&mut config).no_new_privs = true;
    security(&mut config).masked_paths = vec!["/proc/version".into()];
    security(&mut config).readonly_paths = vec!["/proc/sys".into()];
    config.mounts = vec![mount("/ro", true), mount("/rw", false)];
    let (_, text) = outcome(&mut c, &sandbox, config).await;
    assert_eq!(text.matches("Read-only file system").count(), 3, "{text}");
    assert!(
        text.contains("from outside") && text.contains("NoNewPrivs:\t1") && text.contains("\n0\n"),
        "{text}"
    );
    assert!(data.join("made").exists());

    let mut config = shell(
        "priv",
        "grep CapEff /proc/self/status; ls /dev | grep -c . ; touch /sys/fs/cgroup/x 2>&1 | grep -c Read-only",
    );
    security(&mut config).privileged = true;
    let (_, text) = outcome(&mut c, &sandbox, config).await;
    assert!(!text.contains("CapEff:\t00000000a80425fb"), "{text}");
    let (_, text) = outcome(
        &mut c,
        &sandbox,
        shell(
            "plain",
            "grep CapEff /proc/self/status; cat /proc/1/comm; ps | wc -l",
        ),
    )
    .await;
    assert!(
        text.contains("CapEff:\t00000000a80425fb") && text.contains("sh"),
        "{text}"
    );
    c.remove_sandbox(&sandbox).await;
}

#[tokio::test]
async fn namespaces_are_shared_as_asked() {
    if harness::not_root() {
        return;
    }
    let node = Node::start();
    node.busybox();
    let mut c = Client(node.runtime().await);
    let own = std::fs::read_link("/proc/self/ns/net").unwrap();
    let mut host = pod(&node, "host");
    let options = v1::NamespaceOption {
        network: v1::NamespaceMode::Node as i32,
        pid: v1::NamespaceMode::Node as i32,
        ipc: v1::NamespaceMode::Node as i32,
        ..v1::NamespaceOption::default()
    };
    host.linux
        .as_mut()
        .unwrap()
        .security_context
        .as_mut()
        .unwrap()
        .namespace_options = Some(options.clone());
    // A host-network pod needs no network plugin.
    std::fs::remove_file(node.path("cni/10-test.conflist")).unwrap();
    let err =
        c.0.run_pod_sandbox(v1::RunPodSandboxRequest {
            config: Some(pod(&node, "none")),
            ..v1::RunPodSandboxRequest::default()
        })
        .await
        .unwrap_err();
    assert!(err.message().contains("no network config found"), "{err}");
    let status =
        c.0.status(v1::StatusRequest { verbose: false })
            .await
            .unwrap()
            .into_inner()
            .status
            .unwrap();
    let network = status
        .conditions
        .iter()
        .find(|c| c.r#type == "NetworkReady")
        .unwrap();
    assert!(
        !network.status && network.message.contains("no network config found"),
        "{network:?}"
    );
    let sandbox = c.sandbox(host).await;
    let mut config = shell(
        "host",
        "ls -l /proc/self/ns/; ls -d /proc/1/; cat /proc/1/comm; sleep 300",
    );
    security(&mut config).namespace_options = Some(options);
    let id = c.run(&sandbox, config).await;
    let out = String::from_utf8(c.exec(&id, &["ls", "-l", "/proc/self/ns/"]).await.stdout).unwrap();
    for kind in ["net", "ipc", "uts", "pid"] {
        let link = std::fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
        assert!(out.contains(&*link.to_string_lossy()), "{kind}: {out}");
    }
    c.0.stop_container(v1::StopContainerRequest {
        container_id: id.clone(),
        timeout: 0,
    })
    .await
    .unwrap();
    assert_eq!(c.status(&id).await.exit_code, 137);
    c.remove_sandbox(&sandbox).await;

    node.write_network();
    let mut shared = pod(&node, "shared");
    let options = v1::NamespaceOption {
        pid: v1::NamespaceMode::Pod as i32,
        ..v1::NamespaceOption::default()
    };
    shared
        .linux
        .as_mut()
        .unwrap()
        .security_context
        .as_mut()
        .unwrap()
        .namespace_options = Some(options.clone());
    let sandbox = c.sandbox(shared).await;
    let mut one = shell("one", "exec sleep 4321");
    security(&mut one).namespace_options = Some(options.clone());
    let one = c.run(&sandbox, one).await;
    let mut two = shell("two", "ps; ls -l /proc/self/ns; hostname; sleep 300");
    security(&mut two).namespace_options = Some(options);
    let two = c.run(&sandbox, two).await;
    let ps = String::from_utf8(c.exec(&two, &["ps"]).await.stdout).unwrap();
    assert!(
        ps.contains("sleep 4321") && ps.contains("xebec-pause"),
        "{ps}"
    );
    let of = |out: v1::ExecSyncResponse| String::from_utf8(out.stdout).unwrap();
    let ns = [
        "sh",
        "-c",
        "cd /proc/self/ns; for n in net ipc uts; do ls -l $n | tail -c 30; done",
    ];
    let (a, b) = (of(c.exec(&one, &ns).await), of(c.exec(&two, &ns).await));
    assert_eq!(a.replace("one", ""), b.replace("two", ""));
    assert!(!a.contains(&*own.to_string_lossy()));
    let begin = Instant::now();
    c.remove_sandbox(&sandbox).await;
    assert!(begin.elapsed() < Duration::from_secs(5));
    assert_eq!(mounts_below(node.dir.path()), Vec::<String>::new());
}

#[tokio::test]
async fn limits_hold_and_usage_is_told() {
    if harness::not_root() {
        return;
    }
    let node = Node::start();
    node.busybox();
    let mut c = Client(node.runtime().await);
    let sandbox = c.sandbox(pod(&node, "lim")).await;
    let limit = |memory: i64| v1::LinuxContainerResources {
        memory_limit_in_bytes: memory,
        cpu_shares: 512,
        cpu_period: 100_000,
        cpu_quota: 50_000,
        oom_score_adj: -500,
        unified: [("pids.max".to_owned(), "64".to_owned())].into(),
        ..v1::LinuxContainerResources::default()
    };
    let mut config = shell("lim", "sleep 300");
    config.linux.as_mut().unwrap().resources = Some(limit(64 << 20));
    let id = c.run(&sandbox, config).await;
    let find = |file: &str| {
        std::fs::read_dir("/sys/fs/cgroup")
            .unwrap()
            .flatten()
            .map(|e| {
                e.path().join(format!(
                    "{}/pod{}/{id}/{file}",
                    node.cgroup().trim_start_matches('/'),
                    "uid-lim"
                ))
            })
            .chain([std::path::Path::new("/sys/fs/cgroup").join(format!(
                "{}/pod{}/{id}/{file}",
                node.cgroup().trim_start_matches('/'),
                "uid-lim"
            ))])
            .find_map(|p| std::fs::read_to_string(p).ok())
    };
    let memory = || {
        find("memory.limit_in_bytes")
            .or_else(|| find("memory.max"))
            .unwrap()
    };
    assert_eq!(memory().trim(), (64 << 20).to_string());
    assert_eq!(find("pids.max").unwrap().trim(), "64");
    if let Some(quota) = find("cpu.cfs_quota_us") {
        assert_eq!(
            (quota.trim(), find("cpu.shares").unwrap().trim()),
            ("50000", "512")
        );
    }
    c.0.update_container_resources(v1::UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(limit(96 << 20)),
        ..v1::UpdateContainerResourcesRequest::default()
    })
    .await
    .unwrap();
    assert_eq!(memory().trim(), (96 << 20).to_string());
    c.exec(&id, &["sh", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; dd if=/dev/zero of=/big bs=1000000 count=3 2>/dev/null"]).await;
    let stats =
        c.0.container_stats(v1::ContainerStatsRequest {
            container_id: id.clone(),
        })
        .await
        .unwrap()
        .into_inner()
        .stats
        .unwrap();
    assert!(stats.cpu.unwrap().usage_core_nano_seconds.unwrap().value > 1_000_000);
    assert!(stats.memory.unwrap().working_set_bytes.unwrap().value > 10_000);
    assert!(stats.writable_layer.unwrap().used_bytes.unwrap().value >= 3_000_000);
    let pod_stats =
        c.0.pod_sandbox_stats(v1::PodSandboxStatsRequest {
            pod_sandbox_id: sandbox.clone(),
        })
        .await
        .unwrap()
        .into_inner()
        .stats
        .unwrap()
        .linux
        .unwrap();
    assert_eq!(
        pod_stats.network.unwrap().default_interface.unwrap().name,
        "eth0"
    );
    assert_eq!(pod_stats.containers.len(), 1);

    let mut hungry = shell("hungry", "exec tail /dev/zero");
    hungry.linux.as_mut().unwrap().resources = Some(v1::LinuxContainerResources {
        memory_limit_in_bytes: 16 << 20,
        ..v1::LinuxContainerResources::default()
    });
    let hungry = c.run(&sandbox, hungry).await;
    let ended = c.wait_exit(&hungry).await;
    assert_eq!((ended.reason.as_str(), ended.exit_code), ("OOMKilled", 137));
    c.remove_sandbox(&sandbox).await;
}

/// Talks to the shim as the streaming server does.
struct Stream {
    socket: UnixStream,
    input: Vec<u8>,
}

impl Stream {
    fn open(node: &Node, sandbox: &str, request: &Request) -> Self {
        let mut socket =
            UnixStream::connect(node.path(&format!("run/cri/shim/{sandbox}.sock"))).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        socket
            .set_write_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        match call(&mut socket, request).unwrap() {
            Reply::Started { .. } | Reply::Ok => {}
            other => panic!("{other:?}"),
        }
        Self {
            socket,
            input: Vec::new(),
        }
    }

    fn send(&mut self, bytes: &[u8]) {
        use std::io::Write;
        self.socket.write_all(bytes).unwrap();
    }

    fn stdin(&mut self, text: &str) {
        self.send(&xebec_shim::protocol::encode(
            FrameKind::Stdin,
            text.as_bytes(),
        ));
    }

    /// Reads until `text` has come, or the end: output, exit code.
    fn until(&mut self, text: Option<&str>) -> (String, Option<i32>) {
        use std::io::Read;
        let mut output = String::new();
        loop {
            while let Some((kind, payload)) = take_frame(&mut self.input).unwrap() {
                if kind == FrameKind::Json {
                    if let Reply::Exited { exit, .. } = serde_json::from_slice(&payload).unwrap() {
                        return (output, Some(exit.exit_code));
                    }
                } else {
                    output.push_str(&String::from_utf8_lossy(&payload));
                }
            }
            if text.is_some_and(|t| output.contains(t)) {
                return (output, None);
            }
            let mut buffer = [0; 4096];
            match self.socket.read(&mut buffer) {
                Ok(0) => return (output, None),
                Ok(n) => self.input.extend_from_slice(&buffer[..n]),
                Err(err) => panic!("{err} after {output:?}"),
            }
        }
    }
}

fn exec(node: &Node, sandbox: &str, id: &str, args: &[&str], tty: bool) -> Stream {
    let text = std::fs::read(node.root().join(format!("containers/{id}/config.json"))).unwrap();
    let spec: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let mut process = spec["process"].clone();
    process["args"] = args.into();
    process["terminal"] = tty.into();
    Stream::open(
        node,
        sandbox,
        &Request::Exec(ExecRequest {
            id: id.to_owned(),
            process,
            tty,
            stdin: true,
        }),
    )
}

#[tokio::test]
async fn streams_and_terminals_work_both_ways() {
    if harness::not_root() {
        return;
    }
    let node = Node::start();
    node.busybox();
    let mut c = Client(node.runtime().await);
    let sandbox = c.sandbox(pod(&node, "tty")).await;
    let mut config = shell(
        "echo",
        "while read line; do echo got $line; done; echo end of input; exit 4",
    );
    config.stdin = true;
    config.stdin_once = true;
    let id = c.run(&sandbox, config).await;

    let mut cat = exec(&node, &sandbox, &id, &["sh", "-c", "cat; exit 6"], false);
    cat.stdin("ping\n");
    assert_eq!(cat.until(Some("ping\n")).0, "ping\n");
    // Input and output at once, as a client must: neither side buffers it all.
    let mut writer = cat.socket.try_clone().unwrap();
    let writing = std::thread::spawn(move || {
        use std::io::Write;
        let megabyte = "x".repeat(1 << 20);
        for part in megabyte.as_bytes().chunks(60_000) {
            writer
                .write_all(&xebec_shim::protocol::encode(FrameKind::Stdin, part))
                .unwrap();
        }
        writer
            .write_all(&encode_json(&Request::CloseStdin).unwrap())
            .unwrap();
    });
    let (out, code) = cat.until(None);
    writing.join().unwrap();
    assert_eq!((out.len(), code), (1 << 20, Some(6)), "all input came back");

    let mut sh = exec(&node, &sandbox, &id, &["sh"], true);
    sh.send(
        &encode_json(&Request::Resize {
            width: 123,
            height: 45,
        })
        .unwrap(),
    );
    sh.stdin("stty size; tty_is=$(test -t 0 && echo yes); echo tty $tty_is\n");
    let (out, _) = sh.until(Some("tty yes"));
    assert!(out.contains("45 123"), "{out:?}");
    sh.stdin("sleep 100\n");
    std::thread::sleep(Duration::from_millis(300));
    sh.stdin("\u{3}");
    sh.stdin("echo interrupted $?; exit 9\n");
    let (out, code) = sh.until(None);
    assert!(out.contains("interrupted 130"), "{out:?}");
    assert_eq!(code, Some(9));

    // A client that goes away takes its process along.
    let gone = exec(&node, &sandbox, &id, &["sleep", "9876"], false);
    drop(gone);
    let end = Instant::now() + Duration::from_secs(5);
    while String::from_utf8(c.exec(&id, &["ps"]).await.stdout)
        .unwrap()
        .contains("sleep 9876")
    {
        assert!(Instant::now() < end, "the process is still there");
    }

    let mut attached = Stream::open(&node, &sandbox, &Request::Attach { id: id.clone() });
    attached.stdin("hello\n");
    assert_eq!(attached.until(Some("got hello\n")).0, "got hello\n");
    attached.send(&encode_json(&Request::CloseStdin).unwrap());
    let (out, code) = attached.until(None);
    assert_eq!((out.as_str(), code), ("end of input\n", Some(4)));
    assert_eq!(c.wait_exit(&id).await.exit_code, 4);

    let mut config = shell("term", "test -t 1 && stty size && read x && echo got $x");
    config.tty = true;
    config.stdin = true;
    let term = c.run(&sandbox, config).await;
    let mut attached = Stream::open(&node, &sandbox, &Request::Attach { id: term.clone() });
    attached.stdin("typed\n");
    assert!(attached.until(None).0.contains("got typed"));
    let ended = c.wait_exit(&term).await;
    assert!(
        std::fs::read_to_string(&ended.log_path)
            .unwrap()
            .contains("stdout F got typed")
    );
    c.remove_sandbox(&sandbox).await;
}

#[tokio::test]
async fn events_tell_each_step_and_logs_rotate() {
    if harness::not_root() {
        return;
    }
    let node = Node::start();
    node.busybox();
    let mut c = Client(node.runtime().await);
    let mut events =
        c.0.get_container_events(v1::GetEventsRequest {})
            .await
            .unwrap()
            .into_inner();
    let sandbox = c.sandbox(pod(&node, "ev")).await;
    let id = c
        .run(
            &sandbox,
            shell(
                "main",
                "echo before; trap 'echo stopping; exit 3' TERM; while true; do sleep 0.05; done",
            ),
        )
        .await;
    let status = c.status(&id).await;
    let rotated = format!("{}.1", status.log_path);
    std::thread::sleep(Duration::from_millis(200));
    std::fs::rename(&status.log_path, &rotated).unwrap();
    c.0.reopen_container_log(v1::ReopenContainerLogRequest {
        container_id: id.clone(),
    })
    .await
    .unwrap();
    c.0.stop_container(v1::StopContainerRequest {
        container_id: id.clone(),
        timeout: 10,
    })
    .await
    .unwrap();
    assert_eq!(
        c.status(&id).await.exit_code,
        3,
        "it had time to end by itself"
    );
    assert!(
        std::fs::read_to_string(&rotated)
            .unwrap()
            .contains("before")
    );
    let fresh = std::fs::read_to_string(&status.log_path).unwrap();
    assert!(
        fresh.contains("stopping") && !fresh.contains("before"),
        "{fresh}"
    );
    c.0.remove_container(v1::RemoveContainerRequest {
        container_id: id.clone(),
    })
    .await
    .unwrap();
    c.remove_sandbox(&sandbox).await;
    let mut seen = Vec::new();
    while let Ok(Ok(Some(event))) =
        tokio::time::timeout(Duration::from_millis(500), events.message()).await
    {
        let whose = if event.container_id == id {
            "container"
        } else {
            "pod"
        };
        assert_eq!(event.pod_sandbox_status.as_ref().unwrap().id, sandbox);
        if whose == "container"
            && event.container_event_type() == v1::ContainerEventType::ContainerStoppedEvent
        {
            assert_eq!(event.containers_statuses[0].exit_code, 3);
        }
        seen.push(format!(
            "{whose} {}",
            event.container_event_type().as_str_name()
        ));
    }
    assert_eq!(
        seen,
        [
            "pod CONTAINER_CREATED_EVENT",
            "pod CONTAINER_STARTED_EVENT",
            "container CONTAINER_CREATED_EVENT",
            "container CONTAINER_STARTED_EVENT",
            "container CONTAINER_STOPPED_EVENT",
            "container CONTAINER_DELETED_EVENT",
            "pod CONTAINER_STOPPED_EVENT",
            "pod CONTAINER_DELETED_EVENT",
        ]
    );
}

#[tokio::test]
async fn a_killed_shim_is_noticed_and_cleaned_up() {
    if harness::not_root() {
        return;
    }
    let node = Node::start();
    node.busybox();
    let mut c = Client(node.runtime().await);
    let sandbox = c.sandbox(pod(&node, "dead")).await;
    let id = c.run(&sandbox, shell("main", "exec sleep 300")).await;
    let shim = c.shim_pid(&sandbox).await;
    // SAFETY: plain kill of the shim that this test's server started.
    unsafe { libc::kill(shim, libc::SIGKILL) };
    let status = c.wait_exit(&id).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (255, "Unknown"));
    assert_eq!(
        c.sandbox_status(&sandbox).await.state(),
        v1::PodSandboxState::SandboxNotready
    );
    c.remove_sandbox(&sandbox).await;
    assert_eq!(mounts_below(node.dir.path()), Vec::<String>::new());
    for hierarchy in std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        let dir = hierarchy.path().join(format!(
            "{}/poduid-dead",
            node.cgroup().trim_start_matches('/')
        ));
        assert!(!dir.exists(), "{}", dir.display());
    }
}

#[tokio::test]
async fn a_port_inside_a_pod_is_reached() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    if harness::not_root() {
        return;
    }
    let node = Node::start();
    node.busybox();
    let mut c = Client(node.runtime().await);
    let sandbox = c.sandbox(pod(&node, "port")).await;
    let script = "nc -l -p 8080 -e sh -c 'read x; echo pod says $x'";
    let id = c.run(&sandbox, shell("main", script)).await;
    // A runtime that only reads what the server keeps.
    let config = xebec_cri::Config::new(node.root(), node.path("run"));
    let runtime = xebec_cri::runtime::Runtime::open(config, Default::default())
        .await
        .unwrap();
    let pod = runtime.registry.sandbox(&sandbox).unwrap();
    let end = Instant::now() + Duration::from_secs(5);
    let mut stream = loop {
        match runtime.dial(&pod, 8080).await {
            Ok(stream) => break stream,
            Err(err) => assert!(Instant::now() < end, "{err:#}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    stream.write_all(b"hi\n").await.unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).await.unwrap();
    assert_eq!(said, "pod says hi\n");
    c.wait_exit(&id).await;
    let err = runtime.dial(&pod, 8080).await.unwrap_err();
    assert!(format!("{err:#}").contains("localhost:8080"), "{err:#}");
    c.remove_sandbox(&sandbox).await;
}
