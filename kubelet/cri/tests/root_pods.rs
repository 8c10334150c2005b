//! Pods through the real server and the real shim, as root.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod harness;

use std::time::{Duration, Instant};

use harness::{Client, Node, mounts_below, pod, shell};
use xebec_cri_api::v1;

fn log(status: &v1::ContainerStatus) -> Vec<String> {
    std::fs::read_to_string(&status.log_path)
        .unwrap()
        .lines()
        .map(|l| l.split_once(' ').unwrap().1.to_owned())
        .collect()
}

/// Whether a process runs; one that its parent has yet to reap does not.
fn alive(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|s| !s.rsplit(')').next().unwrap_or("").starts_with(" Z"))
}

#[tokio::test]
async fn a_container_runs_logs_and_ends() {
    if harness::not_root() {
        return;
    }
    let node = Node::start();
    node.busybox();
    let mut c = Client(node.runtime().await);
    let sandbox = c.sandbox(pod(&node, "one")).await;
    let status = c.sandbox_status(&sandbox).await;
    assert_eq!(status.state(), v1::PodSandboxState::SandboxReady);
    let ip = status.network.unwrap().ip;
    assert!(ip.starts_with("10.213.7."), "{ip}");

    let id = c
        .run(
            &sandbox,
            shell("main", "echo hello; echo oops >&2; hostname; ip -4 addr show eth0 | grep -o 'inet [0-9.]*'; exit 7"),
        )
        .await;
    let status = c.wait_exit(&id).await;
    assert_eq!(status.exit_code, 7);
    assert_eq!(status.reason, "Error");
    assert!(status.started_at > 0 && status.finished_at >= status.started_at);
    let lines = log(&status);
    for line in [
        "stdout F hello",
        "stderr F oops",
        "stdout F one",
        &format!("stdout F inet {ip}"),
    ] {
        assert!(
            lines.contains(&line.to_owned()),
            "{line} is not in {lines:?}"
        );
    }

    let ok = c.run(&sandbox, shell("fine", "true")).await;
    let status = c.wait_exit(&ok).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"));
    let killed = c
        .run(&sandbox, shell("killed", "kill -9 $$; sleep 9"))
        .await;
    // PID 1 of a namespace can't kill itself; the sleep goes on until it is stopped.
    c.0.stop_container(v1::StopContainerRequest {
        container_id: killed.clone(),
        timeout: 0,
    })
    .await
    .unwrap();
    assert_eq!(c.wait_exit(&killed).await.exit_code, 137);
    c.remove_sandbox(&sandbox).await;
}

#[tokio::test]
async fn removal_leaves_nothing() {
    if harness::not_root() {
        return;
    }
    let mut node = Node::start();
    node.busybox();
    let mut c = Client(node.runtime().await);
    let sandbox = c.sandbox(pod(&node, "gone")).await;
    let id = c.run(&sandbox, shell("main", "sleep 1000")).await;
    assert!(
        mounts_below(node.dir.path()).len() >= 3,
        "netns, shm, rootfs"
    );
    let pid = c.shim_pid(&sandbox).await;
    assert!(std::path::Path::new(&format!("/proc/{pid}")).exists());
    assert!(alive(pid));
    let rss = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    print!(
        "{}",
        rss.lines()
            .filter(|l| l.starts_with("Rss"))
            .collect::<Vec<_>>()
            .join("\n")
    );
    let rss: u64 = rss
        .lines()
        .find_map(|l| l.strip_prefix("VmRSS:"))
        .and_then(|v| v.trim().trim_end_matches(" kB").parse().ok())
        .unwrap();
    println!("shim RSS {rss} kB");

    c.remove_sandbox(&sandbox).await;
    assert_eq!(mounts_below(node.dir.path()), Vec::<String>::new());
    assert!(!alive(pid), "the shim is still there");
    for hierarchy in std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        let pods = hierarchy.path().join(node.cgroup().trim_start_matches('/'));
        let left: Vec<_> = std::fs::read_dir(pods)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|e| e.file_type().unwrap().is_dir())
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }
    for dir in [
        "root/sandboxes",
        "root/containers",
        "run/cri/netns",
        "run/cri/shim",
        "run/cri/shm",
    ] {
        assert_eq!(
            std::fs::read_dir(node.path(dir)).unwrap().count(),
            0,
            "{dir}"
        );
    }
    assert!(
        c.0.list_containers(v1::ListContainersRequest::default())
            .await
            .unwrap()
            .into_inner()
            .containers
            .is_empty()
    );
    // Doing it again is no error.
    c.remove_sandbox(&sandbox).await;
    c.0.remove_container(v1::RemoveContainerRequest { container_id: id })
        .await
        .unwrap();
    drop(c);
    node.stop();
    for hierarchy in std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        let top = hierarchy.path().join(node.cgroup().trim_start_matches('/'));
        assert!(!top.exists(), "{}", top.display());
    }
    assert!(!node.unified_cgroup().exists());
    assert!(!node.path("run/cri.sock").exists());
}

#[tokio::test]
async fn exec_gives_output_code_and_timeout() {
    if harness::not_root() {
        return;
    }
    let node = Node::start();
    node.busybox();
    let mut c = Client(node.runtime().await);
    let sandbox = c.sandbox(pod(&node, "exec")).await;
    let id = c.run(&sandbox, shell("main", "sleep 1000")).await;
    let out = c
        .exec(&id, &["sh", "-c", "echo out; echo err >&2; exit 3"])
        .await;
    assert_eq!(
        (out.stdout.as_slice(), out.stderr.as_slice(), out.exit_code),
        (&b"out\n"[..], &b"err\n"[..], 3)
    );
    let big = c
        .exec(
            &id,
            &["sh", "-c", "dd if=/dev/zero bs=1000 count=3000 2>/dev/null"],
        )
        .await;
    assert_eq!(big.stdout.len(), 3_000_000);
    for _ in 0..20 {
        assert_eq!(c.exec(&id, &["true"]).await.exit_code, 0);
    }
    let begin = Instant::now();
    let err =
        c.0.exec_sync(v1::ExecSyncRequest {
            container_id: id.clone(),
            cmd: vec!["sleep".into(), "777".into()],
            timeout: 1,
        })
        .await
        .unwrap_err();
    assert_eq!(err.code(), tonic::Code::DeadlineExceeded);
    assert!(begin.elapsed() < Duration::from_secs(5));
    tokio::time::sleep(Duration::from_millis(200)).await;
    let ps = String::from_utf8(c.exec(&id, &["ps"]).await.stdout).unwrap();
    assert!(
        !ps.contains("777"),
        "the process outlives its timeout: {ps}"
    );
    let err =
        c.0.exec_sync(v1::ExecSyncRequest {
            container_id: id.clone(),
            cmd: vec!["no-such-tool".into()],
            timeout: 5,
        })
        .await
        .unwrap_err();
    assert!(err.message().contains("no-such-tool"), "{err}");
    c.remove_sandbox(&sandbox).await;
}

#[tokio::test]
async fn a_killed_server_finds_everything_as_it_was() {
    if harness::not_root() {
        return;
    }
    let mut node = Node::start();
    node.busybox();
    let mut c = Client(node.runtime().await);
    let sandbox = c.sandbox(pod(&node, "keep")).await;
    let runs = c
        .run(
            &sandbox,
            shell(
                "runs",
                "n=0; while sleep 0.1; do n=$((n+1)); echo tick $n; done",
            ),
        )
        .await;
    let ends = c.run(&sandbox, shell("ends", "sleep 1; exit 5")).await;
    let before = c.status(&runs).await;
    node.kill();
    std::thread::sleep(Duration::from_millis(1500));
    node.boot();
    let mut c = Client(node.runtime().await);
    let after = c.status(&runs).await;
    assert_eq!(after.state(), v1::ContainerState::ContainerRunning);
    assert_eq!(after.started_at, before.started_at, "not restarted");
    assert_eq!(
        c.wait_exit(&ends).await.exit_code,
        5,
        "the exit while nobody looked is known"
    );
    assert_eq!(
        c.sandbox_status(&sandbox).await.state(),
        v1::PodSandboxState::SandboxReady
    );
    assert!(
        !c.sandbox_status(&sandbox)
            .await
            .network
            .unwrap()
            .ip
            .is_empty()
    );
    assert_eq!(c.exec(&runs, &["true"]).await.exit_code, 0);
    let ticks = log(&after).len();
    assert!(ticks >= 10, "output went on being logged: {ticks} lines");
    // Events flow again after the restart.
    let late = c.run(&sandbox, shell("late", "exit 9")).await;
    assert_eq!(c.wait_exit(&late).await.exit_code, 9);
    c.remove_sandbox(&sandbox).await;
    assert_eq!(mounts_below(node.dir.path()), Vec::<String>::new());
}

/// The processes whose command line has `text`.
fn processes(text: &str) -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| {
            std::fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).contains(text))
        })
        .collect()
}

#[tokio::test]
async fn a_start_that_was_cut_leaves_nothing() {
    if harness::not_root() {
        return;
    }
    let mut node = Node::start();
    node.busybox();
    let mut c = Client(node.runtime().await);
    let sandbox = c.sandbox(pod(&node, "cut")).await;
    node.kill();
    // As it is noted while the shim starts; and the network's plugins have just run.
    let file = node.root().join(format!("sandboxes/{sandbox}/record.json"));
    let mut record: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    record["ready"] = false.into();
    record["shim_pid"] = 0.into();
    record["attachment"]["result"] = serde_json::Value::Null;
    std::fs::write(&file, record.to_string()).unwrap();
    node.boot();
    let mut c = Client(node.runtime().await);
    assert_eq!(processes(&sandbox).len(), 1);
    let leases = || std::fs::read_dir(node.path("ipam").join(&node.name)).unwrap();
    let leased = |entry: std::fs::DirEntry| {
        entry
            .file_name()
            .to_string_lossy()
            .starts_with("10.")
            .then_some(())
    };
    assert_eq!(leases().flatten().filter_map(leased).count(), 1);
    c.remove_sandbox(&sandbox).await;
    assert_eq!(processes(&sandbox), Vec::<i32>::new());
    assert_eq!(leases().flatten().filter_map(leased).count(), 0);
    assert!(!node.unified_cgroup().join(&sandbox).exists());
    assert_eq!(mounts_below(node.dir.path()), Vec::<String>::new());
}

#[test]
fn a_shim_whose_starter_is_gone_ends() {
    if harness::not_root() {
        return;
    }
    let dir = tempfile::Builder::new().prefix("xbcri-").tempdir().unwrap();
    let (spec, socket) = (dir.path().join("shim.json"), dir.path().join("s.sock"));
    let text = serde_json::json!({
        "id": "a", "socket": socket, "log": dir.path().join("log"), "hostname": null,
        "host_ipc": false, "shared_pid": true, "unified_cgroup": null,
    });
    std::fs::write(&spec, text.to_string()).unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut starter = std::process::Command::new(harness::executable());
    starter.args(["shim", "--spec"]).arg(&spec).stdout(writer);
    assert!(starter.status().unwrap().success());
    let end = Instant::now() + Duration::from_secs(20);
    while !processes(&spec.to_string_lossy()).is_empty() {
        assert!(Instant::now() < end, "the shim goes on");
        std::thread::sleep(Duration::from_millis(10));
    }
    let said = std::fs::read_to_string(dir.path().join("log")).unwrap();
    assert!(said.contains("who started it is gone"), "{said}");
    assert!(!socket.exists());
}

#[tokio::test]
async fn a_missing_command_or_image_says_so() {
    if harness::not_root() {
        return;
    }
    let node = Node::start();
    node.busybox();
    let mut c = Client(node.runtime().await);
    let sandbox = c.sandbox(pod(&node, "bad")).await;
    let mut config = shell("bad", "");
    config.command = vec!["/no/such/program".into()];
    let id = c.create(&sandbox, config).await;
    let err = c.start(&id).await.unwrap_err();
    assert!(err.message().contains("/no/such/program"), "{err}");
    let status = c.status(&id).await;
    assert_eq!(
        (status.exit_code, status.reason.as_str()),
        (128, "StartError")
    );

    let mut config = shell("none", "");
    config.image = Some(v1::ImageSpec {
        image: "localhost/absent:1".into(),
        ..v1::ImageSpec::default()
    });
    let err =
        c.0.create_container(v1::CreateContainerRequest {
            pod_sandbox_id: sandbox.clone(),
            config: Some(config),
            sandbox_config: None,
        })
        .await
        .unwrap_err();
    assert!(err.message().contains("localhost/absent:1"), "{err}");
    c.remove_sandbox(&sandbox).await;
}

#[tokio::test]
async fn a_hundred_short_lives_are_all_seen_and_pods_join_their_cgroup() {
    if harness::not_root() {
        return;
    }
    let node = Node::start();
    node.busybox();
    let mut c = Client(node.runtime().await);
    let sandbox = c.sandbox(pod(&node, "many")).await;
    for n in 0..100 {
        let id = c
            .run(
                &sandbox,
                shell(&format!("c{n}"), &format!("echo {n}; exit {n}")),
            )
            .await;
        let status = c.wait_exit(&id).await;
        assert_eq!(status.exit_code, n);
        assert_eq!(log(&status), [format!("stdout F {n}")]);
        c.0.remove_container(v1::RemoveContainerRequest { container_id: id })
            .await
            .unwrap();
    }
    let id = c.run(&sandbox, shell("cg", "cat /proc/self/cgroup")).await;
    let lines = log(&c.wait_exit(&id).await);
    let unified = lines
        .iter()
        .find_map(|l| l.strip_prefix("stdout F 0::"))
        .unwrap();
    let dir = node.unified_cgroup();
    assert!(dir.join(&sandbox).is_dir());
    assert!(
        unified.ends_with(&sandbox) || unified.ends_with(&id),
        "{unified}"
    );
    c.remove_sandbox(&sandbox).await;
    assert!(!dir.join(&sandbox).exists());
}
