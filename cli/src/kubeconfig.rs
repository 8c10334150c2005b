//! Kubeconfig files: the administrator's, the nodes', and merging into the user's own.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::paths::{Layout, write_private};
use crate::pki::Leaf;

/// The name of cluster, context and user in kubeconfigs that we write.
const NAME: &str = "xebec";

/// A kubeconfig (v1 Config) with the certificates inside.
pub fn render(server: &str, ca_pem: &str, leaf: &Leaf) -> Result<String> {
    let data = |pem: &str| STANDARD.encode(pem);
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": NAME, "cluster": {"server": server, "certificate-authority-data": data(ca_pem)}}],
        "contexts": [{"name": NAME, "context": {"cluster": NAME, "user": NAME}}],
        "current-context": NAME,
        "users": [{"name": NAME, "user": {
            "client-certificate-data": data(&leaf.cert),
            "client-key-data": data(&leaf.key),
        }}],
    });
    serde_yaml_ng::to_string(&config).context("could not write the kubeconfig")
}

/// `xebec kubeconfig`: prints the administrator's kubeconfig, or merges it into the user's.
pub fn run(layout: &Layout, write: bool) -> Result<()> {
    let path = layout.admin_kubeconfig();
    let ours = std::fs::read_to_string(&path).with_context(|| {
        format!(
            "could not read {} (start a cluster first with `xebec up`)",
            path.display()
        )
    })?;
    if !write {
        print!("{ours}");
        return Ok(());
    }
    let target = user_kubeconfig()?;
    let existing = match std::fs::read_to_string(&target) {
        Ok(text) => Some(text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => {
            return Err(error).with_context(|| format!("could not read {}", target.display()));
        }
    };
    let merged = merge(existing.as_deref(), &ours)
        .with_context(|| format!("{} was left as it is", target.display()))?;
    if let Some(dir) = target.parent() {
        std::fs::create_dir_all(dir)
            .with_context(|| format!("could not make {}", dir.display()))?;
    }
    write_private(&target, merged.as_bytes())?;
    println!(
        "context \"{NAME}\" written to {} and made current",
        target.display()
    );
    Ok(())
}

/// The file that kubectl would change: the first of `$KUBECONFIG`, else `~/.kube/config`.
fn user_kubeconfig() -> Result<PathBuf> {
    if let Some(first) = std::env::var_os("KUBECONFIG")
        .and_then(|paths| std::env::split_paths(&paths).find(|path| !path.as_os_str().is_empty()))
    {
        return Ok(first);
    }
    let home =
        std::env::var_os("HOME").context("HOME is not set; set KUBECONFIG to the file to write")?;
    Ok(Path::new(&home).join(".kube/config"))
}

/// Puts our cluster, context and user into an existing kubeconfig, replacing those of the same name.
fn merge(existing: Option<&str>, ours: &str) -> Result<String> {
    let ours: Value = serde_yaml_ng::from_str(ours).context("our kubeconfig is no YAML")?;
    let mut config: Value = match existing.filter(|text| !text.trim().is_empty()) {
        Some(text) => serde_yaml_ng::from_str(text).context("it is no YAML")?,
        None => json!({"apiVersion": "v1", "kind": "Config"}),
    };
    let Some(map) = config.as_object_mut() else {
        bail!("it is no kubeconfig: not a mapping")
    };
    for key in ["clusters", "contexts", "users"] {
        let list = map.entry(key).or_insert_with(|| json!([]));
        if list.is_null() {
            *list = json!([]);
        }
        let Some(list) = list.as_array_mut() else {
            bail!("it is no kubeconfig: {key} is not a list")
        };
        list.retain(|entry| entry["name"] != NAME);
        list.extend(ours[key].as_array().into_iter().flatten().cloned());
    }
    map.insert("current-context".into(), NAME.into());
    serde_yaml_ng::to_string(&config).context("could not write the kubeconfig")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours() -> String {
        let leaf = Leaf {
            cert: "c".into(),
            key: "k".into(),
        };
        render("https://127.0.0.1:6443", "ca", &leaf).unwrap()
    }

    #[test]
    fn merging_keeps_what_others_wrote_and_replaces_our_own() {
        let theirs = "apiVersion: v1\nkind: Config\ncurrent-context: prod\nclusters:\n- name: prod\n  cluster: {server: https://p}\n- name: xebec\n  cluster: {server: https://old}\nusers: null\n";
        let merged: Value =
            serde_yaml_ng::from_str(&merge(Some(theirs), &ours()).unwrap()).unwrap();
        assert_eq!(merged["current-context"], "xebec");
        let servers: Vec<_> = merged["clusters"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| c["cluster"]["server"].clone())
            .collect();
        assert_eq!(servers, ["https://p", "https://127.0.0.1:6443"]);
        assert_eq!(merged["users"].as_array().unwrap().len(), 1);
    }

    #[test]
    fn a_file_that_is_no_kubeconfig_is_refused() {
        assert!(merge(Some("- a\n- b\n"), &ours()).is_err());
        assert!(merge(Some("clusters: 5\n"), &ours()).is_err());
    }
}
