//! Where things lie on disk: one place that knows every path that `up` makes and `down` removes.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// The folders of one cluster on this machine.
#[derive(Clone, Debug)]
pub struct Layout {
    /// What survives a restart: store, certificates, images (`--data-dir`).
    pub data: PathBuf,
    /// Sockets, pid file and mounts; gone after `down` (`--run-dir`).
    pub run: PathBuf,
}

impl Layout {
    /// Certificates and keys.
    pub fn pki(&self) -> PathBuf {
        self.data.join("pki")
    }

    /// The embedded store.
    pub fn store(&self) -> PathBuf {
        self.data.join("store")
    }

    /// The administrator's kubeconfig.
    pub fn admin_kubeconfig(&self) -> PathBuf {
        self.data.join("admin.kubeconfig")
    }

    /// What the running `up` says of itself.
    pub fn up_state(&self) -> PathBuf {
        self.run.join("up.json")
    }

    /// Where the flows of all nodes are served (Hubble's API).
    pub fn hubble_socket(&self) -> PathBuf {
        self.run.join(xebec_agent::HUBBLE_SOCKET)
    }

    /// The log of a detached `up`.
    pub fn log(&self) -> PathBuf {
        self.data.join("up.log")
    }

    /// A BPF filesystem for what gives several nodes their way out.
    pub fn gateway_bpf(&self) -> PathBuf {
        self.run.join("gateway")
    }

    /// The folders of one node.
    pub fn node(&self, name: &str) -> NodeLayout {
        NodeLayout {
            data: self.data.join("nodes").join(name),
            run: self.run.join("nodes").join(name),
        }
    }

    /// Nodes that have a run folder, in name order.
    pub fn nodes(&self) -> Vec<String> {
        names(&self.run.join("nodes"))
    }

    /// Nodes that were ever run with this data, in name order.
    pub fn known_nodes(&self) -> Vec<String> {
        names(&self.data.join("nodes"))
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// The folders of one node of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeLayout {
    /// Images, pod volumes, address records.
    pub data: PathBuf,
    /// Sockets and sandbox state.
    pub run: PathBuf,
}

impl NodeLayout {
    /// The container runtime's socket (CRI v1).
    pub fn cri_socket(&self) -> PathBuf {
        self.run.join("cri.sock")
    }

    /// The agent's socket.
    pub fn agent_socket(&self) -> PathBuf {
        self.run.join("agent.sock")
    }

    /// Where the node's flows are served.
    pub fn hubble_socket(&self) -> PathBuf {
        self.run.join(xebec_agent::HUBBLE_SOCKET)
    }

    /// Held by the process that runs the node, where it has one of its own.
    pub fn lock(&self) -> PathBuf {
        self.run.join("lock")
    }

    /// The network namespace of a node that has one of its own.
    pub fn netns(&self) -> PathBuf {
        self.run.join("netns")
    }

    /// A BPF filesystem of our own, for pinned links.
    pub fn bpf(&self) -> PathBuf {
        self.run.join("bpf")
    }

    /// Images and container filesystems.
    pub fn cri_root(&self) -> PathBuf {
        self.data.join("cri")
    }

    /// CNI executables.
    pub fn cni_bin(&self) -> PathBuf {
        self.data.join("cni/bin")
    }

    /// CNI network configuration.
    pub fn cni_conf(&self) -> PathBuf {
        self.data.join("cni/net.d")
    }

    /// Pod volumes.
    pub fn kubelet_root(&self) -> PathBuf {
        self.data.join("kubelet")
    }

    /// The agent's records of addresses and endpoints.
    pub fn agent_state(&self) -> PathBuf {
        self.data.join("agent")
    }
}

/// Makes a folder and its parents, readable by its owner alone.
pub fn private_dir(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::create_dir_all(path)
        .with_context(|| format!("could not make folder {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))
        .with_context(|| format!("could not set the mode of {}", path.display()))
}

/// Writes a file whole or not at all, readable by its owner alone.
pub fn write_private(path: &Path, content: &[u8]) -> Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let temporary = path.with_extension("tmp");
    let write = || -> std::io::Result<()> {
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    write().with_context(|| format!("could not write {}", path.display()))
}
