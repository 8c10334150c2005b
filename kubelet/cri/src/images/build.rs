//! Builds a one-layer image out of given files.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use sha2::{Digest, Sha256};

use super::reference::Reference;
use super::store::{ExecutionConfig, ImageConfig, ImageRecord, ImageStore, RootFs, sha256};
use super::unpack::ensure_layer;

/// Where a file's content comes from.
#[derive(Clone, Debug)]
pub enum FileContent {
    /// A file on this machine.
    File(PathBuf),
    /// These bytes.
    Bytes(Vec<u8>),
    /// A directory instead of a file.
    Directory,
    /// A symbolic link to this path.
    Link(String),
}

/// One file of a layer.
#[derive(Clone, Debug)]
pub struct LayerFile {
    /// Path in the image, with or without a leading slash.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// Content.
    pub content: FileContent,
}

/// Makes an image with one layer of `files`, owned by root, and names it.
///
/// The store in `root` may be in use by a running server, which sees the image
/// at once. The same input gives the same image id. Returns the id.
pub fn import_image(
    root: &Path,
    name: &str,
    config: ExecutionConfig,
    files: &[LayerFile],
) -> anyhow::Result<String> {
    let reference = Reference::parse(name)?;
    let store = ImageStore::open(root)?;
    let _lock = store.lock_shared()?;
    let scratch = store.scratch()?;
    let path = scratch.path().join("layer.tar");
    write_layer(&path, files)?;
    let mut hash = Sha256::new();
    std::io::copy(&mut File::open(&path)?, &mut hash)?;
    let diff_id = format!("sha256:{}", hex::encode(hash.finalize()));
    let image = ImageConfig {
        config,
        rootfs: RootFs {
            kind: "layers".to_owned(),
            diff_ids: vec![diff_id.clone()],
        },
        architecture: go_arch().to_owned(),
        os: "linux".to_owned(),
    };
    let image = serde_json::to_vec(&image)?;
    let id = sha256(&image);
    let chain = vec![diff_id["sha256:".len()..].to_owned()];
    ensure_layer(&store, &chain, &diff_id, &path)?;
    store.write_blob(&id, &image)?;
    store.record(ImageRecord {
        id: id.clone(),
        tags: reference.tagged().into_iter().collect(),
        size: path.metadata()?.len() + image.len() as u64,
        chain,
        ..ImageRecord::default()
    })?;
    Ok(id)
}

fn write_layer(path: &Path, files: &[LayerFile]) -> anyhow::Result<()> {
    let mut builder = tar::Builder::new(std::io::BufWriter::new(File::create(path)?));
    for file in files {
        let name = file.path.trim_start_matches('/');
        let mut header = tar::Header::new_gnu();
        header.set_mode(file.mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(0);
        match &file.content {
            FileContent::Bytes(bytes) => {
                header.set_size(bytes.len() as u64);
                builder.append_data(&mut header, name, bytes.as_slice())
            }
            FileContent::File(from) => {
                let source =
                    File::open(from).with_context(|| format!("cannot open {}", from.display()))?;
                header.set_size(source.metadata()?.len());
                builder.append_data(&mut header, name, source)
            }
            FileContent::Directory => {
                header.set_entry_type(tar::EntryType::Directory);
                builder.append_data(&mut header, name, std::io::empty())
            }
            FileContent::Link(to) => {
                header.set_entry_type(tar::EntryType::Symlink);
                builder.append_link(&mut header, name, to)
            }
        }
        .with_context(|| format!("cannot pack {}", file.path))?;
    }
    builder.into_inner()?.flush()?;
    Ok(())
}

/// This machine's architecture in the names that images use.
pub fn go_arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64le",
        "x86" => "386",
        other => other,
    }
}
