//! Image names: `[registry/]path[:tag][@digest]`, with Docker's defaults.

use anyhow::{bail, ensure};

/// A parsed image name.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Reference {
    /// Registry host, with a port if one is given.
    pub registry: String,
    /// Repository path within the registry.
    pub repository: String,
    /// Tag; `latest` when neither tag nor digest is given.
    pub tag: Option<String>,
    /// Digest, `sha256:<hex>`.
    pub digest: Option<String>,
}

impl Reference {
    /// Parses a name as users write it.
    pub fn parse(name: &str) -> anyhow::Result<Self> {
        ensure!(!name.is_empty(), "the image name is empty");
        let (rest, digest) = match name.split_once('@') {
            Some((rest, digest)) => {
                check_digest(digest)?;
                (rest, Some(digest.to_owned()))
            }
            None => (name, None),
        };
        let (path, tag) = match rest.rsplit_once(':') {
            // A colon before a slash is a registry's port.
            Some((path, tag)) if !tag.contains('/') => {
                ensure!(
                    !tag.is_empty()
                        && tag.len() <= 128
                        && tag
                            .bytes()
                            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
                        && !tag.starts_with(['.', '-']),
                    "invalid tag {tag:?} in image name {name:?}"
                );
                (path, Some(tag.to_owned()))
            }
            _ => (rest, None),
        };
        let (registry, repository) = match path.split_once('/') {
            Some((host, path))
                if host == "localhost"
                    || (host.contains(['.', ':'])
                        && host.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '[')) =>
            {
                (host.to_owned(), path.to_owned())
            }
            Some(_) => ("docker.io".to_owned(), path.to_owned()),
            None => ("docker.io".to_owned(), format!("library/{path}")),
        };
        let valid = |part: &str| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b))
                && part.as_bytes()[0].is_ascii_alphanumeric()
        };
        if !repository.split('/').all(valid) {
            bail!(
                "invalid image name {name:?}: repository names are lowercase letters, digits and '._-'"
            );
        }
        let tag = match (&tag, &digest) {
            (None, None) => Some("latest".to_owned()),
            _ => tag,
        };
        Ok(Self {
            registry,
            repository,
            tag,
            digest,
        })
    }

    /// `registry/repository`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// `registry/repository:tag`, if there is a tag.
    pub fn tagged(&self) -> Option<String> {
        self.tag.as_ref().map(|t| format!("{}:{t}", self.name()))
    }

    /// The host that serves this registry's API.
    pub fn api_host(&self) -> &str {
        match self.registry.as_str() {
            "docker.io" => "registry-1.docker.io",
            host => host,
        }
    }
}

/// Accepts `sha256:` and 64 lowercase hex digits, and returns the digits.
pub fn check_digest(digest: &str) -> anyhow::Result<&str> {
    match digest.strip_prefix("sha256:") {
        Some(hex)
            if hex.len() == 64
                && hex
                    .bytes()
                    .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) =>
        {
            Ok(hex)
        }
        _ => bail!("invalid or unsupported digest {digest:?}: expected sha256:<64 hex digits>"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_get_dockers_defaults() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (name, full, tag) in [
            ("busybox", "docker.io/library/busybox", Some("latest")),
            ("a/b:1.2", "docker.io/a/b", Some("1.2")),
            ("localhost/x", "localhost/x", Some("latest")),
            ("127.0.0.1:5000/x/y:v1", "127.0.0.1:5000/x/y", Some("v1")),
            (
                "registry.k8s.io/pause",
                "registry.k8s.io/pause",
                Some("latest"),
            ),
            (&format!("q.io/x@{digest}"), "q.io/x", None),
            (&format!("q.io/x:t@{digest}"), "q.io/x", Some("t")),
        ] {
            let r = Reference::parse(name).unwrap();
            assert_eq!(r.name(), full, "{name}");
            assert_eq!(r.tag.as_deref(), tag, "{name}");
        }
    }

    #[test]
    fn bad_names_are_refused() {
        for name in [
            "",
            "UPPER",
            "a//b",
            "x:",
            "x@sha256:12",
            "../x",
            "a b",
            "x:-t",
            "x/../y",
        ] {
            assert!(Reference::parse(name).is_err(), "{name:?}");
        }
    }
}
