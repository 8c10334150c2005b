//! Volumes of a pod on this node: emptyDir, hostPath, and files made from the API, swapped in whole.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::{ConfigMap, DownwardAPIVolumeFile, KeyToPath, Secret, Volume};
use kube::Api;

use crate::env::{Sources, pod_field, resource_field};
use crate::tokens::Tokens;

/// Files by relative path, with their mode.
type Files = BTreeMap<String, (Vec<u8>, u32)>;

/// Host paths of a pod's volumes by name.
pub(crate) type Mounts = BTreeMap<String, PathBuf>;

/// Makes every volume ready; what changed in the API since is written anew. Only the `first` time owner and mode
/// of what pods write to are set, since these are the pod's own to change.
pub(crate) async fn prepare(
    sources: &Sources<'_>,
    pod_dir: &Path,
    tokens: &mut Tokens,
    first: bool,
) -> Result<Mounts> {
    let mut mounts = Mounts::new();
    for volume in sources
        .pod
        .spec
        .iter()
        .flat_map(|spec| spec.volumes.iter().flatten())
    {
        let path = one(sources, pod_dir, volume, tokens, first)
            .await
            .with_context(|| format!("MountVolume.SetUp failed for volume {:?}", volume.name))?;
        mounts.insert(volume.name.clone(), path);
    }
    Ok(mounts)
}

async fn one(
    sources: &Sources<'_>,
    pod_dir: &Path,
    volume: &Volume,
    tokens: &mut Tokens,
    first: bool,
) -> Result<PathBuf> {
    let group = sources
        .pod
        .spec
        .as_ref()
        .and_then(|spec| spec.security_context.as_ref()?.fs_group);
    let group = group
        .map(|group| u32::try_from(group).with_context(|| format!("fsGroup {group} is no group")))
        .transpose()?;
    let dir = |kind: &str| pod_dir.join("volumes").join(kind).join(&volume.name);
    if let Some(empty) = &volume.empty_dir {
        if empty
            .medium
            .as_deref()
            .is_some_and(|medium| medium == "Memory")
        {
            let path = dir("kubernetes.io~empty-dir");
            let limit = empty.size_limit.as_ref().map(|q| q.0.as_str());
            memory_dir(&path, limit, first)?;
            give(&path, group.filter(|_| first), 0o660)?;
            return Ok(path);
        }
        let path = dir("kubernetes.io~empty-dir");
        if first || !path.exists() {
            make_dir(&path, 0o777)?;
            give(&path, group, 0o660)?;
        }
        return Ok(path);
    }
    if let Some(host) = &volume.host_path {
        return host_path(
            Path::new(&host.path),
            host.type_.as_deref().unwrap_or_default(),
        );
    }
    let mut files = Files::new();
    let kind = if let Some(source) = &volume.config_map {
        From {
            name: &source.name,
            items: source.items.as_deref(),
            optional: source.optional,
            mode: source.default_mode,
        }
        .config_map(sources, &mut files)
        .await?;
        "kubernetes.io~configmap"
    } else if let Some(source) = &volume.secret {
        From {
            name: source.secret_name.as_deref().unwrap_or_default(),
            items: source.items.as_deref(),
            optional: source.optional,
            mode: source.default_mode,
        }
        .secret(sources, &mut files)
        .await?;
        "kubernetes.io~secret"
    } else if let Some(source) = &volume.downward_api {
        downward(
            sources,
            source.items.as_deref().unwrap_or_default(),
            source.default_mode,
            &mut files,
        )?;
        "kubernetes.io~downward-api"
    } else if let Some(projected) = &volume.projected {
        for source in projected.sources.iter().flatten() {
            let mode = projected.default_mode;
            if let Some(map) = &source.config_map {
                From {
                    name: &map.name,
                    items: map.items.as_deref(),
                    optional: map.optional,
                    mode,
                }
                .config_map(sources, &mut files)
                .await?;
            }
            if let Some(one) = &source.secret {
                From {
                    name: &one.name,
                    items: one.items.as_deref(),
                    optional: one.optional,
                    mode,
                }
                .secret(sources, &mut files)
                .await?;
            }
            if let Some(one) = &source.downward_api {
                downward(
                    sources,
                    one.items.as_deref().unwrap_or_default(),
                    mode,
                    &mut files,
                )?;
            }
            if let Some(one) = &source.service_account_token {
                let audience = one.audience.as_deref();
                let value = tokens
                    .get(sources, audience, one.expiration_seconds)
                    .await?;
                files.insert(
                    one.path.clone(),
                    (value.into_bytes(), mode.unwrap_or(0o644) as u32),
                );
            }
        }
        "kubernetes.io~projected"
    } else {
        bail!("its kind is not supported by this kubelet");
    };
    let path = dir(kind);
    make_dir(&path, 0o755)?;
    give(&path, group, 0o440)?;
    write_atomically(&path, &files, group)?;
    Ok(path)
}

fn make_dir(path: &Path, mode: u32) -> Result<()> {
    std::fs::create_dir_all(path).with_context(|| format!("could not make {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .with_context(|| format!("could not set the mode of {}", path.display()))
}

/// An emptyDir in memory: a tmpfs, mounted once.
fn memory_dir(path: &Path, limit: Option<&str>, first: bool) -> Result<()> {
    if first || !path.exists() {
        make_dir(path, 0o777)?;
    }
    let mounts =
        std::fs::read_to_string("/proc/self/mounts").context("could not read the mount table")?;
    let shown = path.to_string_lossy();
    if mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .any(|point| unescape(point) == shown)
    {
        return Ok(());
    }
    let size = limit
        .and_then(|text| xebec_schema::quantity::Quantity::parse(text).ok())
        .map(|q| format!("size={},", q.value()))
        .unwrap_or_default();
    let options = format!("{size}mode=0777");
    nix::mount::mount(
        Some("tmpfs"),
        path,
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        Some(options.as_str()),
    )
    .context("could not mount a tmpfs")
}

/// Gives a file or folder to the pod's `fsGroup`: with these rights, and for folders so that what is made in them
/// belongs to the group too.
fn give(path: &Path, group: Option<u32>, rights: u32) -> Result<()> {
    let Some(group) = group else {
        return Ok(());
    };
    let metadata = std::fs::symlink_metadata(path)
        .with_context(|| format!("could not look at {}", path.display()))?;
    let more = if metadata.is_dir() {
        rights | 0o2110
    } else {
        rights
    };
    let mode = metadata.permissions().mode() & 0o7777 | more;
    // Changing the owner takes set-id bits away, so the mode comes last.
    std::os::unix::fs::lchown(path, None, Some(group))
        .and_then(|()| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)))
        .with_context(|| format!("could not give {} to group {group}", path.display()))
}

/// core/v1 HostPathType.
fn host_path(path: &Path, kind: &str) -> Result<PathBuf> {
    use std::os::unix::fs::FileTypeExt;
    let found = std::fs::metadata(path)
        .map(|metadata| metadata.file_type())
        .ok();
    let must = |holds: bool, what: &str| {
        if holds {
            Ok(())
        } else {
            bail!(
                "hostPath type check failed: {} is not a {what}",
                path.display()
            )
        }
    };
    match kind {
        "" => {}
        "DirectoryOrCreate" if found.is_none() => make_dir(path, 0o755)?,
        "FileOrCreate" if found.is_none() => {
            std::fs::File::create(path)
                .with_context(|| format!("could not make {}", path.display()))?;
        }
        "Directory" | "DirectoryOrCreate" => must(found.is_some_and(|t| t.is_dir()), "directory")?,
        "File" | "FileOrCreate" => must(found.is_some_and(|t| t.is_file()), "file")?,
        "Socket" => must(found.is_some_and(|t| t.is_socket()), "socket file")?,
        "CharDevice" => must(
            found.is_some_and(|t| t.is_char_device()),
            "character device",
        )?,
        "BlockDevice" => must(found.is_some_and(|t| t.is_block_device()), "block device")?,
        other => bail!("hostPath type {other:?} is not known"),
    }
    Ok(path.to_path_buf())
}

/// Picks keys of a map by `items`, or all of them.
fn pick(
    what: &str,
    data: &BTreeMap<String, Vec<u8>>,
    items: Option<&[KeyToPath]>,
    optional: bool,
    mode: Option<i32>,
    files: &mut Files,
) -> Result<()> {
    let default = mode.unwrap_or(0o644) as u32;
    let Some(items) = items.filter(|items| !items.is_empty()) else {
        files.extend(
            data.iter()
                .map(|(key, value)| (key.clone(), (value.clone(), default))),
        );
        return Ok(());
    };
    for item in items {
        match data.get(&item.key) {
            Some(value) => {
                files.insert(
                    item.path.clone(),
                    (value.clone(), item.mode.map_or(default, |mode| mode as u32)),
                );
            }
            None if optional => {}
            None => bail!("references non-existent key {} of {what}", item.key),
        }
    }
    Ok(())
}

/// What a volume takes from a ConfigMap or a Secret.
struct From<'a> {
    name: &'a str,
    items: Option<&'a [KeyToPath]>,
    optional: Option<bool>,
    mode: Option<i32>,
}

impl From<'_> {
    /// The object; none if it is not there and need not be.
    async fn object<K>(&self, sources: &Sources<'_>, kind: &str) -> Result<Option<K>>
    where
        K: kube::Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>
            + Clone
            + std::fmt::Debug
            + serde::de::DeserializeOwned,
    {
        let namespace = sources.pod.metadata.namespace.as_deref();
        let api = Api::<K>::namespaced(sources.client.clone(), namespace.unwrap_or_default());
        let found = api
            .get_opt(self.name)
            .await
            .with_context(|| format!("could not read {kind} {:?}", self.name))?;
        if found.is_none() && self.optional != Some(true) {
            bail!("{kind} {:?} not found", self.name);
        }
        Ok(found)
    }

    /// Its keys as files.
    fn pick(&self, kind: &str, data: &BTreeMap<String, Vec<u8>>, files: &mut Files) -> Result<()> {
        pick(
            &format!("{kind} {:?}", self.name),
            data,
            self.items,
            self.optional == Some(true),
            self.mode,
            files,
        )
    }

    async fn config_map(&self, sources: &Sources<'_>, files: &mut Files) -> Result<()> {
        let Some(map) = self.object::<ConfigMap>(sources, "configmap").await? else {
            return Ok(());
        };
        let text = map.data.unwrap_or_default().into_iter();
        let binary = map.binary_data.unwrap_or_default().into_iter();
        let data = text
            .map(|(key, value)| (key, value.into_bytes()))
            .chain(binary.map(|(key, value)| (key, value.0)))
            .collect();
        self.pick("configmap", &data, files)
    }

    async fn secret(&self, sources: &Sources<'_>, files: &mut Files) -> Result<()> {
        let Some(secret) = self.object::<Secret>(sources, "secret").await? else {
            return Ok(());
        };
        let data = secret.data.unwrap_or_default().into_iter();
        let data = data.map(|(key, value)| (key, value.0)).collect();
        self.pick("secret", &data, files)
    }
}

fn downward(
    sources: &Sources<'_>,
    items: &[DownwardAPIVolumeFile],
    mode: Option<i32>,
    files: &mut Files,
) -> Result<()> {
    for item in items {
        let value = if let Some(field) = &item.field_ref {
            pod_field(sources, &field.field_path)?
        } else if let Some(resource) = &item.resource_field_ref {
            let Some(first) = sources
                .pod
                .spec
                .as_ref()
                .and_then(|spec| spec.containers.first())
            else {
                continue;
            };
            resource_field(
                sources.pod,
                first,
                resource.container_name.as_deref(),
                &resource.resource,
                resource.divisor.as_ref().map(|d| d.0.as_str()),
            )?
        } else {
            continue;
        };
        files.insert(
            item.path.clone(),
            (
                value.into_bytes(),
                item.mode.or(mode).unwrap_or(0o644) as u32,
            ),
        );
    }
    Ok(())
}

/// Writes files into a fresh folder and swaps the `..data` link to it, so that a reader sees all old or all new.
fn write_atomically(dir: &Path, files: &Files, group: Option<u32>) -> Result<()> {
    let data = dir.join("..data");
    // The API server refuses `..` and absolute paths in items; keys can't hold a slash.
    let is_plain = |path: &str| {
        let mut parts = Path::new(path).components();
        parts.all(|part| matches!(part, std::path::Component::Normal(_)))
    };
    if let Some(path) = files.keys().find(|path| !is_plain(path)) {
        bail!("{path:?} leaves the volume");
    }
    let tops: std::collections::BTreeSet<&str> = files
        .keys()
        .map(|path| path.split('/').next().unwrap_or(path))
        .collect();
    let unchanged = files.iter().all(|(path, (content, _))| {
        std::fs::read(data.join(path)).is_ok_and(|old| old == *content)
    });
    if unchanged && data.exists() && count_files(&data) == files.len() {
        return Ok(());
    }
    let stamp = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_nanos());
    let fresh_name = format!("..{stamp}");
    let fresh = dir.join(&fresh_name);
    make_dir(&fresh, 0o755)?;
    give(&fresh, group, 0o440)?;
    for (path, (content, mode)) in files {
        let target = fresh.join(path);
        if let Some(parent) = target.parent() {
            std::fs::create_dir_all(parent)
                .with_context(|| format!("could not make {}", parent.display()))?;
            for dir in parent.ancestors().take_while(|dir| *dir != fresh) {
                give(dir, group, 0o440)?;
            }
        }
        std::fs::write(&target, content)
            .with_context(|| format!("could not write {}", target.display()))?;
        std::fs::set_permissions(&target, std::fs::Permissions::from_mode(*mode))
            .with_context(|| format!("could not set the mode of {}", target.display()))?;
        give(&target, group, 0o440)?;
    }
    let temporary = dir.join("..data_tmp");
    let _ = std::fs::remove_file(&temporary);
    std::os::unix::fs::symlink(&fresh_name, &temporary)
        .and_then(|()| std::fs::rename(&temporary, &data))
        .with_context(|| format!("could not swap {}", data.display()))?;
    for entry in std::fs::read_dir(dir)
        .with_context(|| format!("could not list {}", dir.display()))?
        .flatten()
    {
        let name = entry.file_name();
        let shown = name.to_string_lossy();
        if shown == "..data" || shown == fresh_name.as_str() || tops.contains(shown.as_ref()) {
            continue;
        }
        // Folders from before, also of a try that did not come to its end, and links to files that are no more.
        let removed = if shown.starts_with("..") {
            std::fs::remove_dir_all(entry.path())
        } else {
            std::fs::remove_file(entry.path())
        };
        removed.with_context(|| format!("could not remove {}", entry.path().display()))?;
    }
    for top in tops {
        let link = dir.join(top);
        if std::fs::symlink_metadata(&link).is_err() {
            std::os::unix::fs::symlink(Path::new("..data").join(top), &link)
                .with_context(|| format!("could not link {}", link.display()))?;
        }
    }
    Ok(())
}

/// How many files a folder holds, with those in its folders.
fn count_files(dir: &Path) -> usize {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => count_files(&entry.path()),
            _ => 1,
        })
        .sum()
}

/// A path of the mount table, where blanks and the like are written as `\040`.
fn unescape(shown: &str) -> String {
    let (bytes, mut out, mut at) = (shown.as_bytes(), Vec::new(), 0);
    while let Some(byte) = bytes.get(at) {
        let octal = bytes
            .get(at + 1..at + 4)
            .filter(|_| *byte == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        out.push(octal.unwrap_or(*byte));
        at += if octal.is_some() { 4 } else { 1 };
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Removes a pod's folder, with what is mounted in it.
pub(crate) fn remove(pod_dir: &Path) -> Result<()> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let prefix = format!("{}/", pod_dir.display());
    for point in mounts
        .lines()
        .rev()
        .filter_map(|line| line.split(' ').nth(1))
        .map(unescape)
        .filter(|point| point.starts_with(&prefix))
    {
        nix::mount::umount2(point.as_str(), nix::mount::MntFlags::MNT_DETACH)
            .with_context(|| format!("could not unmount {point}"))?;
    }
    match std::fs::remove_dir_all(pod_dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("could not remove {}", pod_dir.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_swapped_whole_and_old_ones_go() {
        let dir = tempfile::tempdir().unwrap();
        let files = |pairs: &[(&str, &str)]| -> Files {
            pairs
                .iter()
                .map(|(p, c)| ((*p).to_owned(), (c.as_bytes().to_vec(), 0o640)))
                .collect()
        };
        write_atomically(dir.path(), &files(&[("a", "1"), ("sub/b", "2")]), None).unwrap();
        assert_eq!(
            std::fs::read_to_string(dir.path().join("sub/b")).unwrap(),
            "2"
        );
        assert_eq!(
            std::fs::metadata(dir.path().join("a"))
                .unwrap()
                .permissions()
                .mode()
                & 0o777,
            0o640
        );
        let before = std::fs::read_link(dir.path().join("..data")).unwrap();
        write_atomically(dir.path(), &files(&[("a", "1"), ("sub/b", "2")]), None).unwrap();
        assert_eq!(
            std::fs::read_link(dir.path().join("..data")).unwrap(),
            before,
            "nothing changed, nothing is swapped"
        );
        // One file fewer in a folder that stays, and what a killed kubelet left.
        std::fs::create_dir(dir.path().join("..1")).unwrap();
        let two = [("a", "1"), ("sub/b", "2"), ("sub/c", "3")];
        write_atomically(dir.path(), &files(&two), None).unwrap();
        assert!(dir.path().join("sub/c").exists() && !dir.path().join("..1").exists());
        write_atomically(dir.path(), &files(&two[..2]), None).unwrap();
        assert!(dir.path().join("sub/b").exists() && !dir.path().join("sub/c").exists());
        write_atomically(dir.path(), &files(&[("a", "3")]), None).unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("a")).unwrap(), "3");
        assert!(!dir.path().join("sub").exists() && !dir.path().join(before).exists());
        assert!(write_atomically(dir.path(), &files(&[("../x", "3")]), None).is_err());
    }

    #[test]
    fn files_belong_to_the_pods_group() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        // Root may give to any group, others only to their own.
        let group = if nix::unistd::geteuid().is_root() {
            4242
        } else {
            nix::unistd::getegid().as_raw()
        };
        let files = Files::from([("sub/a".to_owned(), (b"1".to_vec(), 0o400))]);
        write_atomically(dir.path(), &files, Some(group)).unwrap();
        let seen = |path: &str| {
            let metadata = std::fs::metadata(dir.path().join(path)).unwrap();
            (metadata.gid(), metadata.mode() & 0o7777)
        };
        assert_eq!(seen("sub/a"), (group, 0o440));
        assert_eq!(seen("sub"), (group, 0o2755));
        assert_eq!(seen("..data"), (group, 0o2755));
    }

    #[test]
    fn the_mount_table_is_read_as_it_is_written() {
        assert_eq!(unescape(r"/a\040b\134c/d"), r"/a b\c/d");
        assert_eq!(unescape("/plain"), "/plain");
    }
}
