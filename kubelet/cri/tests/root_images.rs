//! Images from a real registry (Debian's docker-registry) and from archives.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod harness;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::registry::{self, Registry, TestImage};
use harness::{Client, Node, pod, shell};
use xebec_cri::images::store::sha256;
use xebec_cri_api::v1;

fn tar_of(files: &[(&str, u32, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, mode, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(*mode);
        header.set_size(content.len() as u64);
        header.set_uid(0);
        header.set_gid(0);
        if path.ends_with('/') {
            header.set_entry_type(tar::EntryType::Directory);
        }
        builder.append_data(&mut header, path, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(data).unwrap();
    out.finish().unwrap()
}

/// Three layers: gzip with busybox, zstd with a whiteout and an opaque
/// directory, and a plain one.
fn image() -> TestImage {
    let busybox = std::fs::read("/bin/busybox").unwrap();
    let one = tar_of(&[
        ("bin/", 0o755, b""),
        ("bin/sh", 0o755, &busybox),
        ("dir/", 0o750, b""),
        ("dir/old", 0o644, b"old"),
        ("gone", 0o644, b"gone"),
        ("stays", 0o640, b"one"),
    ]);
    let two = tar_of(&[
        (".wh.gone", 0, b""),
        ("dir/", 0o755, b""),
        ("dir/.wh..wh..opq", 0, b""),
        ("dir/new", 0o644, b"two"),
    ]);
    let three = tar_of(&[("stays", 0o644, b"three"), ("last", 0o644, b"three")]);
    let run = serde_json::json!({
        "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["echo from image; cat /stays; echo; ls / /dir"],
        "Env": ["A=b"], "Labels": null,
    });
    let config = registry::config(run, &[&one, &two, &three]);
    let zstd = ruzstd::encoding::compress_to_vec(
        two.as_slice(),
        ruzstd::encoding::CompressionLevel::Fastest,
    );
    TestImage {
        config,
        layers: vec![
            ("application/vnd.oci.image.layer.v1.tar+gzip", gzip(&one)),
            ("application/vnd.oci.image.layer.v1.tar+zstd", zstd),
            ("application/vnd.oci.image.layer.v1.tar", three),
        ],
    }
}

async fn pull(
    node: &Node,
    name: &str,
    auth: Option<v1::AuthConfig>,
) -> Result<String, tonic::Status> {
    let mut images = node.images().await;
    images
        .pull_image(v1::PullImageRequest {
            image: Some(v1::ImageSpec {
                image: name.to_owned(),
                ..v1::ImageSpec::default()
            }),
            auth,
            sandbox_config: None,
        })
        .await
        .map(|r| r.into_inner().image_ref)
}

async fn status(node: &Node, name: &str) -> Option<v1::Image> {
    let mut images = node.images().await;
    images
        .image_status(v1::ImageStatusRequest {
            image: Some(v1::ImageSpec {
                image: name.to_owned(),
                ..v1::ImageSpec::default()
            }),
            verbose: false,
        })
        .await
        .unwrap()
        .into_inner()
        .image
}

fn entries(path: PathBuf) -> Vec<String> {
    std::fs::read_dir(path)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[tokio::test]
async fn images_are_pulled_run_and_removed() {
    if harness::not_root() {
        return;
    }
    let registry = Registry::start(false);
    let node = Node::start();
    let image = image();
    let digest = registry.push("team/app", "v1", &image);
    let index = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [
            {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": image.manifest().len(),
             "platform": {"os": "linux", "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }}},
        ],
    })
    .to_string();
    let index_digest = registry.put_manifest(
        "team/app",
        "multi",
        "application/vnd.oci.image.index.v1+json",
        &index,
    );

    let tagged = format!("{}/team/app:v1", registry.host);
    let id = pull(&node, &tagged, None).await.unwrap();
    assert_eq!(id, sha256(image.config.as_bytes()));
    let found = status(&node, &tagged).await.unwrap();
    assert_eq!(found.repo_tags, std::slice::from_ref(&tagged));
    assert_eq!(
        found.repo_digests,
        [format!("{}/team/app@{digest}", registry.host)]
    );
    // By digest, and through the index of several platforms: the same image.
    assert_eq!(
        pull(&node, &format!("{}/team/app@{digest}", registry.host), None)
            .await
            .unwrap(),
        id
    );
    assert_eq!(
        pull(&node, &format!("{}/team/app:multi", registry.host), None)
            .await
            .unwrap(),
        id
    );
    let found = status(&node, &id).await.unwrap();
    assert_eq!(found.repo_tags.len(), 2);
    assert!(
        found
            .repo_digests
            .iter()
            .any(|d| d.ends_with(&index_digest))
    );

    let mut c = Client(node.runtime().await);
    let sandbox = c.sandbox(pod(&node, "img")).await;
    let mut config = shell("img", "");
    config.command = vec![];
    config.image = Some(v1::ImageSpec {
        image: tagged.clone(),
        ..v1::ImageSpec::default()
    });
    let container = c.run(&sandbox, config).await;
    let ended = c.wait_exit(&container).await;
    let log = std::fs::read_to_string(&ended.log_path).unwrap();
    let lines: Vec<&str> = log
        .lines()
        .map(|l| l.splitn(4, ' ').nth(3).unwrap())
        .collect();
    assert_eq!(ended.exit_code, 0, "{log}");
    for line in ["from image", "three", "last", "new", "stays"] {
        assert!(lines.contains(&line), "{line:?} in {log}");
    }
    for line in ["gone", "old"] {
        assert!(!lines.contains(&line), "{line:?} in {log}");
    }
    assert_eq!(ended.image_id, id);
    c.remove_sandbox(&sandbox).await;

    let mut images = node.images().await;
    let usage = images
        .image_fs_info(v1::ImageFsInfoRequest {})
        .await
        .unwrap()
        .into_inner();
    assert!(usage.image_filesystems[0].used_bytes.unwrap().value > 500_000);
    images
        .remove_image(v1::RemoveImageRequest {
            image: Some(v1::ImageSpec {
                image: tagged.clone(),
                ..v1::ImageSpec::default()
            }),
        })
        .await
        .unwrap();
    assert!(status(&node, &tagged).await.is_none());
    for dir in ["snapshots", "blobs/sha256", "tmp", "images"] {
        assert_eq!(
            entries(node.root().join(dir)),
            Vec::<String>::new(),
            "{dir}"
        );
    }
}

#[tokio::test]
async fn what_is_wrong_with_a_pull_is_said_and_leaves_nothing() {
    if harness::not_root() {
        return;
    }
    let registry = Registry::start(false);
    let node = Node::start();
    let image = image();
    registry.push("app", "v1", &image);
    let absent = format!("{}/app:nope", registry.host);
    let err = pull(&node, &absent, None).await.unwrap_err();
    assert_eq!(err.code(), tonic::Code::NotFound);
    assert!(
        err.message().contains(&absent) && err.message().contains("not found"),
        "{err}"
    );
    let err = pull(&node, "127.0.0.1:1/app:v1", None).await.unwrap_err();
    assert!(
        err.message().contains("cannot reach registry 127.0.0.1:1"),
        "{err}"
    );
    assert!(pull(&node, "Not A Name", None).await.is_err());

    let layer = sha256(&image.layers[1].1);
    registry.corrupt(&layer);
    let err = pull(&node, &format!("{}/app:v1", registry.host), None)
        .await
        .unwrap_err();
    assert!(
        err.message().contains("corrupt") && err.message().contains(&layer),
        "{err}"
    );
    assert!(
        status(&node, &format!("{}/app:v1", registry.host))
            .await
            .is_none()
    );
    assert_eq!(entries(node.root().join("images")), Vec::<String>::new());
    assert_eq!(entries(node.root().join("tmp")), Vec::<String>::new());
    // A config that lies about its layer's content is found out as well.
    let mut lying = self::image();
    lying.config = lying.config.replace(
        &sha256(&tar_of(&[
            ("stays", 0o644, b"three"),
            ("last", 0o644, b"three"),
        ])),
        &sha256(b"other"),
    );
    let registry = Registry::start(false);
    registry.push("lying", "v1", &lying);
    let err = pull(&node, &format!("{}/lying:v1", registry.host), None)
        .await
        .unwrap_err();
    assert!(
        err.message().contains("expected uncompressed digest"),
        "{err}"
    );
}

#[tokio::test]
async fn a_private_image_needs_the_right_password() {
    if harness::not_root() {
        return;
    }
    let registry = Registry::start(true);
    let node = Node::start();
    registry.push("private", "v1", &image());
    let name = format!("{}/private:v1", registry.host);
    for auth in [
        None,
        Some(v1::AuthConfig {
            username: "me".into(),
            password: "wrong".into(),
            ..v1::AuthConfig::default()
        }),
    ] {
        let err = pull(&node, &name, auth).await.unwrap_err();
        assert!(err.message().contains("pull access denied"), "{err}");
    }
    let right = v1::AuthConfig {
        auth: "bWU6c2VjcmV0".into(),
        ..v1::AuthConfig::default()
    };
    pull(&node, &name, Some(right)).await.unwrap();
}

fn write_layout(dir: &Path, image: &TestImage, name: &str) {
    let blobs = dir.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let put = |data: &[u8]| std::fs::write(blobs.join(&sha256(data)[7..]), data).unwrap();
    put(image.config.as_bytes());
    for (_, data) in &image.layers {
        put(data);
    }
    let manifest = image.manifest();
    put(manifest.as_bytes());
    std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    std::fs::write(
        dir.join("index.json"),
        serde_json::json!({"schemaVersion": 2, "manifests": [{"digest": sha256(manifest.as_bytes()), "size": manifest.len(), "annotations": {"io.containerd.image.name": name}}]}).to_string(),
    )
    .unwrap();
}

#[tokio::test]
async fn archives_are_loaded_while_the_server_runs() {
    if harness::not_root() {
        return;
    }
    let node = Node::start();
    let image = image();
    let layout = node.path("layout");
    write_layout(&layout, &image, "localhost/oci:1");
    let names = xebec_cri::images::import(&node.root(), &layout).unwrap();
    assert_eq!(names, ["localhost/oci:1"]);
    assert_eq!(
        status(&node, "localhost/oci:1").await.unwrap().id,
        sha256(image.config.as_bytes())
    );

    let tar = node.path("oci.tar");
    let done = Command::new("tar")
        .arg("-C")
        .arg(&layout)
        .arg("-cf")
        .arg(&tar)
        .arg(".")
        .status()
        .unwrap();
    assert!(done.success());
    assert_eq!(
        xebec_cri::images::import(&node.root(), &tar).unwrap(),
        names
    );

    // What `docker save` writes: plain layers, a list of names.
    let docker = node.path("docker");
    std::fs::create_dir_all(docker.join("l")).unwrap();
    let plain = tar_of(&[("only", 0o644, b"docker")]);
    let config = serde_json::json!({"architecture": "amd64", "os": "linux", "config": {"Cmd": ["/only"]}, "rootfs": {"type": "layers", "diff_ids": [sha256(&plain)]}}).to_string();
    std::fs::write(docker.join("l/layer.tar"), &plain).unwrap();
    std::fs::write(docker.join("c.json"), &config).unwrap();
    std::fs::write(
        docker.join("manifest.json"),
        r#"[{"Config":"c.json","RepoTags":["dock:2"],"Layers":["l/layer.tar"]}]"#,
    )
    .unwrap();
    assert_eq!(
        xebec_cri::images::import(&node.root(), &docker).unwrap(),
        ["docker.io/library/dock:2"]
    );
    assert_eq!(
        status(&node, "dock:2").await.unwrap().id,
        sha256(config.as_bytes())
    );

    std::fs::write(docker.join("l/layer.tar"), b"not a layer").unwrap();
    std::fs::write(
        docker.join("manifest.json"),
        r#"[{"Config":"c2.json","RepoTags":["bad:1"],"Layers":["l/layer.tar"]}]"#,
    )
    .unwrap();
    std::fs::write(
        docker.join("c2.json"),
        config.replace(&sha256(&plain), &sha256(b"x")),
    )
    .unwrap();
    assert!(xebec_cri::images::import(&node.root(), &docker).is_err());
    std::fs::write(
        docker.join("manifest.json"),
        r#"[{"Config":"../../etc/passwd","RepoTags":["bad:1"],"Layers":[]}]"#,
    )
    .unwrap();
    assert!(xebec_cri::images::import(&node.root(), &docker).is_err());
    assert!(status(&node, "bad:1").await.is_none());
    let err = xebec_cri::images::import(&node.root(), Path::new("/bin/busybox")).unwrap_err();
    assert!(
        format!("{err:#}").contains("not an archive") || format!("{err:#}").contains("damaged"),
        "{err:#}"
    );
}
