//! The image store's records, blobs and garbage collection.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::reference::{Reference, check_digest};

/// One image on disk.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ImageRecord {
    /// The digest of the image's config: its id, `sha256:<hex>`.
    pub id: String,
    /// Full names with tags.
    pub tags: Vec<String>,
    /// Full names with manifest digests.
    pub digests: Vec<String>,
    /// Bytes of config and layers as they were transferred.
    pub size: u64,
    /// Chain ids of the unpacked layers, lowest first (hex).
    pub chain: Vec<String>,
    /// Digests of further blobs that belong to the image (its manifest).
    #[serde(default)]
    pub blobs: Vec<String>,
}

/// The part of an OCI image config that a runtime needs.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ImageConfig {
    /// What to run and how.
    #[serde(default)]
    pub config: ExecutionConfig,
    /// The layers' uncompressed digests.
    pub rootfs: RootFs,
    /// CPU architecture, in Go's names.
    #[serde(default)]
    pub architecture: String,
    /// Operating system, in Go's names.
    #[serde(default)]
    pub os: String,
}

/// `config` of an OCI image config; field names as in the specification.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ExecutionConfig {
    /// `uid`, `user`, `uid:gid`, `user:group`.
    #[serde(deserialize_with = "or_default")]
    pub user: String,
    /// `NAME=value` each.
    #[serde(deserialize_with = "or_default")]
    pub env: Vec<String>,
    /// First words of the command line.
    #[serde(deserialize_with = "or_default")]
    pub entrypoint: Vec<String>,
    /// The words after the entry point.
    #[serde(deserialize_with = "or_default")]
    pub cmd: Vec<String>,
    /// Directory to start in.
    #[serde(deserialize_with = "or_default")]
    pub working_dir: String,
    /// Signal that asks the container to end.
    #[serde(
        deserialize_with = "or_default",
        skip_serializing_if = "String::is_empty"
    )]
    pub stop_signal: String,
    /// Labels.
    #[serde(deserialize_with = "or_default")]
    pub labels: BTreeMap<String, String>,
}

/// `rootfs` of an OCI image config.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct RootFs {
    /// Always `layers`.
    #[serde(rename = "type", default)]
    pub kind: String,
    /// Digests of the uncompressed layers, lowest first.
    #[serde(default)]
    pub diff_ids: Vec<String>,
}

/// Image builders write `null` for empty fields.
fn or_default<'de, D: serde::Deserializer<'de>, T: Deserialize<'de> + Default>(
    from: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// The images of one node.
#[derive(Clone, Debug)]
pub struct ImageStore {
    root: PathBuf,
}

/// Keeps garbage collection away, or (exclusive) keeps everyone away.
pub struct StoreLock {
    _file: File,
}

impl ImageStore {
    /// Opens a store, making its directories.
    pub fn open(root: &Path) -> anyhow::Result<Self> {
        for dir in ["images", "blobs/sha256", "snapshots", "tmp"] {
            std::fs::create_dir_all(root.join(dir))
                .with_context(|| format!("cannot make the image store in {}", root.display()))?;
        }
        Ok(Self {
            root: root.to_owned(),
        })
    }

    /// The store's directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Held while content is added that no record names yet.
    pub fn lock_shared(&self) -> anyhow::Result<StoreLock> {
        let file = self.lock_file()?;
        file.lock_shared()?;
        Ok(StoreLock { _file: file })
    }

    fn lock_exclusive(&self) -> anyhow::Result<StoreLock> {
        let file = self.lock_file()?;
        file.lock()?;
        Ok(StoreLock { _file: file })
    }

    fn lock_file(&self) -> anyhow::Result<File> {
        let path = self.root.join("lock");
        File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))
    }

    /// All images, ordered by id.
    pub fn list(&self) -> anyhow::Result<Vec<ImageRecord>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(self.root.join("images"))? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "json") {
                let text = match std::fs::read(&path) {
                    Ok(text) => text,
                    // Removed since the directory was read.
                    Err(err) if err.kind() == std::io::ErrorKind::NotFound => continue,
                    Err(err) => return Err(err).context(format!("cannot read {}", path.display())),
                };
                let record: ImageRecord = serde_json::from_slice(&text)
                    .with_context(|| format!("{} is damaged", path.display()))?;
                found.push(record);
            }
        }
        found.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(found)
    }

    /// The image with this name, digest, id, or unambiguous start of an id.
    pub fn find(&self, name: &str) -> anyhow::Result<Option<ImageRecord>> {
        let images = self.list()?;
        let hex = name.strip_prefix("sha256:").unwrap_or(name);
        if let Some(image) = images
            .iter()
            .find(|i| i.id.strip_prefix("sha256:") == Some(hex))
        {
            return Ok(Some(image.clone()));
        }
        if let Ok(reference) = Reference::parse(name) {
            // With a digest the tag is only a comment.
            let wanted = match &reference.digest {
                Some(digest) => format!("{}@{digest}", reference.name()),
                None => reference.tagged().unwrap_or_default(),
            };
            if let Some(image) = images
                .iter()
                .find(|i| i.tags.contains(&wanted) || i.digests.contains(&wanted))
            {
                return Ok(Some(image.clone()));
            }
        }
        if hex.len() >= 6 && hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            let start = format!("sha256:{hex}");
            let mut matches = images.iter().filter(|i| i.id.starts_with(&start));
            if let (Some(image), None) = (matches.next(), matches.next()) {
                return Ok(Some(image.clone()));
            }
        }
        Ok(None)
    }

    /// The config of an image.
    pub fn config(&self, image: &ImageRecord) -> anyhow::Result<ImageConfig> {
        let text = self.read_blob(&image.id)?;
        serde_json::from_slice(&text)
            .with_context(|| format!("the config of image {} is not readable", image.id))
    }

    /// Reads a blob and checks it against its digest.
    pub fn read_blob(&self, digest: &str) -> anyhow::Result<Vec<u8>> {
        let path = self.blob_path(digest)?;
        let text =
            std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        check_content(digest, &text)?;
        Ok(text)
    }

    /// Whether a blob is there.
    pub fn has_blob(&self, digest: &str) -> bool {
        self.blob_path(digest).is_ok_and(|p| p.exists())
    }

    /// Writes a blob whole or not at all, after checking its digest.
    pub fn write_blob(&self, digest: &str, content: &[u8]) -> anyhow::Result<()> {
        check_content(digest, content)?;
        let path = self.blob_path(digest)?;
        if !path.exists() {
            write_atomic(&path, content)?;
        }
        Ok(())
    }

    fn blob_path(&self, digest: &str) -> anyhow::Result<PathBuf> {
        Ok(self.root.join("blobs/sha256").join(check_digest(digest)?))
    }

    /// A fresh directory for work in progress; removed when dropped.
    pub fn scratch(&self) -> anyhow::Result<Scratch> {
        let path = self.root.join("tmp").join(random_hex(8)?);
        std::fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Scratch { path })
    }

    /// The directory of an unpacked layer.
    pub fn layer_dir(&self, chain: &str) -> PathBuf {
        self.root.join("snapshots").join(chain).join("fs")
    }

    /// Adds an image, or names to one that is there; a tag moves from the image
    /// that had it. The caller holds the shared lock.
    pub fn record(&self, mut image: ImageRecord) -> anyhow::Result<ImageRecord> {
        for chain in &image.chain {
            ensure!(
                self.layer_dir(chain).is_dir(),
                "layer {chain} of image {} is not unpacked",
                image.id
            );
        }
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.root.join("records.lock"))?;
        file.lock()?;
        for mut other in self.list()? {
            if other.id == image.id {
                merge(&mut image.tags, &other.tags);
                merge(&mut image.digests, &other.digests);
                merge(&mut image.blobs, &other.blobs);
            } else if other.tags.iter().any(|t| image.tags.contains(t)) {
                other.tags.retain(|t| !image.tags.contains(t));
                self.write_record(&other)?;
            }
        }
        self.write_record(&image)?;
        Ok(image)
    }

    fn write_record(&self, image: &ImageRecord) -> anyhow::Result<()> {
        let path = self
            .root
            .join("images")
            .join(format!("{}.json", check_digest(&image.id)?));
        write_atomic(&path, &serde_json::to_vec(image)?)
    }

    /// Removes a name, or (given an id, or its last name) the image.
    pub fn remove(&self, name: &str, in_use: &BTreeSet<String>) -> anyhow::Result<()> {
        let Some(image) = self.find(name)? else {
            return Ok(());
        };
        {
            let _lock = self.lock_exclusive()?;
            std::fs::remove_file(
                self.root
                    .join("images")
                    .join(format!("{}.json", check_digest(&image.id)?)),
            )
            .or_else(|err| match err.kind() {
                std::io::ErrorKind::NotFound => Ok(()),
                _ => Err(err),
            })?;
        }
        self.collect(in_use)
    }

    /// Removes layers and blobs that neither an image nor `in_use` (chain ids of
    /// containers) names, and what interrupted work left.
    pub fn collect(&self, in_use: &BTreeSet<String>) -> anyhow::Result<()> {
        let _lock = self.lock_exclusive()?;
        let images = self.list()?;
        let chains: BTreeSet<&str> = images
            .iter()
            .flat_map(|i| i.chain.iter())
            .chain(in_use)
            .map(String::as_str)
            .collect();
        let blobs: BTreeSet<&str> = images
            .iter()
            .flat_map(|i| i.blobs.iter().chain(std::iter::once(&i.id)))
            .filter_map(|d| d.strip_prefix("sha256:"))
            .collect();
        sweep(&self.root.join("snapshots"), &chains)?;
        sweep(&self.root.join("blobs/sha256"), &blobs)?;
        sweep(&self.root.join("tmp"), &BTreeSet::new())
    }
}

fn merge(into: &mut Vec<String>, from: &[String]) {
    for item in from {
        if !into.contains(item) {
            into.push(item.clone());
        }
    }
}

fn sweep(dir: &Path, keep: &BTreeSet<&str>) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(|n| keep.contains(n)) {
            continue;
        }
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            // An interrupted unpack may have left its mount.
            let _ = nix::mount::umount2(&path.join("merged"), nix::mount::MntFlags::MNT_DETACH);
            std::fs::remove_dir_all(&path)
        } else {
            std::fs::remove_file(&path)
        }
        .with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}

/// A directory that goes away with its owner.
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// Fails unless `content` has the digest.
pub fn check_content(digest: &str, content: &[u8]) -> anyhow::Result<()> {
    check_digest(digest)?;
    let found = sha256(content);
    if found != digest {
        bail!("content is corrupt: expected digest {digest}, found {found}");
    }
    Ok(())
}

/// `sha256:<hex>` of some bytes.
pub fn sha256(content: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(content)))
}

/// Chain ids (hex, lowest first) of a list of uncompressed layer digests, as
/// the OCI image specification defines them.
pub fn chain_ids(diff_ids: &[String]) -> anyhow::Result<Vec<String>> {
    let mut chain: Vec<String> = Vec::with_capacity(diff_ids.len());
    for diff in diff_ids {
        let id = match chain.last() {
            None => check_digest(diff)?.to_owned(),
            Some(parent) => {
                check_digest(diff)?;
                hex::encode(Sha256::digest(format!("sha256:{parent} {diff}")))
            }
        };
        chain.push(id);
    }
    Ok(chain)
}

/// Writes a file so that after a power failure there is the old content or the new.
pub fn write_atomic(path: &Path, content: &[u8]) -> anyhow::Result<()> {
    write_by_rename(path, content, true)
}

/// Writes a file so that readers, and a server that is killed, see the old
/// content or the new; without waiting for the disk.
pub fn replace_file(path: &Path, content: &[u8]) -> anyhow::Result<()> {
    write_by_rename(path, content, false)
}

fn write_by_rename(path: &Path, content: &[u8], sync: bool) -> anyhow::Result<()> {
    let temporary = path.with_extension(format!("{}.new", random_hex(4)?));
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&temporary)?;
        file.write_all(content)?;
        if sync {
            file.sync_data()?;
        }
        std::fs::rename(&temporary, path)
    };
    write().map_err(|err| {
        let _ = std::fs::remove_file(&temporary);
        anyhow::anyhow!("cannot write {}: {err}", path.display())
    })
}

/// Random lowercase hex of `bytes` bytes, from the kernel.
pub fn random_hex(bytes: usize) -> anyhow::Result<String> {
    use std::io::Read;
    let mut raw = vec![0; bytes];
    File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut raw))
        .context("cannot read /dev/urandom")?;
    Ok(hex::encode(raw))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_mismatch_is_refused_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = ImageStore::open(dir.path()).unwrap();
        let digest = sha256(b"right");
        let err = store.write_blob(&digest, b"wrong").unwrap_err().to_string();
        assert!(err.contains("corrupt") && err.contains(&digest), "{err}");
        assert!(!store.has_blob(&digest));
        store.write_blob(&digest, b"right").unwrap();
        assert_eq!(store.read_blob(&digest).unwrap(), b"right");
        // A blob that goes bad on disk is noticed, too.
        std::fs::write(store.blob_path(&digest).unwrap(), b"rotten").unwrap();
        assert!(store.read_blob(&digest).is_err());
    }

    #[test]
    fn chain_ids_follow_the_image_specification() {
        let a = sha256(b"a");
        let b = sha256(b"b");
        let ids = chain_ids(&[a.clone(), b.clone()]).unwrap();
        assert_eq!(format!("sha256:{}", ids[0]), a);
        assert_eq!(
            format!("sha256:{}", ids[1]),
            sha256(format!("{a} {b}").as_bytes())
        );
    }

    #[test]
    fn a_tag_moves_and_removal_frees_only_what_nobody_uses() {
        let dir = tempfile::tempdir().unwrap();
        let store = ImageStore::open(dir.path()).unwrap();
        let image = |config: &[u8], chain: &[&str], tag: &str| {
            let id = sha256(config);
            store.write_blob(&id, config).unwrap();
            for c in chain {
                std::fs::create_dir_all(store.layer_dir(c)).unwrap();
            }
            store
                .record(ImageRecord {
                    id,
                    tags: vec![tag.to_owned()],
                    chain: chain.iter().map(|c| (*c).to_owned()).collect(),
                    ..ImageRecord::default()
                })
                .unwrap()
        };
        let old = image(b"1", &["base", "one"], "docker.io/library/x:latest");
        let new = image(b"2", &["base", "two"], "docker.io/library/x:latest");
        assert_eq!(store.find("x").unwrap().unwrap().id, new.id);
        assert!(store.find(&old.id).unwrap().unwrap().tags.is_empty());
        assert_eq!(store.find(&old.id[7..19]).unwrap().unwrap().id, old.id);

        let used = BTreeSet::from(["one".to_owned()]);
        store.remove(&old.id, &used).unwrap();
        assert!(store.layer_dir("one").exists(), "a container uses it");
        store.collect(&BTreeSet::new()).unwrap();
        assert!(!store.layer_dir("one").exists());
        assert!(
            store.layer_dir("base").exists(),
            "shared with the new image"
        );
        assert!(!store.has_blob(&old.id) && store.has_blob(&new.id));
        store.remove("x", &BTreeSet::new()).unwrap();
        assert!(!store.layer_dir("base").exists());
        store.remove("x", &BTreeSet::new()).unwrap();
    }
}
