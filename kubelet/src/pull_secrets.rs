//! Credentials for registries, from a pod's `imagePullSecrets`.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use base64::Engine;
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::Api;
use serde::Deserialize;
use xebec_cri_api::v1::AuthConfig;

/// The name under which Docker Hub's credentials are kept.
const DOCKER_HUB: &str = "index.docker.io";

#[derive(Clone, Default, Deserialize)]
struct Entry {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    auth: String,
}

#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
}

/// What may be tried for an image, the closest first; and the secrets that could not be used.
pub(crate) async fn credentials(
    client: &kube::Client,
    pod: &Pod,
    image: &str,
) -> (Vec<AuthConfig>, Vec<String>) {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let api = Api::<Secret>::namespaced(client.clone(), namespace);
    let (mut entries, mut failed) = (BTreeMap::new(), Vec::new());
    let spec = pod.spec.as_ref();
    for reference in spec
        .iter()
        .flat_map(|s| s.image_pull_secrets.iter().flatten())
    {
        let found = async {
            let secret = api.get(&reference.name).await?;
            read(&secret)
        };
        match found.await {
            Ok(found) => found
                .into_iter()
                .for_each(|(key, entry)| entries.entry(key).or_insert_with(Vec::new).push(entry)),
            Err(error) => {
                let error = format!("{error:#}");
                tracing::warn!(
                    secret = reference.name,
                    error,
                    "could not use an image pull secret"
                );
                failed.push(reference.name.clone());
            }
        }
    }
    (matching(&entries, image), failed)
}

/// The registries of one secret, by `host[:port][/path]`.
fn read(secret: &Secret) -> Result<Vec<(String, AuthConfig)>> {
    let data = secret.data.as_ref().context("it is empty")?;
    let entries = if let Some(json) = data.get(".dockerconfigjson") {
        let config: DockerConfig =
            serde_json::from_slice(&json.0).context("its .dockerconfigjson is malformed")?;
        config.auths
    } else {
        let json = data.get(".dockercfg");
        let json = json.context("it has neither .dockerconfigjson nor .dockercfg")?;
        serde_json::from_slice(&json.0).context("its .dockercfg is malformed")?
    };
    let mut found = Vec::new();
    for (registry, entry) in entries {
        let (username, password) = if entry.username.is_empty() && !entry.auth.is_empty() {
            let bytes = base64::engine::general_purpose::STANDARD.decode(entry.auth.trim());
            let text = String::from_utf8(bytes.context("an `auth` of it is no base64")?);
            let text = text.context("an `auth` of it is no text")?;
            let (user, password) = text
                .split_once(':')
                .context("an `auth` of it is not user:password")?;
            (user.to_owned(), password.to_owned())
        } else {
            (entry.username, entry.password)
        };
        let auth = AuthConfig {
            username,
            password,
            ..AuthConfig::default()
        };
        found.push((key(&registry), auth));
    }
    Ok(found)
}

/// A registry without scheme; `/v1/` and `/v2/` mean the whole host.
fn key(registry: &str) -> String {
    let plain = registry
        .strip_prefix("https://")
        .or_else(|| registry.strip_prefix("http://"))
        .unwrap_or(registry);
    let (host, path) = plain.split_once('/').unwrap_or((plain, ""));
    let path = format!("{path}/");
    let path = path
        .strip_prefix("v1/")
        .or_else(|| path.strip_prefix("v2/"))
        .unwrap_or(&path)
        .trim_matches('/');
    if path.is_empty() {
        host.to_owned()
    } else {
        format!("{host}/{path}")
    }
}

/// The entries that an image's name falls under; longer names come first.
fn matching(entries: &BTreeMap<String, Vec<AuthConfig>>, image: &str) -> Vec<AuthConfig> {
    let mut found: Vec<AuthConfig> = entries
        .iter()
        .rev()
        .filter(|(key, _)| covers(key, image))
        .flat_map(|(_, entries)| entries.clone())
        .collect();
    let first = image.split('/').next().unwrap_or_default();
    let hub = !image.contains('/')
        || ["docker.io", DOCKER_HUB].contains(&first)
        || !first.contains(['.', ':']) && first != "localhost";
    if hub {
        for auth in entries.get(DOCKER_HUB).into_iter().flatten() {
            if !found.contains(auth) {
                found.push(auth.clone());
            }
        }
    }
    found
}

/// Whether `host[:port][/path]`, with `*` in the parts of its host, is above an image.
fn covers(key: &str, image: &str) -> bool {
    let (key_host, key_path) = key.split_once('/').unwrap_or((key, ""));
    let (host, path) = image.split_once('/').unwrap_or((image, ""));
    let (key_name, key_port) = key_host.split_once(':').unwrap_or((key_host, ""));
    let (name, port) = host.split_once(':').unwrap_or((host, ""));
    let (wanted, given): (Vec<_>, Vec<_>) =
        (key_name.split('.').collect(), name.split('.').collect());
    key_port == port
        && wanted.len() == given.len()
        && wanted.iter().zip(&given).all(|(w, g)| fits(w, g))
        && path.starts_with(key_path)
}

/// `*` stands for any characters.
fn fits(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((head, tail)) => text.strip_prefix(head).is_some_and(|rest| {
            let ends = rest.char_indices().map(|(at, _)| at).chain([rest.len()]);
            ends.into_iter().any(|at| fits(tail, &rest[at..]))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(key: &str, json: serde_json::Value) -> Secret {
        let bytes = k8s_openapi::ByteString(json.to_string().into_bytes());
        Secret {
            data: Some([(key.to_owned(), bytes)].into()),
            ..Secret::default()
        }
    }

    #[test]
    fn both_kinds_of_secrets_are_read() {
        let auth = base64::engine::general_purpose::STANDARD.encode("me:se:cret");
        let new = secret(
            ".dockerconfigjson",
            serde_json::json!({"auths": {"https://index.docker.io/v1/": {"auth": auth}}}),
        );
        let read_new = read(&new).unwrap();
        assert_eq!(read_new[0].0, DOCKER_HUB);
        assert_eq!(
            (
                read_new[0].1.username.as_str(),
                read_new[0].1.password.as_str()
            ),
            ("me", "se:cret")
        );
        let old = secret(
            ".dockercfg",
            serde_json::json!({"r.io/team/": {"username": "u", "password": "p"}}),
        );
        assert_eq!(read(&old).unwrap()[0].0, "r.io/team");
        assert!(read(&secret("other", serde_json::json!({}))).is_err());
    }

    #[test]
    fn images_fall_under_hosts_paths_and_patterns() {
        for (key, image, wanted) in [
            ("r.io", "r.io/a/b:1", true),
            ("r.io/a", "r.io/a/b:1", true),
            ("r.io/b", "r.io/a/b:1", false),
            ("r.io:5000", "r.io/a", false),
            ("r.io:5000", "r.io:5000/a", true),
            ("*.r.io", "x.r.io/a", true),
            ("*.r.io", "x.y.r.io/a", false),
            ("pre*x.r.io", "pre-x.r.io/a", true),
            ("evil.io", "r.io/a", false),
        ] {
            assert_eq!(covers(key, image), wanted, "{key} {image}");
        }
        let named = |user: &str| AuthConfig {
            username: user.into(),
            ..AuthConfig::default()
        };
        let entries = BTreeMap::from([
            ("r.io".to_owned(), vec![named("host")]),
            ("r.io/a".to_owned(), vec![named("path")]),
            (DOCKER_HUB.to_owned(), vec![named("hub")]),
        ]);
        let users = |image: &str| -> Vec<String> {
            let found = matching(&entries, image);
            found.into_iter().map(|auth| auth.username).collect()
        };
        assert_eq!(users("r.io/a/b"), ["path", "host"]);
        assert_eq!(users("busybox"), ["hub"]);
        assert_eq!(users("docker.io/library/busybox"), ["hub"]);
        assert!(users("localhost/x").is_empty());
    }
}
