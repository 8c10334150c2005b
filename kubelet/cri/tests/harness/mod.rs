//! A real server with a real shim in a temporary root, and a client for it.
#![allow(dead_code, reason = "not every test file uses all of it")]

pub mod registry;
pub mod spdy;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use xebec_cri::images::store::ExecutionConfig;
use xebec_cri::images::{FileContent, LayerFile, import_image};
use xebec_cri_api::v1;
use xebec_cri_api::v1::image_service_client::ImageServiceClient;
use xebec_cri_api::v1::runtime_service_client::RuntimeServiceClient;

/// A server and its temporary root; all is removed at the end.
pub struct Node {
    pub dir: tempfile::TempDir,
    server: Option<Child>,
    pub name: String,
}

/// The server's executable, which is its shim's too.
pub fn executable() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let server = test.parent().unwrap().with_file_name("examples");
    let server = server.join("cri");
    assert!(
        server.exists(),
        "{} is not built; run cargo build -p xebec-cri --examples",
        server.display()
    );
    server
}

impl Node {
    /// Starts a server with a network made by Debian's CNI plugins.
    pub fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("xbcri-").tempdir().unwrap();
        let tail = dir.path().to_string_lossy().to_lowercase();
        let name: String = tail
            .chars()
            .rev()
            .take(6)
            .filter(char::is_ascii_alphanumeric)
            .collect();
        let conf = dir.path().join("cni");
        std::fs::create_dir(&conf).unwrap();
        let node = Self {
            dir,
            server: None,
            name,
        };
        node.write_network();
        let mut node = node;
        node.boot();
        node
    }

    pub fn write_network(&self) {
        std::fs::write(
            self.path("cni/10-test.conflist"),
            format!(
                r#"{{"cniVersion":"1.0.0","name":"{0}","plugins":[{{"type":"bridge","bridge":"xbc{0}","isGateway":true,"ipam":{{"type":"host-local","dataDir":"{1}","ranges":[[{{"subnet":"10.213.7.0/24"}}]]}}}}]}}"#,
                self.name,
                self.path("ipam").display()
            ),
        )
        .unwrap();
    }

    pub fn path(&self, tail: &str) -> PathBuf {
        self.dir.path().join(tail)
    }

    pub fn root(&self) -> PathBuf {
        self.path("root")
    }

    pub fn cgroup(&self) -> String {
        format!("/xbcri-{}", self.name)
    }

    /// Where pods' processes go in the cgroup2 hierarchy.
    pub fn unified_cgroup(&self) -> PathBuf {
        let hybrid = Path::new("/sys/fs/cgroup/unified");
        let base = if hybrid.is_dir() {
            hybrid
        } else {
            Path::new("/sys/fs/cgroup")
        };
        base.join(format!("xbcri-net-{}", self.name))
    }

    /// Starts the server (again).
    pub fn boot(&mut self) {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.path("server.log"))
            .unwrap();
        let child = Command::new(executable())
            .args([self.path("root"), self.path("run"), self.path("cni")])
            .arg("/usr/lib/cni")
            .env("XEBEC_CGROUP_PARENT", self.cgroup())
            .env("XEBEC_UNIFIED_CGROUP", self.unified_cgroup())
            .env("RUST_LOG", "info,xebec_cri=debug")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.server = Some(child);
        let end = Instant::now() + Duration::from_secs(20);
        while std::os::unix::net::UnixStream::connect(self.path("run/cri.sock")).is_err() {
            assert!(
                Instant::now() < end,
                "the server does not listen: {}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// kill -9.
    pub fn kill(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.kill().unwrap();
            server.wait().unwrap();
        }
    }

    /// Asks the server to end, and waits until it has.
    pub fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            // SAFETY: plain kill of this test's own child.
            unsafe { libc::kill(server.id() as i32, libc::SIGTERM) };
            let end = Instant::now() + Duration::from_secs(10);
            loop {
                if let Some(status) = server.try_wait().unwrap() {
                    assert!(status.success(), "{}", self.log());
                    return;
                }
                if Instant::now() > end {
                    let _ = server.kill();
                    let _ = server.wait();
                    panic!("the server does not end on SIGTERM");
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("server.log")).unwrap_or_default()
    }

    async fn channel(&self) -> Channel {
        let socket = self.path("run/cri.sock");
        Endpoint::from_static("http://cri")
            .connect_with_connector(tower::service_fn(move |_| {
                let socket = socket.clone();
                async move {
                    Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(
                        UnixStream::connect(socket).await?,
                    ))
                }
            }))
            .await
            .unwrap()
    }

    pub async fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel().await)
    }

    pub async fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel().await)
    }

    /// An image out of Debian's static busybox.
    pub fn busybox(&self) -> String {
        let mut files = vec![
            file(
                "bin/busybox",
                0o755,
                FileContent::File("/bin/busybox".into()),
            ),
            file(
                "etc/passwd",
                0o644,
                FileContent::Bytes(
                    b"root:x:0:0::/root:/bin/sh\nweb:x:101:102::/srv:/bin/sh\n".to_vec(),
                ),
            ),
            file(
                "etc/group",
                0o644,
                FileContent::Bytes(b"root:x:0:\nweb:x:102:\nextra:x:300:web\n".to_vec()),
            ),
            file("tmp", 0o1777, FileContent::Directory),
        ];
        for tool in [
            "sh", "echo", "cat", "sleep", "id", "ps", "ip", "hostname", "mount", "touch", "ls",
            "env", "stty", "kill", "dd", "tail", "head", "grep", "true", "false", "nc", "wc",
            "httpd", "awk", "tr", "pwd", "trap",
        ] {
            files.push(file(
                &format!("bin/{tool}"),
                0o777,
                FileContent::Link("busybox".to_owned()),
            ));
        }
        import_image(
            &self.root(),
            "localhost/busybox:test",
            ExecutionConfig {
                env: vec!["PATH=/bin".to_owned(), "FROM_IMAGE=yes".to_owned()],
                cmd: vec!["sh".to_owned(), "-c".to_owned(), "echo default".to_owned()],
                ..ExecutionConfig::default()
            },
            &files,
        )
        .unwrap()
    }
}

fn file(path: &str, mode: u32, content: FileContent) -> LayerFile {
    LayerFile {
        path: path.to_owned(),
        mode,
        content,
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("server log:\n{}", self.log());
            for entry in std::fs::read_dir(self.path("root/sandboxes"))
                .into_iter()
                .flatten()
                .flatten()
            {
                eprintln!(
                    "shim log:\n{}",
                    std::fs::read_to_string(entry.path().join("shim.log")).unwrap_or_default()
                );
            }
        }
        self.kill();
        // What a failed test left: the shims of this root, then its mounts.
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Ok(line) = std::fs::read(entry.path().join("cmdline")) else {
                continue;
            };
            let line = String::from_utf8_lossy(&line).into_owned();
            if line.contains("--spec")
                && line.contains(&*self.dir.path().to_string_lossy())
                && let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>()
            {
                // SAFETY: plain kill of a process that names our own directory.
                unsafe { libc::kill(pid, libc::SIGTERM) };
                let end = Instant::now() + Duration::from_secs(5);
                while entry.path().exists() && Instant::now() < end {
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        }
        for mount in mounts_below(self.dir.path()).iter().rev() {
            let _ = nix::mount::umount2(mount.as_str(), nix::mount::MntFlags::MNT_DETACH);
        }
        let _ = std::fs::remove_dir(self.unified_cgroup());
        for hierarchy in std::fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
        {
            let top = hierarchy.path().join(self.cgroup().trim_start_matches('/'));
            let _ = std::fs::remove_dir(top);
        }
        let _ = Command::new("ip")
            .args(["link", "del", &format!("xbc{}", self.name)])
            .stderr(Stdio::null())
            .status();
    }
}

/// Whether to leave a test out, as `cargo xtask test` runs these as root.
pub fn not_root() -> bool {
    if nix::unistd::geteuid().is_root() {
        return false;
    }
    eprintln!("left out: this test needs root");
    true
}

/// Mount points below a directory.
pub fn mounts_below(dir: &Path) -> Vec<String> {
    let prefix = dir.to_string_lossy().into_owned();
    std::fs::read_to_string("/proc/self/mountinfo")
        .unwrap()
        .lines()
        .filter_map(|l| l.split(' ').nth(4).map(str::to_owned))
        .filter(|m| m.starts_with(&prefix))
        .collect()
}

/// A pod's config.
pub fn pod(node: &Node, name: &str) -> v1::PodSandboxConfig {
    v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            namespace: "default".to_owned(),
            attempt: 0,
        }),
        hostname: name.to_owned(),
        log_directory: node
            .path(&format!("logs/{name}"))
            .to_string_lossy()
            .into_owned(),
        labels: [("app".to_owned(), name.to_owned())].into(),
        linux: Some(v1::LinuxPodSandboxConfig {
            security_context: Some(v1::LinuxSandboxSecurityContext {
                namespace_options: Some(v1::NamespaceOption {
                    network: v1::NamespaceMode::Pod as i32,
                    pid: v1::NamespaceMode::Container as i32,
                    ipc: v1::NamespaceMode::Pod as i32,
                    ..v1::NamespaceOption::default()
                }),
                ..v1::LinuxSandboxSecurityContext::default()
            }),
            ..v1::LinuxPodSandboxConfig::default()
        }),
        ..v1::PodSandboxConfig::default()
    }
}

/// A container's config that runs a shell script.
pub fn shell(name: &str, script: &str) -> v1::ContainerConfig {
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata {
            name: name.to_owned(),
            attempt: 0,
        }),
        image: Some(v1::ImageSpec {
            image: "localhost/busybox:test".to_owned(),
            ..v1::ImageSpec::default()
        }),
        command: vec!["sh".to_owned(), "-c".to_owned(), script.to_owned()],
        log_path: format!("{name}.log"),
        linux: Some(v1::LinuxContainerConfig {
            security_context: Some(v1::LinuxContainerSecurityContext {
                namespace_options: Some(v1::NamespaceOption {
                    pid: v1::NamespaceMode::Container as i32,
                    ..v1::NamespaceOption::default()
                }),
                ..v1::LinuxContainerSecurityContext::default()
            }),
            ..v1::LinuxContainerConfig::default()
        }),
        ..v1::ContainerConfig::default()
    }
}

/// Short names for what every test does.
#[derive(Clone)]
pub struct Client(pub RuntimeServiceClient<Channel>);

impl Client {
    pub async fn sandbox(&mut self, config: v1::PodSandboxConfig) -> String {
        self.0
            .run_pod_sandbox(v1::RunPodSandboxRequest {
                config: Some(config),
                ..v1::RunPodSandboxRequest::default()
            })
            .await
            .unwrap()
            .into_inner()
            .pod_sandbox_id
    }

    pub async fn create(&mut self, sandbox: &str, config: v1::ContainerConfig) -> String {
        self.0
            .create_container(v1::CreateContainerRequest {
                pod_sandbox_id: sandbox.to_owned(),
                config: Some(config),
                sandbox_config: None,
            })
            .await
            .unwrap()
            .into_inner()
            .container_id
    }

    pub async fn start(&mut self, id: &str) -> Result<(), tonic::Status> {
        self.0
            .start_container(v1::StartContainerRequest {
                container_id: id.to_owned(),
            })
            .await
            .map(|_| ())
    }

    pub async fn run(&mut self, sandbox: &str, config: v1::ContainerConfig) -> String {
        let id = self.create(sandbox, config).await;
        self.start(&id).await.unwrap();
        id
    }

    pub async fn status(&mut self, id: &str) -> v1::ContainerStatus {
        self.0
            .container_status(v1::ContainerStatusRequest {
                container_id: id.to_owned(),
                verbose: false,
            })
            .await
            .unwrap()
            .into_inner()
            .status
            .unwrap()
    }

    pub async fn sandbox_status(&mut self, id: &str) -> v1::PodSandboxStatus {
        self.0
            .pod_sandbox_status(v1::PodSandboxStatusRequest {
                pod_sandbox_id: id.to_owned(),
                verbose: false,
            })
            .await
            .unwrap()
            .into_inner()
            .status
            .unwrap()
    }

    /// Pid of a sandbox's shim.
    pub async fn shim_pid(&mut self, id: &str) -> i32 {
        let request = v1::PodSandboxStatusRequest {
            pod_sandbox_id: id.to_owned(),
            verbose: true,
        };
        let answer = self.0.pod_sandbox_status(request).await.unwrap();
        let info: serde_json::Value =
            serde_json::from_str(&answer.into_inner().info["info"]).unwrap();
        info["shim_pid"].as_i64().unwrap() as i32
    }

    pub async fn wait_exit(&mut self, id: &str) -> v1::ContainerStatus {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let status = self.status(id).await;
            if status.state() == v1::ContainerState::ContainerExited {
                return status;
            }
            assert!(Instant::now() < end, "container {id} does not end");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub async fn exec(&mut self, id: &str, command: &[&str]) -> v1::ExecSyncResponse {
        self.0
            .exec_sync(v1::ExecSyncRequest {
                container_id: id.to_owned(),
                cmd: command.iter().map(|c| (*c).to_owned()).collect(),
                timeout: 10,
            })
            .await
            .unwrap()
            .into_inner()
    }

    pub async fn remove_sandbox(&mut self, id: &str) {
        self.0
            .stop_pod_sandbox(v1::StopPodSandboxRequest {
                pod_sandbox_id: id.to_owned(),
            })
            .await
            .unwrap();
        self.0
            .remove_pod_sandbox(v1::RemovePodSandboxRequest {
                pod_sandbox_id: id.to_owned(),
            })
            .await
            .unwrap();
    }
}
