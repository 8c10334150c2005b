//! Pulls images by the OCI distribution protocol over HTTP and HTTPS.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;

use super::build::go_arch;
use super::reference::{Reference, check_digest};
use super::store::{ImageConfig, ImageRecord, ImageStore, chain_ids, sha256};
use super::unpack::ensure_layer;

/// A manifest or config larger than this is refused, in bytes.
const MAX_DOCUMENT: usize = 8 << 20;
/// A registry that sends nothing for this long is given up.
const STALL: Duration = Duration::from_secs(60);
const MAX_REDIRECTS: usize = 5;

const MANIFEST_TYPES: &str = "application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json";

/// Who pulls.
#[derive(Clone, Debug, Default)]
pub struct Auth {
    /// User name; empty for an anonymous pull.
    pub username: String,
    /// Password or token.
    pub password: String,
    /// A bearer token to send to the registry itself.
    pub registry_token: String,
}

/// How to pull.
#[derive(Clone, Debug, Default)]
pub struct PullOptions {
    /// Who pulls.
    pub auth: Auth,
    /// Registries spoken to over plain HTTP.
    pub insecure_registries: Vec<String>,
}

/// Why a pull failed.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The registry has no such image.
    #[error("{0}")]
    NotFound(String),
    /// The registry wants (other) credentials.
    #[error("{0}")]
    Denied(String),
    /// Anything else.
    #[error("{0:#}")]
    Other(#[from] anyhow::Error),
}

type Http = Client<HttpsConnector<HttpConnector>, Empty<Bytes>>;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    #[serde(default)]
    media_type: String,
    #[serde(default)]
    manifests: Vec<Descriptor>,
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
}

#[derive(Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    #[serde(default)]
    size: u64,
    platform: Option<Platform>,
}

#[derive(Clone, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

/// Pulls an image into the store; returns its record. Layers that are there
/// are not fetched again, and every byte that is fetched is checked against its
/// digest.
pub async fn pull(
    store: &ImageStore,
    name: &str,
    options: &PullOptions,
) -> Result<ImageRecord, PullError> {
    let reference = Reference::parse(name)?;
    let mut session = Session::new(&reference, options)?;
    let lock_of = store.clone();
    let _lock = tokio::task::spawn_blocking(move || lock_of.lock_shared())
        .await
        .context("the store's lock")??;

    let wanted = reference
        .digest
        .clone()
        .or_else(|| reference.tag.clone())
        .unwrap_or_default();
    let (top, top_digest) = session.manifest(&wanted).await?;
    let mut blobs = vec![(top_digest.clone(), top.clone())];
    let mut manifest = parse(&top)?;
    if !manifest.manifests.is_empty() {
        let chosen = manifest
            .manifests
            .iter()
            .find(|d| {
                d.platform
                    .as_ref()
                    .is_some_and(|p| p.os == "linux" && p.architecture == go_arch())
            })
            .with_context(|| format!("{name} has no image for linux/{}", go_arch()))?
            .clone();
        let (text, digest) = session.manifest(&chosen.digest).await?;
        manifest = parse(&text)?;
        blobs.push((digest, text));
    }
    let config = manifest.config.clone().with_context(|| {
        format!(
            "{name} is of type {:?}, which is not an image",
            manifest.media_type
        )
    })?;
    let config_text = session.document(&config.digest).await?;
    let image: ImageConfig = serde_json::from_slice(&config_text)
        .with_context(|| format!("the config of {name} is not readable"))?;
    if image.rootfs.diff_ids.len() != manifest.layers.len() {
        return Err(anyhow::anyhow!(
            "{name} is damaged: {} layers, but its config names {}",
            manifest.layers.len(),
            image.rootfs.diff_ids.len()
        )
        .into());
    }
    let chain = chain_ids(&image.rootfs.diff_ids)?;
    for (at, layer) in manifest.layers.iter().enumerate() {
        if store.layer_dir(&chain[at]).is_dir() {
            continue;
        }
        if layer.media_type.contains("nondistributable") || layer.media_type.contains("foreign") {
            return Err(
                anyhow::anyhow!("layer {} of {name} may not be distributed", layer.digest).into(),
            );
        }
        let scratch = store.scratch()?;
        let file = scratch.path().join("layer");
        session.blob(&layer.digest, layer.size, &file).await?;
        let (store, below, diff) = (
            store.clone(),
            chain[..=at].to_vec(),
            image.rootfs.diff_ids[at].clone(),
        );
        tokio::task::spawn_blocking(move || {
            let _keep = &scratch;
            ensure_layer(&store, &below, &diff, &file)
        })
        .await
        .context("unpacking a layer")?
        .with_context(|| format!("layer {} of {name}", layer.digest))?;
    }
    let size = manifest.layers.iter().map(|l| l.size).sum::<u64>() + config_text.len() as u64;
    let store = store.clone();
    let tags = match reference.digest {
        // A pull by digest says nothing about where a tag points.
        Some(_) => Vec::new(),
        None => reference.tagged().into_iter().collect(),
    };
    let digest_name = format!("{}@{top_digest}", reference.name());
    let record = tokio::task::spawn_blocking(move || {
        store.write_blob(&config.digest, &config_text)?;
        let mut names = Vec::new();
        for (digest, text) in &blobs {
            store.write_blob(digest, text)?;
            names.push(digest.clone());
        }
        store.record(ImageRecord {
            id: config.digest.clone(),
            tags,
            digests: vec![digest_name],
            size,
            chain,
            blobs: names,
        })
    })
    .await
    .context("recording the image")??;
    Ok(record)
}

fn parse(text: &[u8]) -> anyhow::Result<Manifest> {
    serde_json::from_slice(text).context("the registry's manifest is not readable")
}

struct Session {
    http: Http,
    reference: Reference,
    options: PullOptions,
    /// `https`, `http`; the ones still to try, the working one first.
    schemes: Vec<&'static str>,
    authorization: Option<String>,
}

impl Session {
    fn new(reference: &Reference, options: &PullOptions) -> anyhow::Result<Self> {
        let host = reference.api_host();
        let plain = options.insecure_registries.iter().any(|r| r == host);
        let local = {
            let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
            name == "localhost" || name.starts_with("127.") || name == "[::1]"
        };
        let schemes = match (plain, local) {
            (true, _) => vec!["http"],
            // As Docker does: nobody but this machine can be in between.
            (false, true) => vec!["https", "http"],
            _ => vec!["https"],
        };
        Ok(Self {
            http: client()?,
            reference: reference.clone(),
            options: options.clone(),
            schemes,
            authorization: None,
        })
    }

    async fn manifest(&mut self, wanted: &str) -> Result<(Bytes, String), PullError> {
        let path = format!("/v2/{}/manifests/{wanted}", self.reference.repository);
        let body = self.get(&path, MANIFEST_TYPES).await?;
        let text = collect(body).await?;
        let digest = sha256(&text);
        if wanted.starts_with("sha256:") && digest != wanted {
            return Err(anyhow::anyhow!(
                "manifest is corrupt: expected digest {wanted}, found {digest}"
            )
            .into());
        }
        Ok((text, digest))
    }

    async fn document(&mut self, digest: &str) -> Result<Bytes, PullError> {
        check_digest(digest)?;
        let path = format!("/v2/{}/blobs/{digest}", self.reference.repository);
        let text = collect(self.get(&path, "*/*").await?).await?;
        super::store::check_content(digest, &text)?;
        Ok(text)
    }

    async fn blob(&mut self, digest: &str, size: u64, to: &Path) -> Result<(), PullError> {
        check_digest(digest)?;
        let path = format!("/v2/{}/blobs/{digest}", self.reference.repository);
        let mut body = self.get(&path, "*/*").await?;
        let mut file = tokio::fs::File::create(to)
            .await
            .with_context(|| format!("cannot make {}", to.display()))?;
        let mut hash = Sha256::new();
        let mut got = 0u64;
        while let Some(frame) = tokio::time::timeout(STALL, body.frame())
            .await
            .context("the registry has stopped sending")?
        {
            let frame = frame.context("the connection to the registry broke")?;
            if let Some(data) = frame.data_ref() {
                got += data.len() as u64;
                // Don't let a registry fill the disk with more than it announced.
                if size > 0 && got > size {
                    return Err(anyhow::anyhow!(
                        "layer {digest} is corrupt: longer than its {size} bytes"
                    )
                    .into());
                }
                hash.update(data);
                file.write_all(data)
                    .await
                    .context("cannot write the layer")?;
            }
        }
        file.flush().await.context("cannot write the layer")?;
        let found = format!("sha256:{}", hex::encode(hash.finalize()));
        if found != digest {
            return Err(anyhow::anyhow!(
                "layer is corrupt: expected digest {digest}, found {found}"
            )
            .into());
        }
        Ok(())
    }

    /// GET with authentication and redirects; the answer's body.
    async fn get(&mut self, path: &str, accept: &str) -> Result<Incoming, PullError> {
        let mut asked_for_token = false;
        loop {
            let response = self.request(path, accept).await?;
            match response.status() {
                status if status.is_success() => return Ok(response.into_body()),
                StatusCode::UNAUTHORIZED if !asked_for_token => {
                    asked_for_token = true;
                    let challenge = response
                        .headers()
                        .get(header::WWW_AUTHENTICATE)
                        .and_then(|v| v.to_str().ok())
                        .unwrap_or_default()
                        .to_owned();
                    self.authorization = self.authorize(&challenge).await?;
                }
                status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
                    return Err(PullError::Denied(format!(
                        "pull access denied for {}, repository does not exist or may require authorization: registry answered {status}",
                        self.reference.name()
                    )));
                }
                StatusCode::NOT_FOUND => {
                    return Err(PullError::NotFound(format!(
                        "failed to resolve reference {:?}: {}: not found",
                        self.name(),
                        self.name()
                    )));
                }
                status => {
                    let text = collect(response.into_body()).await.unwrap_or_default();
                    return Err(anyhow::anyhow!(
                        "registry {} answered {status} to {path}: {}",
                        self.reference.registry,
                        String::from_utf8_lossy(&text[..text.len().min(300)])
                    )
                    .into());
                }
            }
        }
    }

    fn name(&self) -> String {
        match &self.reference.digest {
            Some(digest) => format!("{}@{digest}", self.reference.name()),
            None => self.reference.tagged().unwrap_or_default(),
        }
    }

    async fn request(
        &mut self,
        path: &str,
        accept: &str,
    ) -> anyhow::Result<http::Response<Incoming>> {
        let host = self.reference.api_host().to_owned();
        loop {
            let scheme = *self.schemes.first().context("no scheme is left to try")?;
            let mut uri: Uri = format!("{scheme}://{host}{path}").parse()?;
            let mut authorization = self.authorization.clone();
            let mut redirects = 0;
            let result = loop {
                match self.send(&uri, accept, authorization.as_deref()).await {
                    Ok(response) if response.status().is_redirection() => {
                        redirects += 1;
                        ensure!(redirects <= MAX_REDIRECTS, "too many redirects from {host}");
                        let next = target(&uri, &response)?;
                        ensure!(
                            !(uri.scheme_str() == Some("https")
                                && next.scheme_str() == Some("http")),
                            "registry {host} redirects from HTTPS to plain HTTP; refusing"
                        );
                        // Credentials are for the registry, not for its storage.
                        if next.authority() != uri.authority() {
                            authorization = None;
                        }
                        uri = next;
                    }
                    other => break other,
                }
            };
            match result {
                Ok(response) => {
                    self.schemes.truncate(1);
                    return Ok(response);
                }
                Err(err) if self.schemes.len() > 1 => {
                    tracing::debug!("{scheme} to {host} failed, trying the next: {err:#}");
                    self.schemes.remove(0);
                }
                Err(err) => return Err(err),
            }
        }
    }

    async fn send(
        &self,
        uri: &Uri,
        accept: &str,
        authorization: Option<&str>,
    ) -> anyhow::Result<http::Response<Incoming>> {
        let mut request = Request::builder()
            .method(Method::GET)
            .uri(uri)
            .header(
                header::USER_AGENT,
                concat!("xebec/", env!("CARGO_PKG_VERSION")),
            )
            .header(header::ACCEPT, accept);
        if let Some(value) = authorization {
            request = request.header(header::AUTHORIZATION, value);
        }
        let request = request.body(Empty::new())?;
        tokio::time::timeout(STALL, self.http.request(request))
            .await
            .with_context(|| format!("registry {} does not answer", self.reference.registry))?
            .map_err(|err| {
                // The client's own message hides the cause.
                let mut text = format!("cannot reach registry {}: {err}", self.reference.registry);
                let mut source = std::error::Error::source(&err);
                while let Some(cause) = source {
                    text.push_str(&format!(": {cause}"));
                    source = cause.source();
                }
                anyhow::anyhow!(text)
            })
    }

    /// What to send after a challenge: basic credentials, or a fetched token.
    async fn authorize(&self, challenge: &str) -> Result<Option<String>, PullError> {
        let auth = &self.options.auth;
        if !auth.registry_token.is_empty() {
            return Ok(Some(format!("Bearer {}", auth.registry_token)));
        }
        let basic = (!auth.username.is_empty()).then(|| {
            format!(
                "Basic {}",
                STANDARD.encode(format!("{}:{}", auth.username, auth.password))
            )
        });
        let (kind, fields) = parse_challenge(challenge);
        if kind.eq_ignore_ascii_case("basic") {
            return Ok(basic);
        }
        if !kind.eq_ignore_ascii_case("bearer") {
            return Err(
                anyhow::anyhow!("the registry asks for unknown authentication {kind:?}").into(),
            );
        }
        let field = |name: &str| {
            fields
                .iter()
                .find(|(key, _)| key == name)
                .map(|(_, value)| value.as_str())
        };
        let realm = field("realm").context("the registry's challenge names no realm")?;
        let scope = field("scope").map_or_else(
            || format!("repository:{}:pull", self.reference.repository),
            str::to_owned,
        );
        let mut url = format!(
            "{realm}{}scope={}",
            if realm.contains('?') { '&' } else { '?' },
            escape(&scope)
        );
        if let Some(service) = field("service") {
            url.push_str(&format!("&service={}", escape(service)));
        }
        if !auth.username.is_empty() {
            url.push_str(&format!("&account={}", escape(&auth.username)));
        }
        let uri: Uri = url.parse().context("the registry's realm is not a URL")?;
        let response = self
            .send(&uri, "application/json", basic.as_deref())
            .await?;
        if !response.status().is_success() {
            return Err(PullError::Denied(format!(
                "failed to authorize: the token service of {} answered {}",
                self.reference.registry,
                response.status()
            )));
        }
        #[derive(Deserialize)]
        struct Token {
            token: Option<String>,
            access_token: Option<String>,
        }
        let token: Token = serde_json::from_slice(&collect(response.into_body()).await?)
            .context("the token service's answer is not readable")?;
        let token = token
            .token
            .or(token.access_token)
            .context("the token service sent no token")?;
        Ok(Some(format!("Bearer {token}")))
    }
}

fn client() -> anyhow::Result<Http> {
    let mut roots = rustls::RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(found.certs);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("TLS is not available")?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_connect_timeout(Some(Duration::from_secs(20)));
    let https = hyper_rustls::HttpsConnectorBuilder::new()
        .with_tls_config(tls)
        .https_or_http()
        .enable_http1()
        .wrap_connector(tcp);
    Ok(Client::builder(TokioExecutor::new()).build(https))
}

async fn collect(body: Incoming) -> anyhow::Result<Bytes> {
    let limited = http_body_util::Limited::new(body, MAX_DOCUMENT);
    let whole = tokio::time::timeout(STALL, limited.collect())
        .await
        .context("the registry has stopped sending")?
        .map_err(|err| anyhow::anyhow!("cannot read the registry's answer: {err}"))?;
    Ok(whole.to_bytes())
}

fn target(from: &Uri, response: &http::Response<Incoming>) -> anyhow::Result<Uri> {
    let location = response
        .headers()
        .get(header::LOCATION)
        .and_then(|v| v.to_str().ok())
        .context("a redirect without a location")?;
    if location.starts_with('/') {
        let authority = from
            .authority()
            .map(ToString::to_string)
            .unwrap_or_default();
        return Ok(format!(
            "{}://{authority}{location}",
            from.scheme_str().unwrap_or("https")
        )
        .parse()?);
    }
    let uri: Uri = location
        .parse()
        .context("a redirect to something that is not a URL")?;
    if !matches!(uri.scheme_str(), Some("http" | "https")) {
        bail!("a redirect to {location:?}");
    }
    Ok(uri)
}

/// `Bearer realm="…",service="…"`: the scheme and its fields.
fn parse_challenge(text: &str) -> (String, Vec<(String, String)>) {
    let (kind, mut rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
    let mut fields = Vec::new();
    while let Some((key, after)) = rest.split_once('=') {
        let key = key.trim_matches([' ', ',']).to_ascii_lowercase();
        let (value, next) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => after.split_once(',').unwrap_or((after, "")),
        };
        fields.push((key, value.to_owned()));
        rest = next;
    }
    (kind.to_owned(), fields)
}

fn escape(text: &str) -> String {
    text.bytes()
        .map(|b| match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                (b as char).to_string()
            }
            _ => format!("%{b:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read() {
        let (kind, fields) = parse_challenge(
            r#"Bearer realm="https://auth.example.com/token",service="reg, istry",scope="repository:a/b:pull,push""#,
        );
        assert_eq!(kind, "Bearer");
        assert_eq!(fields[1], ("service".to_owned(), "reg, istry".to_owned()));
        assert_eq!(fields[2].1, "repository:a/b:pull,push");
        assert_eq!(parse_challenge("Basic realm=x").1[0].1, "x");
        assert_eq!(escape("a/b:c d"), "a%2Fb%3Ac%20d");
    }
}
