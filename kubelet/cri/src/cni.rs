//! Runs CNI plugins (specification 1.1.0): configuration lists, chaining, and
//! the result kept for DEL.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

/// The interface of a pod.
const IFNAME: &str = "eth0";
/// A plugin that takes longer than this is ended.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A network's configuration: a list of plugins.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Network {
    /// The network's name.
    pub name: String,
    /// The version that the configuration is written in.
    pub version: String,
    /// The plugins' configurations, in the order of ADD.
    pub plugins: Vec<Value>,
}

/// A pod as plugins are told of it.
#[derive(Clone, Debug, Default)]
pub struct Pod {
    /// Sandbox id.
    pub id: String,
    /// Path of its network namespace.
    pub netns: String,
    /// Kubernetes names.
    pub namespace: String,
    /// Kubernetes names.
    pub name: String,
    /// Kubernetes names.
    pub uid: String,
    /// Host ports, for plugins with the capability `portMappings`.
    pub port_mappings: Vec<Value>,
}

/// What ADD gave: all that DEL needs later.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Attachment {
    /// The configuration that was used.
    pub network: Network,
    /// The last plugin's result; null while there is none.
    pub result: Value,
}

impl Attachment {
    /// An attachment whose ADD has no result: it runs yet, or was cut.
    pub fn begun(network: Network) -> Self {
        Self {
            network,
            result: Value::Null,
        }
    }

    /// The pod's addresses, without prefix lengths.
    pub fn addresses(&self) -> Vec<String> {
        let interfaces = self.result["interfaces"].as_array();
        self.result["ips"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|ip| {
                // Addresses of interfaces outside the pod (a bridge's) don't count.
                match (ip["interface"].as_u64(), interfaces) {
                    (Some(at), Some(all)) => all
                        .get(at as usize)
                        .is_none_or(|i| i["sandbox"].as_str().is_some_and(|s| !s.is_empty())),
                    _ => true,
                }
            })
            .filter_map(|ip| ip["address"].as_str())
            .map(|a| a.split('/').next().unwrap_or(a).to_owned())
            .collect()
    }
}

/// Reads the first configuration of a directory, in the order of file names.
pub fn load(dir: &Path) -> anyhow::Result<Network> {
    let mut files: Vec<PathBuf> = match std::fs::read_dir(dir) {
        Ok(entries) => entries.filter_map(|e| Some(e.ok()?.path())).collect(),
        Err(err) => bail!(
            "cni config directory {} is not readable: {err}",
            dir.display()
        ),
    };
    files.retain(|p| {
        p.extension()
            .and_then(|e| e.to_str())
            .is_some_and(|e| ["conflist", "conf", "json"].contains(&e))
    });
    files.sort();
    let path = files.first().with_context(|| {
        format!(
            "no network config found in {}: cni plugin not initialized",
            dir.display()
        )
    })?;
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse(&text).with_context(|| format!("{} is not a CNI configuration", path.display()))
}

/// Reads a configuration: a list of plugins, or one plugin alone.
pub fn parse(text: &[u8]) -> anyhow::Result<Network> {
    let conf: Value = serde_json::from_slice(text)?;
    let name = conf["name"]
        .as_str()
        .filter(|n| !n.is_empty())
        .context("the network has no name")?;
    let plugins = match conf.get("plugins") {
        Some(Value::Array(plugins)) if !plugins.is_empty() => plugins.clone(),
        Some(_) => bail!("`plugins` is not a list with at least one plugin"),
        None => vec![conf.clone()],
    };
    for plugin in &plugins {
        let kind = plugin["type"].as_str().unwrap_or_default();
        if kind.is_empty() || kind.contains('/') || kind.starts_with('.') {
            bail!("plugin type {kind:?} is not the name of an executable");
        }
    }
    Ok(Network {
        name: name.to_owned(),
        version: conf["cniVersion"].as_str().unwrap_or("0.1.0").to_owned(),
        plugins,
    })
}

/// The first version of the specification that has STATUS.
const STATUS_SINCE: (u32, u32) = (1, 1);

impl Network {
    fn has_status(&self) -> bool {
        let mut numbers = self.version.split('.').map(|n| n.parse().unwrap_or(0));
        (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= STATUS_SINCE
    }
}

/// Calls plugins found in these directories.
#[derive(Clone, Debug)]
pub struct Cni {
    /// Where plugin executables are.
    pub bin_dirs: Vec<PathBuf>,
    /// Where configurations are.
    pub conf_dir: PathBuf,
}

impl Cni {
    /// Why pods can't get a network now, if so: what is not installed, or what a plugin's STATUS says.
    pub async fn status(&self) -> anyhow::Result<()> {
        let network = load(&self.conf_dir)?;
        for plugin in &network.plugins {
            self.find(plugin["type"].as_str().unwrap_or_default())?;
        }
        if network.has_status() {
            for plugin in &network.plugins {
                self.call("STATUS", None, &network, plugin, &Value::Null)
                    .await
                    .context("cni plugin not initialized")?;
            }
        }
        Ok(())
    }

    /// Attaches a pod to the network; undoes all of it when one plugin fails.
    pub async fn add(&self, pod: &Pod, network: Network) -> anyhow::Result<Attachment> {
        let mut result = Value::Null;
        for plugin in &network.plugins {
            match self.call("ADD", Some(pod), &network, plugin, &result).await {
                Ok(text) => result = text,
                Err(err) => {
                    let partial = Attachment { network, result };
                    if let Err(undo) = self.del(pod, &partial).await {
                        tracing::warn!("cannot undo the network setup of {}: {undo:#}", pod.name);
                    }
                    return Err(err);
                }
            }
        }
        Ok(Attachment { network, result })
    }

    /// Detaches a pod; plugins run in reverse order, all of them.
    pub async fn del(&self, pod: &Pod, attachment: &Attachment) -> anyhow::Result<()> {
        let mut failed = Ok(());
        for plugin in attachment.network.plugins.iter().rev() {
            let done = self
                .call(
                    "DEL",
                    Some(pod),
                    &attachment.network,
                    plugin,
                    &attachment.result,
                )
                .await;
            if let Err(err) = done {
                failed = Err(err);
            }
        }
        failed
    }

    fn find(&self, kind: &str) -> anyhow::Result<PathBuf> {
        self.bin_dirs
            .iter()
            .map(|dir| dir.join(kind))
            .find(|path| path.is_file())
            .with_context(|| format!("cni plugin {kind:?} not found in {:?}", self.bin_dirs))
    }

    async fn call(
        &self,
        command: &str,
        pod: Option<&Pod>,
        network: &Network,
        plugin: &Value,
        previous: &Value,
    ) -> anyhow::Result<Value> {
        let kind = plugin["type"].as_str().unwrap_or_default();
        let executable = self.find(kind)?;
        let path = std::env::join_paths(&self.bin_dirs).context("bad CNI plugin directory")?;
        let mut executed = tokio::process::Command::new(&executable);
        executed
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("CNI_COMMAND", command)
            .env("CNI_PATH", path);
        if let Some(pod) = pod {
            executed
                .env("CNI_CONTAINERID", &pod.id)
                .env("CNI_NETNS", &pod.netns)
                .env("CNI_IFNAME", IFNAME)
                .env("CNI_ARGS", arguments(pod));
        }
        let mut child = executed
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot run {}", executable.display()))?;
        let stdin = child.stdin.take();
        let input = serde_json::to_vec(&configuration(network, plugin, pod, previous))?;
        let run = async {
            if let Some(mut stdin) = stdin {
                // A plugin that does not read its input may end first.
                let _ = stdin.write_all(&input).await;
            }
            child.wait_with_output().await
        };
        let output = tokio::time::timeout(TIMEOUT, run).await.with_context(|| {
            format!("cni plugin {kind} {command} took longer than {TIMEOUT:?}")
        })??;
        if !output.status.success() {
            let error: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
            let message = match error["msg"].as_str() {
                Some(msg) => match error["details"].as_str().filter(|d| !d.is_empty()) {
                    Some(details) => format!("{msg}: {details}"),
                    None => msg.to_owned(),
                },
                None => format!(
                    "{}: {}{}",
                    output.status,
                    String::from_utf8_lossy(&output.stdout).trim(),
                    String::from_utf8_lossy(&output.stderr).trim()
                ),
            };
            bail!(
                "plugin type={kind:?} failed ({}): {message}",
                command.to_lowercase()
            );
        }
        if output.stdout.trim_ascii().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("cni plugin {kind} answered with something that is not JSON"))
    }
}

fn arguments(pod: &Pod) -> String {
    format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
        pod.namespace, pod.name, pod.id, pod.uid
    )
}

/// What one plugin reads: its part of the list, with the list's name and
/// version, the result so far, and the capabilities it has asked for.
fn configuration(network: &Network, plugin: &Value, pod: Option<&Pod>, previous: &Value) -> Value {
    let mut conf = plugin.clone();
    if let Some(map) = conf.as_object_mut() {
        let capabilities = map.remove("capabilities").unwrap_or_default();
        map.insert("name".to_owned(), json!(network.name));
        map.insert("cniVersion".to_owned(), json!(network.version));
        if !previous.is_null() {
            map.insert("prevResult".to_owned(), previous.clone());
        }
        let ports = pod.map_or(&[][..], |pod| &pod.port_mappings);
        if capabilities["portMappings"] == json!(true) && !ports.is_empty() {
            map.insert("runtimeConfig".to_owned(), json!({"portMappings": ports}));
        }
    }
    conf
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn lists_and_single_plugins_are_read() {
        let list =
            parse(br#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"a"},{"type":"b"}]}"#)
                .unwrap();
        assert_eq!((list.plugins.len(), list.version.as_str()), (2, "1.0.0"));
        let one =
            parse(br#"{"cniVersion":"0.4.0","name":"n","type":"bridge","bridge":"x"}"#).unwrap();
        assert_eq!(one.plugins[0]["bridge"], "x");
        for bad in [
            &br#"{"name":"n","plugins":[]}"#[..],
            br#"{"plugins":[{"type":"a"}]}"#,
            br#"{"name":"n","plugins":[{"type":"../evil"}]}"#,
            br#"{"name":"n","plugins":[{}]}"#,
            b"not json",
        ] {
            assert!(parse(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn an_empty_directory_says_what_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let err = load(dir.path()).unwrap_err().to_string();
        assert!(err.contains("no network config found"), "{err}");
        let err = load(&dir.path().join("absent")).unwrap_err().to_string();
        assert!(err.contains("not readable"), "{err}");
        std::fs::write(dir.path().join("20-b.conf"), r#"{"name":"b","type":"x"}"#).unwrap();
        std::fs::write(
            dir.path().join("10-a.conflist"),
            r#"{"name":"a","plugins":[{"type":"x"}]}"#,
        )
        .unwrap();
        std::fs::write(dir.path().join("00-readme.txt"), "no").unwrap();
        assert_eq!(load(dir.path()).unwrap().name, "a");
    }

    /// Two scripts as plugins: they record what they were given.
    #[tokio::test]
    async fn plugins_are_chained_and_undone_in_reverse() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().display();
        for (name, body) in [
            (
                "first",
                r#"echo '{"cniVersion":"1.0.0","interfaces":[{"name":"br0"},{"name":"eth0","sandbox":"/ns"}],"ips":[{"address":"10.1.2.3/24","interface":1},{"address":"10.1.2.1/24","interface":0}]}'"#,
            ),
            (
                "second",
                r#"if [ "$CNI_COMMAND" = ADD ] && [ -e "$0.fail" ]; then echo '{"code":7,"msg":"no luck","details":"at all"}'; exit 1; fi; [ "$CNI_COMMAND" = DEL ] || python3 -c 'import json,sys; print(json.dumps(json.load(sys.stdin)["prevResult"]))' < "$0.in""#,
            ),
        ] {
            let path = dir.path().join(name);
            std::fs::write(
                &path,
                format!("#!/bin/sh\ncat > \"$0.in\"\necho \"{name} $CNI_COMMAND $CNI_IFNAME $CNI_ARGS\" >> {at}/calls\n{body}\n"),
            )
            .unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        std::fs::create_dir(dir.path().join("conf")).unwrap();
        std::fs::write(
            dir.path().join("conf/net.conflist"),
            r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"first","x":1},{"type":"second","capabilities":{"portMappings":true}}]}"#,
        )
        .unwrap();
        let cni = Cni {
            bin_dirs: vec![dir.path().to_owned()],
            conf_dir: dir.path().join("conf"),
        };
        // This network's version has no STATUS yet.
        cni.status().await.unwrap();
        let pod = Pod {
            id: "id1".into(),
            netns: "/ns".into(),
            namespace: "default".into(),
            name: "web".into(),
            uid: "u".into(),
            port_mappings: vec![json!({"hostPort": 80, "containerPort": 8080, "protocol": "tcp"})],
        };
        let network = load(&cni.conf_dir).unwrap();
        let attachment = cni.add(&pod, network.clone()).await.unwrap();
        assert_eq!(attachment.addresses(), ["10.1.2.3"]);
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        let second: Value = serde_json::from_str(&read("second.in")).unwrap();
        assert_eq!(second["prevResult"]["ips"][0]["address"], "10.1.2.3/24");
        assert_eq!(second["runtimeConfig"]["portMappings"][0]["hostPort"], 80);
        assert!(second.get("capabilities").is_none());
        let first: Value = serde_json::from_str(&read("first.in")).unwrap();
        assert!(first.get("prevResult").is_none());
        assert_eq!(first["name"], "n");
        cni.del(&pod, &attachment).await.unwrap();
        let args = "eth0 IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=id1;K8S_POD_UID=u";
        assert_eq!(
            read("calls"),
            format!("first ADD {args}\nsecond ADD {args}\nsecond DEL {args}\nfirst DEL {args}\n")
        );
        std::fs::write(dir.path().join("second.fail"), "").unwrap();
        let err = cni.add(&pod, network).await.unwrap_err().to_string();
        assert_eq!(err, r#"plugin type="second" failed (add): no luck: at all"#);
        assert!(read("calls").ends_with(&format!("second DEL {args}\nfirst DEL {args}\n")));
    }
    /// A plugin is asked for its STATUS, with no pod, and its refusal is the reason.
    #[tokio::test]
    async fn status_says_what_the_plugin_says() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("only");
        let script = r#"#!/bin/sh
cat > "$0.in"
echo "$CNI_COMMAND${CNI_CONTAINERID+ id}${CNI_NETNS+ netns}${CNI_IFNAME+ ifname}" >> "$0.calls"
[ -e "$0.up" ] || { echo '{"code":50,"msg":"no agent"}'; exit 1; }
"#;
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let cni = Cni {
            bin_dirs: vec![dir.path().to_owned()],
            conf_dir: dir.path().join("conf"),
        };
        std::fs::create_dir(&cni.conf_dir).unwrap();
        let says = async || cni.status().await.map_err(|err| format!("{err:#}"));
        let missing = says().await.unwrap_err();
        assert!(missing.contains("cni plugin not initialized"), "{missing}");
        let conf = r#"{"cniVersion":"1.1.0","name":"n","plugins":[{"type":"only"}]}"#;
        std::fs::write(cni.conf_dir.join("net.conflist"), conf).unwrap();
        assert_eq!(
            says().await.unwrap_err(),
            r#"cni plugin not initialized: plugin type="only" failed (status): no agent"#
        );
        std::fs::write(dir.path().join("only.up"), "").unwrap();
        says().await.unwrap();
        let calls = std::fs::read_to_string(dir.path().join("only.calls")).unwrap();
        assert_eq!(calls, "STATUS\nSTATUS\n");
    }
}
