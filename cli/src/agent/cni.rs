//! Makes the agent the node's CNI plugin: puts executable and configuration where the container runtime looks for
//! them, sets others aside, and undoes it.

use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::json;
use tracing::info;

/// The configuration's file: runtimes take the first by name.
const CONFLIST: &str = "05-xebec.conflist";
/// The executable.
const PLUGIN: &str = "xebec-cni";
/// What other configurations are called while this one is in force.
const ASIDE: &str = ".xebec_bak";
/// The latest version of the specification that all container runtimes in use speak: containerd 1.x has no 1.1.0.
const VERSION: &str = "1.0.0";

/// Where the node's container runtime looks for CNI plugins.
#[derive(Args, Clone, Debug)]
pub struct Cni {
    /// Folder of CNI configurations
    #[arg(long, default_value = "/etc/cni/net.d")]
    pub cni_conf_dir: PathBuf,
    /// Folder of CNI plugins
    #[arg(long, default_value = "/opt/cni/bin")]
    pub cni_bin_dir: PathBuf,
    /// Set the configurations of other plugins aside (as *.xebec_bak), so that none of them is used by mistake
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub cni_exclusive: bool,
}

impl Cni {
    /// Puts plugin, then configuration in place, each whole or not at all.
    pub fn install(&self, executable: &Path, socket: &Path) -> Result<()> {
        for dir in [&self.cni_bin_dir, &self.cni_conf_dir] {
            std::fs::create_dir_all(dir)
                .with_context(|| format!("could not make {}", dir.display()))?;
        }
        let plugin = self.cni_bin_dir.join(PLUGIN);
        let mut source = std::fs::File::open(executable)
            .with_context(|| format!("could not open {}", executable.display()))?;
        replace(&plugin, 0o755, |file| {
            std::io::copy(&mut source, file).map(drop)
        })?;
        let conf = json!({
            "cniVersion": VERSION,
            "name": "xebec",
            "plugins": [{"type": PLUGIN, "agentSocket": socket}],
        });
        let text = serde_json::to_string_pretty(&conf).context("could not write JSON")?;
        let path = self.cni_conf_dir.join(CONFLIST);
        replace(&path, 0o644, |file| writeln!(file, "{text}"))?;
        info!(conf = %path.display(), plugin = %plugin.display(), "CNI plugin installed");
        if self.cni_exclusive {
            self.set_aside()?;
        }
        Ok(())
    }

    fn set_aside(&self) -> Result<()> {
        for name in self.names()? {
            let is_conf = [".conf", ".conflist", ".json"]
                .iter()
                .any(|ending| name.ends_with(ending));
            if is_conf && name != CONFLIST {
                self.rename(&name, &format!("{name}{ASIDE}"))?;
                info!(
                    name,
                    "the CNI configuration of another plugin was set aside"
                );
            }
        }
        Ok(())
    }

    /// Removes plugin and configuration, and gives those that were set aside their names back.
    pub fn remove(&self) -> Result<()> {
        for path in [
            self.cni_conf_dir.join(CONFLIST),
            self.cni_bin_dir.join(PLUGIN),
        ] {
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error)
                        .with_context(|| format!("could not remove {}", path.display()));
                }
                _ => {}
            }
        }
        if !self.cni_conf_dir.exists() {
            return Ok(());
        }
        for name in self.names()? {
            if let Some(before) = name.strip_suffix(ASIDE) {
                // One that was written anew meanwhile is newer than the one aside.
                if !self.cni_conf_dir.join(before).exists() {
                    self.rename(&name, before)?;
                }
            }
        }
        Ok(())
    }

    fn names(&self) -> Result<Vec<String>> {
        let dir = &self.cni_conf_dir;
        let entries =
            std::fs::read_dir(dir).with_context(|| format!("could not list {}", dir.display()))?;
        let names = entries
            .flatten()
            .map(|entry| entry.file_name().into_string());
        Ok(names.filter_map(Result::ok).collect())
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        let dir = &self.cni_conf_dir;
        std::fs::rename(dir.join(from), dir.join(to))
            .with_context(|| format!("could not rename {from} in {} to {to}", dir.display()))
    }
}

/// Writes a file beside its place and moves it there: whoever runs or reads it meanwhile has the old or the new one.
fn replace(
    path: &Path,
    mode: u32,
    write: impl FnOnce(&mut std::fs::File) -> std::io::Result<()>,
) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.tmp"));
    let outcome = (|| {
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&temporary)?;
        // One that a killed agent left may have another mode.
        file.set_permissions(std::fs::Permissions::from_mode(mode))?;
        write(&mut file)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    })();
    if outcome.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    outcome.with_context(|| format!("could not write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cni(dir: &Path) -> Cni {
        Cni {
            cni_conf_dir: dir.join("net.d"),
            cni_bin_dir: dir.join("bin"),
            cni_exclusive: true,
        }
    }

    fn listed(dir: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir).unwrap().flatten();
        let mut names: Vec<String> = entries
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn installed_twice_and_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let cni = cni(dir.path());
        let executable = dir.path().join("xebec");
        std::fs::write(&executable, "program").unwrap();
        std::fs::create_dir_all(&cni.cni_conf_dir).unwrap();
        for other in ["10-kindnet.conflist", "README"] {
            std::fs::write(cni.cni_conf_dir.join(other), other).unwrap();
        }
        let socket = Path::new("/run/xebec/nodes/a/agent.sock");
        for _ in 0..2 {
            cni.install(&executable, socket).unwrap();
            assert_eq!(
                listed(&cni.cni_conf_dir),
                [
                    "05-xebec.conflist",
                    "10-kindnet.conflist.xebec_bak",
                    "README"
                ]
            );
            let plugin = cni.cni_bin_dir.join("xebec-cni");
            assert_eq!(std::fs::read(&plugin).unwrap(), b"program");
            let mode = std::fs::metadata(&plugin).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o755);
        }
        let conf = std::fs::read(cni.cni_conf_dir.join("05-xebec.conflist")).unwrap();
        let conf: serde_json::Value = serde_json::from_slice(&conf).unwrap();
        assert_eq!(
            conf["plugins"][0]["agentSocket"],
            "/run/xebec/nodes/a/agent.sock"
        );
        for _ in 0..2 {
            cni.remove().unwrap();
            assert_eq!(listed(&cni.cni_conf_dir), ["10-kindnet.conflist", "README"]);
            assert!(listed(&cni.cni_bin_dir).is_empty());
        }
    }

    #[test]
    fn others_stay_where_that_is_wished() {
        let dir = tempfile::tempdir().unwrap();
        let mut cni = cni(dir.path());
        cni.cni_exclusive = false;
        std::fs::create_dir_all(&cni.cni_conf_dir).unwrap();
        std::fs::write(cni.cni_conf_dir.join("10-a.conf"), "").unwrap();
        cni.install(Path::new("/proc/self/exe"), Path::new("/s"))
            .unwrap();
        assert_eq!(
            listed(&cni.cni_conf_dir),
            ["05-xebec.conflist", "10-a.conf"]
        );
        let missing = cni.install(Path::new("/nonexistent"), Path::new("/s"));
        assert!(missing.is_err());
        assert_eq!(
            listed(&cni.cni_bin_dir),
            ["xebec-cni"],
            "what was there stays"
        );
    }
}
