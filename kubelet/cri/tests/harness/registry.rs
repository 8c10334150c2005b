//! Debian's `docker-registry` on a loopback port, and images for it.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use xebec_cri::images::store::sha256;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// A registry with its storage in a directory; both go at the end.
pub struct Registry {
    child: Child,
    dir: tempfile::TempDir,
    pub host: String,
    user: Option<&'static str>,
}

impl Registry {
    /// Starts one that everybody may use, or only the user `me` with the password `secret`.
    pub fn start(password: bool) -> Self {
        let dir = tempfile::Builder::new().prefix("xbreg-").tempdir().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        drop(listener);
        let root = dir.path().display();
        let mut config = json!({
            "version": 0.1,
            "log": {"level": "error"},
            "storage": {"filesystem": {"rootdirectory": format!("{root}/data")}},
            "http": {"addr": host},
        });
        if password {
            let file = format!("{root}/htpasswd");
            let line = "me:$2a$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";
            std::fs::write(&file, line).unwrap();
            config["auth"] = json!({"htpasswd": {"realm": "test", "path": file}});
        }
        // JSON is YAML.
        std::fs::write(dir.path().join("config.yml"), config.to_string()).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(dir.path().join("config.yml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the Debian package docker-registry is needed");
        let end = Instant::now() + Duration::from_secs(10);
        while std::net::TcpStream::connect(&host).is_err() {
            assert!(Instant::now() < end, "docker-registry does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        let user = password.then_some("me:secret");
        Self {
            child,
            dir,
            host,
            user,
        }
    }

    fn curl(&self, args: &[&str]) -> String {
        let mut command = Command::new("curl");
        command.args(["-sS", "--fail-with-body"]);
        if let Some(user) = self.user {
            command.args(["-u", user]);
        }
        let out = command.args(args).output().unwrap();
        assert!(
            out.status.success(),
            "curl {args:?}: {}{}",
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        );
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    fn put(&self, url: &str, kind: &str, content: &[u8]) {
        let file = self.dir.path().join("upload");
        std::fs::write(&file, content).unwrap();
        let kind = format!("Content-Type: {kind}");
        let data = format!("@{}", file.display());
        self.curl(&["-X", "PUT", "-H", &kind, "--data-binary", &data, url]);
    }

    /// Uploads a blob and gives its digest.
    pub fn put_blob(&self, repo: &str, content: &[u8]) -> String {
        let digest = sha256(content);
        let url = format!("http://{}/v2/{repo}/blobs/uploads/", self.host);
        let head = self.curl(&["-X", "POST", "-D", "-", "-o", "/dev/null", &url]);
        let location = head.lines().find_map(|line| {
            let (name, value) = line.split_once(": ")?;
            let is_it = name.eq_ignore_ascii_case("location");
            is_it.then(|| value.trim().to_owned())
        });
        let url = format!("{}&digest={digest}", location.unwrap());
        self.put(&url, "application/octet-stream", content);
        digest
    }

    /// Uploads a manifest and gives its digest.
    pub fn put_manifest(&self, repo: &str, tag: &str, kind: &str, text: &str) -> String {
        let url = format!("http://{}/v2/{repo}/manifests/{tag}", self.host);
        self.put(&url, kind, text.as_bytes());
        sha256(text.as_bytes())
    }

    /// Uploads an image and gives its manifest's digest.
    pub fn push(&self, repo: &str, tag: &str, image: &TestImage) -> String {
        self.put_blob(repo, image.config.as_bytes());
        for (_, data) in &image.layers {
            self.put_blob(repo, data);
        }
        self.put_manifest(repo, tag, MANIFEST, &image.manifest())
    }

    /// Damages a blob in the registry's storage.
    pub fn corrupt(&self, digest: &str) {
        let hex = &digest[7..];
        let path = self.dir.path().join(format!(
            "data/docker/registry/v2/blobs/sha256/{}/{hex}/data",
            &hex[..2]
        ));
        let mut content = std::fs::read(&path).unwrap();
        let at = content.len() / 2;
        content[at] ^= 0xff;
        std::fs::write(&path, content).unwrap();
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A config and layers with their media types.
pub struct TestImage {
    pub config: String,
    pub layers: Vec<(&'static str, Vec<u8>)>,
}

impl TestImage {
    /// Debian's static busybox as the one layer; all its commands are run by its shell.
    pub fn shell() -> Self {
        let mut builder = tar::Builder::new(Vec::new());
        builder
            .append_path_with_name(Path::new("/bin/busybox"), "bin/sh")
            .unwrap();
        let layer = builder.into_inner().unwrap();
        let run = json!({"Entrypoint": ["/bin/sh", "-c"], "Cmd": ["exit 0"]});
        Self {
            config: config(run, &[&layer]),
            layers: vec![(LAYER, layer)],
        }
    }

    /// The text of its manifest.
    pub fn manifest(&self) -> String {
        let one = |kind: &str, data: &[u8]| json!({"mediaType": kind, "digest": sha256(data), "size": data.len()});
        let layers: Vec<Value> = self
            .layers
            .iter()
            .map(|(kind, data)| one(kind, data))
            .collect();
        json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": one(CONFIG, self.config.as_bytes()),
            "layers": layers,
        })
        .to_string()
    }
}

/// An image's config: how it runs, and its layers as they are unpacked.
pub fn config(run: Value, layers: &[&[u8]]) -> String {
    let diff: Vec<String> = layers.iter().map(|layer| sha256(layer)).collect();
    json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": run,
        "rootfs": {"type": "layers", "diff_ids": diff},
    })
    .to_string()
}
