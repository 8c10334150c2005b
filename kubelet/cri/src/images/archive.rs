//! Loads images from files: OCI image layouts (a directory or a tar) and the
//! archives that `docker save` writes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use serde::Deserialize;

use super::build::go_arch;
use super::reference::{Reference, check_digest};
use super::store::{ImageConfig, ImageRecord, ImageStore, chain_ids, check_content, sha256};
use super::unpack::{decompress, ensure_layer};

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Clone, Deserialize)]
struct Descriptor {
    digest: String,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    platform: Option<Platform>,
}

#[derive(Clone, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

#[derive(Deserialize)]
struct Manifest {
    #[serde(default)]
    manifests: Vec<Descriptor>,
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerEntry {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// Loads every image of `path` (a directory or a tar, which may be compressed)
/// into the store in `root`, which a running server may use at the same time.
/// Returns the names, or the ids of images without a name.
pub fn import(root: &Path, path: &Path) -> anyhow::Result<Vec<String>> {
    let store = ImageStore::open(root)?;
    let _lock = store.lock_shared()?;
    if path.is_dir() {
        return load(&store, path);
    }
    let scratch = store.scratch()?;
    let dir = scratch.path().join("archive");
    std::fs::create_dir(&dir)?;
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut archive = tar::Archive::new(decompress(BufReader::new(file))?);
    for entry in archive
        .entries()
        .with_context(|| format!("{} is not an archive", path.display()))?
    {
        let mut entry = entry.with_context(|| format!("{} is damaged", path.display()))?;
        // Files and directories only: an image archive needs no links but those
        // of `docker save`, which point to layers within it.
        let kind = entry.header().entry_type();
        if kind.is_file() || kind.is_dir() || kind.is_symlink() || kind.is_hard_link() {
            entry
                .unpack_in(&dir)
                .with_context(|| format!("cannot unpack {}", path.display()))?;
        }
    }
    load(&store, &dir)
}

fn load(store: &ImageStore, dir: &Path) -> anyhow::Result<Vec<String>> {
    // `docker save` writes both forms since version 25; its own has all names.
    if dir.join("manifest.json").is_file() {
        return load_docker(store, dir);
    }
    if dir.join("index.json").is_file() {
        return load_oci(store, dir);
    }
    bail!("neither an OCI image layout (index.json) nor a docker archive (manifest.json)")
}

fn load_docker(store: &ImageStore, dir: &Path) -> anyhow::Result<Vec<String>> {
    let text = read_inside(dir, "manifest.json")?;
    let entries: Vec<DockerEntry> =
        serde_json::from_slice(&text).context("manifest.json is not readable")?;
    let mut names = Vec::new();
    for entry in entries {
        let config = read_inside(dir, &entry.config)?;
        let layers = entry
            .layers
            .iter()
            .map(|l| inside(dir, l))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let tags = entry
            .repo_tags
            .unwrap_or_default()
            .iter()
            .map(|t| Reference::parse(t).map(|r| r.tagged()))
            .collect::<anyhow::Result<Vec<_>>>()?
            .into_iter()
            .flatten()
            .collect();
        names.extend(add(store, &config, &layers, tags, Vec::new())?);
    }
    Ok(names)
}

fn load_oci(store: &ImageStore, dir: &Path) -> anyhow::Result<Vec<String>> {
    let index: Index = serde_json::from_slice(&read_inside(dir, "index.json")?)
        .context("index.json is not readable")?;
    let mut names = Vec::new();
    for top in index.manifests {
        let tags = [
            "io.containerd.image.name",
            "org.opencontainers.image.ref.name",
        ]
        .iter()
        .find_map(|key| top.annotations.get(*key))
        // A reference name may be a tag alone, which names no repository.
        .filter(|name| name.contains(['/', ':']))
        .and_then(|name| Reference::parse(name).ok()?.tagged());
        let mut text = blob(dir, &top.digest)?;
        let mut blobs = vec![(top.digest.clone(), text.clone())];
        let mut manifest: Manifest =
            serde_json::from_slice(&text).context("a manifest is not readable")?;
        if !manifest.manifests.is_empty() {
            let Some(chosen) = manifest.manifests.iter().find(|d| {
                d.platform
                    .as_ref()
                    .is_some_and(|p| p.os == "linux" && p.architecture == go_arch())
            }) else {
                bail!("the archive has no image for linux/{}", go_arch());
            };
            let digest = chosen.digest.clone();
            text = blob(dir, &digest)?;
            manifest = serde_json::from_slice(&text).context("a manifest is not readable")?;
            blobs.push((digest, text));
        }
        let config = manifest
            .config
            .context("the archive holds something that is not an image")?;
        let config = blob(dir, &config.digest)?;
        let mut layers = Vec::new();
        for layer in &manifest.layers {
            let path = inside(
                dir,
                &format!("blobs/sha256/{}", check_digest(&layer.digest)?),
            )?;
            check_file(&path, &layer.digest, layer.size)?;
            layers.push(path);
        }
        names.extend(add(
            store,
            &config,
            &layers,
            tags.into_iter().collect(),
            blobs,
        )?);
    }
    Ok(names)
}

fn add(
    store: &ImageStore,
    config: &[u8],
    layers: &[PathBuf],
    tags: Vec<String>,
    blobs: Vec<(String, Vec<u8>)>,
) -> anyhow::Result<Vec<String>> {
    let image: ImageConfig =
        serde_json::from_slice(config).context("the image's config is not readable")?;
    ensure!(
        image.rootfs.diff_ids.len() == layers.len(),
        "the image is damaged: {} layers, but its config names {}",
        layers.len(),
        image.rootfs.diff_ids.len()
    );
    let chain = chain_ids(&image.rootfs.diff_ids)?;
    let mut size = config.len() as u64;
    for (at, layer) in layers.iter().enumerate() {
        size += layer
            .metadata()
            .with_context(|| format!("layer {}", layer.display()))?
            .len();
        ensure_layer(store, &chain[..=at], &image.rootfs.diff_ids[at], layer)
            .with_context(|| format!("layer {}", image.rootfs.diff_ids[at]))?;
    }
    let id = sha256(config);
    store.write_blob(&id, config)?;
    for (digest, text) in &blobs {
        store.write_blob(digest, text)?;
    }
    let record = store.record(ImageRecord {
        id: id.clone(),
        tags: tags.clone(),
        size,
        chain,
        blobs: blobs.into_iter().map(|(digest, _)| digest).collect(),
        ..ImageRecord::default()
    })?;
    Ok(if tags.is_empty() {
        vec![record.id]
    } else {
        tags
    })
}

/// A path within the archive's directory, links and all.
fn inside(dir: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let path = dir
        .join(name)
        .canonicalize()
        .with_context(|| format!("the archive lacks {name}"))?;
    ensure!(
        path.starts_with(dir.canonicalize()?),
        "the archive names {name}, which is outside of it"
    );
    Ok(path)
}

fn read_inside(dir: &Path, name: &str) -> anyhow::Result<Vec<u8>> {
    let path = inside(dir, name)?;
    let mut text = Vec::new();
    File::open(&path)?
        .take(16 << 20)
        .read_to_end(&mut text)
        .with_context(|| format!("cannot read {name}"))?;
    Ok(text)
}

fn blob(dir: &Path, digest: &str) -> anyhow::Result<Vec<u8>> {
    let text = read_inside(dir, &format!("blobs/sha256/{}", check_digest(digest)?))?;
    check_content(digest, &text)?;
    Ok(text)
}

fn check_file(path: &Path, digest: &str, size: u64) -> anyhow::Result<()> {
    use sha2::{Digest, Sha256};
    let mut file = File::open(path)?;
    ensure!(
        size == 0 || file.metadata()?.len() == size,
        "layer {digest} is corrupt: not {size} bytes long"
    );
    let mut hash = Sha256::new();
    std::io::copy(&mut file, &mut hash)?;
    let found = format!("sha256:{}", hex::encode(hash.finalize()));
    ensure!(
        found == digest,
        "layer is corrupt: expected digest {digest}, found {found}"
    );
    Ok(())
}
