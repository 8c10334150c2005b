//! Finds the cgroup v2 folders that the socket hooks need: the root that they are attached to, and the one that a
//! kubelet puts all pods into.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

/// How deep below the root the pods' cgroup is looked for: a kubelet with a `cgroupRoot` has it below that.
const DEPTH: usize = 4;

/// The root of the cgroup v2 hierarchy: at `named` or in its `unified` (where v1 has the rest), or where this process
/// finds it mounted.
pub fn root(named: Option<&Path>) -> Result<PathBuf> {
    let candidates: Vec<PathBuf> = match named {
        Some(named) => vec![named.to_owned(), named.join("unified")],
        None => {
            let mounts = std::fs::read_to_string("/proc/self/mounts")
                .context("could not read /proc/self/mounts")?;
            mounted(&mounts)
        }
    };
    let found = candidates.iter().find(|folder| {
        statfs(folder.as_path()).is_ok_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC)
    });
    match (found, named) {
        (Some(found), _) => Ok(found.clone()),
        (None, Some(named)) => bail!(
            "{} is no cgroup v2 hierarchy and has none in its folder `unified`: name the host's with --cgroup-root",
            named.display()
        ),
        (None, None) => bail!(
            "cgroup v2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup/unified, or name it with --cgroup-root"
        ),
    }
}

/// The mount points of cgroup v2.
fn mounted(mounts: &str) -> Vec<PathBuf> {
    let points = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ');
        let (_, point, kind) = (words.next()?, words.next()?, words.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(point))
    });
    points.collect()
}

/// Whether a kubelet gives this name to the cgroup of all its pods: with the cgroupfs driver `kubepods`, with systemd's
/// `kubepods.slice`, below a slice of its own `kubelet-kubepods.slice`.
fn is_of_pods(name: &str) -> bool {
    name == "kubepods" || name == "kubepods.slice" || name.ends_with("-kubepods.slice")
}

/// The cgroup of all pods: the one nearest to the root. None where there is none: the kubelet uses v1 alone.
pub fn pods(root: &Path) -> Result<Option<PathBuf>> {
    let mut level = vec![root.to_owned()];
    for _ in 0..DEPTH {
        let mut below = Vec::new();
        for folder in level {
            // Cgroups come and go meanwhile.
            for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    below.push(entry.path());
                }
            }
        }
        let named = |folder: &PathBuf| {
            let name = folder.file_name().unwrap_or_default().to_string_lossy();
            is_of_pods(&name)
        };
        let mut found: Vec<&PathBuf> = below.iter().filter(|folder| named(folder)).collect();
        // One of another driver may be left from before: it is empty.
        if found.len() > 1 {
            found.retain(|folder| is_populated(folder));
        }
        match found.as_slice() {
            [] => {}
            [one] => return Ok(Some((*one).clone())),
            [one, other, ..] => bail!(
                "both {} and {} may be the cgroup of the node's pods: say which with --pod-cgroup",
                one.display(),
                other.display()
            ),
        }
        level = below;
    }
    Ok(None)
}

/// Whether processes live in a cgroup or below it.
fn is_populated(folder: &Path) -> bool {
    std::fs::read_to_string(folder.join("cgroup.events"))
        .is_ok_and(|events| events.lines().any(|line| line == "populated 1"))
}

/// Whether it is the root of the whole hierarchy, and not of a part that a container sees as its own.
pub fn is_whole(root: &Path) -> bool {
    // The root alone has no type.
    !root.join("cgroup.type").exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(folders: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for folder in folders {
            std::fs::create_dir_all(dir.path().join(folder)).unwrap();
        }
        dir
    }

    #[test]
    fn the_pods_cgroup_of_each_driver() {
        for (folders, wanted) in [
            (
                &["kubepods/burstable/pod1/c1", "system.slice/ssh"][..],
                Some("kubepods"),
            ),
            (
                &["kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice"],
                Some("kubepods.slice"),
            ),
            (
                &[
                    "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice",
                    "init.scope",
                ],
                Some("kubelet.slice/kubelet-kubepods.slice"),
            ),
            // A cluster in containers on a machine that is a node itself: the nearest one is the machine's.
            (
                &["docker/abc/kubelet/kubepods", "kubepods"],
                Some("kubepods"),
            ),
            (
                &["docker/abc/kubelet/kubepods"],
                Some("docker/abc/kubelet/kubepods"),
            ),
            (&["system.slice/kubelet.service", "a/b/c/d/kubepods"], None),
        ] {
            let dir = tree(folders);
            let wanted = wanted.map(|wanted| dir.path().join(wanted));
            assert_eq!(pods(dir.path()).unwrap(), wanted, "{folders:?}");
        }
    }

    #[test]
    fn of_two_the_one_with_pods_in_it() {
        let dir = tree(&["kubepods", "kubepods.slice"]);
        let events = |folder: &str, populated: u8| {
            let text = format!("populated {populated}\nfrozen 0\n");
            std::fs::write(dir.path().join(folder).join("cgroup.events"), text).unwrap();
        };
        events("kubepods", 0);
        events("kubepods.slice", 1);
        assert_eq!(
            pods(dir.path()).unwrap(),
            Some(dir.path().join("kubepods.slice"))
        );
        events("kubepods", 1);
        let error = pods(dir.path()).unwrap_err().to_string();
        assert!(error.contains("--pod-cgroup"), "{error}");
    }

    #[test]
    fn the_root_is_found_where_it_is_mounted_and_nowhere_else() {
        let found = root(None).unwrap();
        assert_eq!(root(Some(&found)).unwrap(), found);
        if found.ends_with("unified") {
            assert_eq!(root(found.parent()).unwrap(), found);
        }
        let dir = tree(&["unified"]);
        let error = root(Some(dir.path())).unwrap_err().to_string();
        assert!(error.contains("--cgroup-root"), "{error}");
        let mounts =
            "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n";
        assert_eq!(mounted(mounts), [PathBuf::from("/sys/fs/cgroup")]);
    }
}
