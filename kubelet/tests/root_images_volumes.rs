//! What pods bring from the API: credentials for their images, and volumes that belong to their group.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod harness;

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use kube::api::PostParams;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use xebec_cri::images::store::sha256;

use harness::{Node, container, not_root, waiting};

/// Debian's `docker-registry` on a loopback port; it knows the user `me` with the password `secret` alone.
struct Registry {
    child: Child,
    dir: tempfile::TempDir,
    host: String,
}

impl Registry {
    fn start() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("xbkubelet-reg-")
            .tempdir()
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        drop(listener);
        let root = dir.path().display();
        std::fs::write(
            dir.path().join("htpasswd"),
            "me:$2a$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n",
        )
        .unwrap();
        let config = json!({
            "version": 0.1,
            "log": {"level": "error"},
            "storage": {"filesystem": {"rootdirectory": format!("{root}/data")}},
            "http": {"addr": host},
            "auth": {"htpasswd": {"realm": "test", "path": format!("{root}/htpasswd")}},
        });
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
        let started = Instant::now();
        while TcpStream::connect(&host).is_err() {
            assert!(
                started.elapsed() < Duration::from_secs(10),
                "docker-registry does not start"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Self { child, dir, host }
    }

    fn curl(&self, args: &[&str]) -> String {
        let out = Command::new("curl")
            .args(["-sS", "--fail-with-body", "-u", "me:secret"])
            .args(args)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
        assert!(out.status.success(), "curl {args:?}: {said}");
        said
    }

    fn put(&self, url: &str, kind: &str, content: &[u8]) {
        let file = self.dir.path().join("upload");
        std::fs::write(&file, content).unwrap();
        let (kind, data) = (
            format!("Content-Type: {kind}"),
            format!("@{}", file.display()),
        );
        self.curl(&["-X", "PUT", "-H", &kind, "--data-binary", &data, url]);
    }

    fn put_blob(&self, repo: &str, content: &[u8]) -> Value {
        let digest = sha256(content);
        let url = format!("http://{}/v2/{repo}/blobs/uploads/", self.host);
        let head = self.curl(&["-X", "POST", "-D", "-", "-o", "/dev/null", &url]);
        let location = head
            .lines()
            .find_map(|line| {
                let (name, value) = line.split_once(": ")?;
                name.eq_ignore_ascii_case("location")
                    .then(|| value.trim().to_owned())
            })
            .unwrap();
        let url = format!("{location}&digest={digest}");
        self.put(&url, "application/octet-stream", content);
        json!({"digest": digest, "size": content.len()})
    }

    /// An image of one layer that holds a shell.
    fn push(&self, repo: &str) -> String {
        let layer = shell_layer();
        let config = json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "config": {"Entrypoint": ["/bin/sh", "-c"], "Cmd": ["exit 0"]},
            "rootfs": {"type": "layers", "diff_ids": [sha256(&layer)]},
        });
        let (mut layer, mut config) = (
            self.put_blob(repo, &layer),
            self.put_blob(repo, config.to_string().as_bytes()),
        );
        layer["mediaType"] = json!("application/vnd.oci.image.layer.v1.tar");
        config["mediaType"] = json!("application/vnd.oci.image.config.v1+json");
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest =
            json!({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": [layer]});
        let url = format!("http://{}/v2/{repo}/manifests/v1", self.host);
        self.put(&url, kind, manifest.to_string().as_bytes());
        format!("{}/{repo}:v1", self.host)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn shell_layer() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    builder
        .append_path_with_name(Path::new("/bin/busybox"), "bin/sh")
        .unwrap();
    builder.into_inner().unwrap()
}

async fn make<K>(node: &Node, object: Value)
where
    K: kube::Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned
        + serde::Serialize,
{
    let object: K = serde_json::from_value(object).unwrap();
    node.api::<K>()
        .create(&PostParams::default(), &object)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn private_images_are_pulled_with_the_pods_secrets() {
    if not_root() {
        return;
    }
    let node = Node::start(21071).await;
    let registry = Registry::start();
    let host = registry.host.as_str();
    // "me:secret"
    let new = json!({"auths": {host: {"auth": "bWU6c2VjcmV0"}}});
    // The closer entry is tried first, and is wrong.
    let old = json!({
        format!("http://{host}/v2/"): {"username": "me", "password": "secret"},
        format!("{host}/old"): {"username": "me", "password": "wrong"},
    });
    let elsewhere =
        json!({"auths": {"registry.example": {"username": "me", "password": "secret"}}});
    for (name, kind, key, content) in [
        ("new", "dockerconfigjson", ".dockerconfigjson", new),
        ("old", "dockercfg", ".dockercfg", old),
        (
            "elsewhere",
            "dockerconfigjson",
            ".dockerconfigjson",
            elsewhere,
        ),
    ] {
        let secret = json!({
            "metadata": {"name": name}, "type": format!("kubernetes.io/{kind}"),
            "stringData": {key: content.to_string()},
        });
        make::<Secret>(&node, secret).await;
    }
    for (name, secrets) in [
        ("new", json!([{"name": "elsewhere"}, {"name": "new"}])),
        ("old", json!([{"name": "old"}])),
        ("none", json!([{"name": "missing"}, {"name": "elsewhere"}])),
    ] {
        let image = registry.push(&format!("{name}/app"));
        let container = json!({"image": image, "imagePullPolicy": "Always"});
        let more = json!({"imagePullSecrets": secrets, "restartPolicy": "Never"});
        node.pod(name, container, more).await;
    }
    node.until_succeeded("new").await;
    node.until_succeeded("old").await;
    let refused = node
        .until("none", "refused", |pod| {
            waiting(pod).0 == "ImagePullBackOff"
        })
        .await;
    let message = waiting(&refused).1;
    assert!(message.contains("401"), "{message}");
    let said = node.events("none").await;
    let wanted = "FailedToRetrieveImagePullSecret: Unable to retrieve some image pull secrets (missing); attempting to pull the image may not succeed.";
    assert!(said.iter().any(|said| said == wanted), "{said:#?}");
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_belong_to_the_pods_group() {
    if not_root() {
        return;
    }
    let node = Node::start(21072).await;
    make::<Secret>(
        &node,
        json!({"metadata": {"name": "s"}, "stringData": {"key": "S"}}),
    )
    .await;
    make::<ConfigMap>(
        &node,
        json!({"metadata": {"name": "m"}, "data": {"key": "M"}}),
    )
    .await;
    let volumes = json!([
        {"name": "disk", "emptyDir": {}},
        {"name": "memory", "emptyDir": {"medium": "Memory"}},
        {"name": "secret", "secret": {"secretName": "s", "defaultMode": 0o400}},
        {"name": "map", "configMap": {"name": "m", "defaultMode": 0o400}},
        {"name": "projected", "projected": {"defaultMode": 0o400, "sources": [
            {"secret": {"name": "s", "items": [{"key": "key", "path": "sub/key"}]}},
        ]}},
    ]);
    let mounts: Vec<Value> = ["disk", "memory", "secret", "map", "projected"]
        .map(|name| json!({"name": name, "mountPath": format!("/{name}")}))
        .into();
    // What the kubelet has written is the group's to read, and what the pod writes is the group's too.
    let script = "id -u; for d in disk memory; do echo x > /$d/f; stat -c '%g %a' /$d /$d/f; done; \
        cat /secret/key /map/key /projected/sub/key; echo; stat -L -c '%u %g %a' /secret/key /map/key /projected/sub/key";
    let shell = |script: &str| {
        json!({
            "command": ["sh", "-c", format!("umask 022; ({script}) > /dev/termination-log 2>&1")],
            "volumeMounts": mounts,
        })
    };
    let more = |group: Value| {
        json!({
            "volumes": volumes, "restartPolicy": "Never",
            "securityContext": {"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": group},
        })
    };
    node.pod("of-group", shell(script), more(json!(4242))).await;
    // Without a group nobody but root may read such files.
    let refused = "cat /secret/key || cat /map/key || cat /projected/sub/key || echo refused";
    node.pod("of-none", shell(refused), more(Value::Null)).await;
    let said = |pod: &Pod| {
        let ended = container(pod).state.unwrap().terminated.unwrap();
        ended.message.unwrap_or_default()
    };
    let pod = node.until_succeeded("of-group").await;
    assert_eq!(
        said(&pod),
        "1000\n4242 2777\n4242 644\n4242 2777\n4242 644\nSMS\n0 4242 440\n0 4242 440\n0 4242 440\n"
    );
    let pod = node.until_succeeded("of-none").await;
    assert!(said(&pod).ends_with("refused\n"), "{}", said(&pod));
    node.end().await;
}
