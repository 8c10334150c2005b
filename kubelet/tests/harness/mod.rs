//! A node for tests: this kubelet with the real container runtime against the real API server, in one process.

#![allow(dead_code, unused_imports, reason = "each test file uses a part of it")]

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use k8s_openapi::api::core::v1::{Event, Pod, ServiceAccount};
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{Config as Watch, watcher};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use xebec_apiserver::{ApiServer, UserInfo};
use xebec_cri::images::store::ExecutionConfig;
use xebec_cri::images::{FileContent, LayerFile, import_image};
use xebec_store::{Embedded, Options};

mod seen;

pub use seen::{condition, container, is_running, phase, waiting};

pub const NODE: &str = "testnode";
pub const IMAGE: &str = "localhost/busybox:test";

/// The node; what it has made is removed by `end`.
pub struct Node {
    pub client: Client,
    pub dir: tempfile::TempDir,
    pub port: u16,
    pub kubelet: CancellationToken,
    runtime: CancellationToken,
    kubelets: JoinSet<anyhow::Result<()>>,
    rest: JoinSet<anyhow::Result<()>>,
    server: Arc<ApiServer>,
}

/// Whether to leave a test out, as `cargo xtask test` runs these as root.
pub fn not_root() -> bool {
    if nix::unistd::geteuid().is_root() {
        return false;
    }
    eprintln!("left out: this test needs root");
    true
}

/// A server with a certificate of its own making.
pub fn tls() -> rustls::ServerConfig {
    let key = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![key.cert.der().clone()],
            rustls::pki_types::PrivateKeyDer::Pkcs8(key.signing_key.serialize_der().into()),
        )
        .unwrap()
}

impl Node {
    pub async fn start(port: u16) -> Self {
        let _ = tracing_subscriber::fmt()
            .with_env_filter(
                tracing_subscriber::EnvFilter::try_from_default_env()
                    .unwrap_or_else(|_| "warn,xebec_kubelet=info".into()),
            )
            .with_test_writer()
            .try_init();
        let dir = tempfile::Builder::new()
            .prefix("xbkubelet-")
            .tempdir()
            .unwrap();
        let store = Embedded::open(&dir.path().join("store"), Options::default()).unwrap();
        let (runtime, kubelet) = (CancellationToken::new(), CancellationToken::new());
        let config = xebec_apiserver::Config {
            service_account_key_pem: rcgen::KeyPair::generate().unwrap().serialize_pem(),
            ..xebec_apiserver::Config::default()
        };
        let server = ApiServer::start(config, store, runtime.clone())
            .await
            .unwrap();
        let admin = UserInfo::new("kubernetes-admin", &["system:masters"]);
        let client = Client::new(server.in_process(admin), "default");
        let mut node = Self {
            client,
            port,
            kubelet,
            runtime,
            kubelets: JoinSet::new(),
            rest: JoinSet::new(),
            server,
            dir,
        };
        node.busybox();
        let test = std::env::current_exe().unwrap();
        let shim = test
            .parent()
            .unwrap()
            .with_file_name("examples")
            .join("shim");
        assert!(shim.exists(), "{} is not built", shim.display());
        for dir in ["cni", "cni-bin"] {
            std::fs::create_dir(node.path(dir)).unwrap();
        }
        let cri = xebec_cri::Config {
            shim_command: vec![shim.to_string_lossy().into_owned()],
            cni_bin_dirs: vec![node.path("cni-bin")],
            cni_conf_dir: node.path("cni"),
            cgroup_parent: node.cgroup(),
            ..xebec_cri::Config::new(node.path("cri"), node.path("run"))
        };
        node.rest.spawn(xebec_cri::run(cri, node.runtime.clone()));
        let account = json!({"metadata": {"name": "default"}});
        node.api::<ServiceAccount>()
            .create(
                &PostParams::default(),
                &serde_json::from_value(account).unwrap(),
            )
            .await
            .unwrap();
        node.start_kubelet();
        node
    }

    pub fn path(&self, tail: &str) -> PathBuf {
        self.dir.path().join(tail)
    }

    fn cgroup(&self) -> String {
        format!("/xbkubelet-{}", self.port)
    }

    /// A kubelet; another one may have run before.
    pub fn start_kubelet(&mut self) {
        let user = format!("system:node:{NODE}");
        let user = UserInfo::new(&user, &["system:nodes"]);
        let client = Client::new(self.server.in_process(user), "default");
        let mut config = xebec_kubelet::Config::new(
            NODE.into(),
            vec![IpAddr::V4(Ipv4Addr::LOCALHOST)],
            self.path("run/cri.sock"),
            self.path("kubelet"),
            Arc::new(tls()),
        );
        config.port = self.port;
        config.cgroup_parent = format!("{}/kubepods", self.cgroup());
        self.kubelet = CancellationToken::new();
        self.kubelets
            .spawn(xebec_kubelet::run(client, config, self.kubelet.clone()));
    }

    /// Ends the kubelet alone; it must do so at once.
    pub async fn stop_kubelet(&mut self) {
        self.kubelet.cancel();
        let ended = tokio::time::timeout(Duration::from_secs(3), self.kubelets.join_next()).await;
        ended
            .expect("the kubelet must end when it is told to")
            .unwrap()
            .unwrap()
            .unwrap();
    }

    pub fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), "default")
    }

    /// Makes a pod of one container `c` on the node's own network; `more` is merged into its spec, `container` into
    /// the container.
    pub async fn pod(&self, name: &str, container: Value, more: Value) -> Pod {
        let mut first = json!({"name": "c", "image": IMAGE, "imagePullPolicy": "Never"});
        merge(&mut first, container);
        let mut spec = json!({
            "nodeName": NODE, "hostNetwork": true, "automountServiceAccountToken": false,
            "terminationGracePeriodSeconds": 2, "containers": [first],
        });
        merge(&mut spec, more);
        let pod = json!({"metadata": {"name": name}, "spec": spec});
        self.api::<Pod>()
            .create(
                &PostParams::default(),
                &serde_json::from_value(pod).unwrap(),
            )
            .await
            .unwrap()
    }

    /// Waits until a pod is as wanted; says how it was when it takes too long.
    pub async fn until(&self, name: &str, what: &str, wanted: impl Fn(&Pod) -> bool) -> Pod {
        let mut last = None;
        let seen = async {
            let watch = Watch::default().fields(&format!("metadata.name={name}"));
            let stream = watcher(self.api::<Pod>(), watch)
                .default_backoff()
                .applied_objects();
            let mut stream = std::pin::pin!(stream);
            while let Ok(Some(pod)) = stream.try_next().await {
                if wanted(&pod) {
                    return pod;
                }
                last = Some(pod);
            }
            panic!("the watch ended");
        };
        match tokio::time::timeout(Duration::from_secs(40), seen).await {
            Ok(pod) => pod,
            Err(_) => panic!(
                "{name} is not {what}: {}\n{:#?}",
                serde_json::to_string_pretty(&last.and_then(|pod| pod.status)).unwrap(),
                self.events(name).await,
            ),
        }
    }

    /// Waits until all of a pod's containers have ended well.
    pub async fn until_succeeded(&self, name: &str) -> Pod {
        self.until(name, "Succeeded", |pod| phase(pod) == "Succeeded")
            .await
    }

    /// Waits until a pod has an event like this.
    pub async fn until_said(&self, name: &str, wanted: impl Fn(&str) -> bool) -> String {
        for _ in 0..200 {
            if let Some(said) = self
                .events(name)
                .await
                .into_iter()
                .find(|said| wanted(said))
            {
                return said;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("{name} said only: {:#?}", self.events(name).await);
    }

    /// Waits until a pod is gone, and says how long that took.
    pub async fn until_gone(&self, name: &str) -> Duration {
        let started = Instant::now();
        while self.api::<Pod>().get_opt(name).await.unwrap().is_some() {
            assert!(started.elapsed() < Duration::from_secs(40), "{name} stays");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        started.elapsed()
    }

    pub async fn delete(&self, name: &str, grace: Option<u32>) {
        let params = DeleteParams {
            grace_period_seconds: grace,
            ..DeleteParams::default()
        };
        self.api::<Pod>().delete(name, &params).await.unwrap();
    }

    /// `reason: message` of a pod's events.
    pub async fn events(&self, name: &str) -> Vec<String> {
        let list = self.api::<Event>().list(&ListParams::default()).await;
        let mine = |event: &Event| event.involved_object.name.as_deref() == Some(name);
        let text = |event: Event| {
            format!(
                "{}: {}",
                event.reason.unwrap_or_default(),
                event.message.unwrap_or_default()
            )
        };
        list.unwrap().into_iter().filter(mine).map(text).collect()
    }

    /// Ends everything; no pod may be left behind, nor a mount.
    pub async fn end(mut self) {
        for pod in self
            .api::<Pod>()
            .list(&ListParams::default())
            .await
            .unwrap()
        {
            self.delete(&pod.name_any(), Some(0)).await;
        }
        let started = Instant::now();
        let dirs = ["kubelet/pods", "kubelet/logs", "cri/sandboxes"].map(|tail| self.path(tail));
        while dirs
            .iter()
            .any(|dir| dir.read_dir().is_ok_and(|mut d| d.next().is_some()))
        {
            assert!(
                started.elapsed() < Duration::from_secs(30),
                "something is left: {:?}",
                dirs.map(|dir| dir.read_dir().map(|d| d.flatten().collect::<Vec<_>>())),
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.stop_kubelet().await;
        self.runtime.cancel();
        let ended = async { while self.rest.join_next().await.is_some() {} };
        tokio::time::timeout(Duration::from_secs(10), ended)
            .await
            .expect("the runtime ends");
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let root = self.dir.path().to_string_lossy().into_owned();
        assert!(!mounts.contains(&root), "mounts are left:\n{mounts}");
    }

    /// An image out of Debian's static busybox.
    fn busybox(&self) {
        let file = |path: &str, mode, content| LayerFile {
            path: path.to_owned(),
            mode,
            content,
        };
        let passwd = b"root:x:0:0::/root:/bin/sh\n".to_vec();
        let mut files = vec![
            file(
                "bin/busybox",
                0o755,
                FileContent::File("/bin/busybox".into()),
            ),
            file("etc/passwd", 0o644, FileContent::Bytes(passwd)),
            file("tmp", 0o1777, FileContent::Directory),
        ];
        for tool in [
            "sh", "echo", "cat", "sleep", "id", "touch", "ls", "true", "false", "rm", "stat", "nc",
            "httpd", "mkdir", "test",
        ] {
            let link = FileContent::Link("busybox".to_owned());
            files.push(file(&format!("bin/{tool}"), 0o777, link));
        }
        let config = ExecutionConfig {
            env: vec!["PATH=/bin".to_owned()],
            ..ExecutionConfig::default()
        };
        import_image(&self.path("cri"), IMAGE, config, &files).unwrap();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kubelet.cancel();
        self.runtime.cancel();
        end_shims(self.dir.path());
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let root = self.dir.path().to_string_lossy().into_owned();
        for point in mounts.lines().rev().filter_map(|l| l.split(' ').nth(1)) {
            if point.starts_with(&root) {
                let _ = nix::mount::umount2(point, nix::mount::MntFlags::MNT_DETACH);
            }
        }
        for hierarchy in std::fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
        {
            remove_cgroups(&hierarchy.path().join(self.cgroup().trim_start_matches('/')));
        }
    }
}

/// What a failed test left: the shims that name our own folder.
fn end_shims(dir: &Path) {
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        let pid = entry.file_name().to_string_lossy().parse::<i32>();
        if let Ok(pid) = pid
            && line.contains("--spec")
            && line.contains(&*dir.to_string_lossy())
        {
            let pid = nix::unistd::Pid::from_raw(pid);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::SIGTERM);
            let end = Instant::now() + Duration::from_secs(5);
            while entry.path().exists() && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

fn remove_cgroups(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroups(&entry.path());
        }
    }
    let _ = std::fs::remove_dir(dir);
}

/// A container's command.
pub fn shell(script: &str) -> Value {
    json!({"command": ["sh", "-c", script]})
}

/// RFC 7386, as far as tests need it.
fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}
