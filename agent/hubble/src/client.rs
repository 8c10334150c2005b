//! Reaching servers of Hubble's API.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

/// A server.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Server {
    /// A UNIX socket.
    Unix(PathBuf),
    /// `HOST:PORT`, and whether its name asks for TLS.
    Tcp(String, bool),
}

/// How a server proves who it is, and we to it (PEM).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tls {
    /// The authorities of servers.
    pub cas: Vec<PathBuf>,
    /// Our certificate and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The name in the server's certificate, where it is not that of its address.
    pub server_name: Option<String>,
}

impl Tls {
    fn config(&self) -> Result<ClientTlsConfig> {
        let read = |path: &PathBuf| {
            std::fs::read(path).with_context(|| format!("could not read {}", path.display()))
        };
        ensure!(
            !self.cas.is_empty(),
            "no authority of servers is named (--tls-ca-cert-files): it could be anybody"
        );
        let mut config = ClientTlsConfig::new();
        for path in &self.cas {
            config = config.ca_certificate(Certificate::from_pem(read(path)?));
        }
        if let Some((cert, key)) = &self.identity {
            config = config.identity(Identity::from_pem(read(cert)?, read(key)?));
        }
        if let Some(name) = &self.server_name {
            config = config.domain_name(name);
        }
        Ok(config)
    }
}

impl Server {
    /// Reads `unix:///run/xebec/hubble.sock`, `HOST:PORT` or `tls://HOST:PORT`.
    ///
    /// # Errors
    /// If it is none of these.
    pub fn parse(text: &str) -> Result<Self> {
        if let Some(path) = text.strip_prefix("unix://") {
            return Ok(Self::Unix(path.into()));
        }
        let (address, tls) = match text.strip_prefix("tls://") {
            Some(address) => (address, true),
            None => (text.strip_prefix("tcp://").unwrap_or(text), false),
        };
        let port = address
            .rsplit_once(':')
            .map(|(_, port)| port.parse::<u16>());
        match port {
            Some(Ok(_)) => Ok(Self::Tcp(address.to_owned(), tls)),
            _ => bail!("{text:?} is neither HOST:PORT nor tls://HOST:PORT nor unix:///PATH"),
        }
    }

    /// Connects; by TLS if the server's name says so or `tls` is there.
    ///
    /// # Errors
    /// If nobody answers, or the one who does is not the one who is asked for.
    pub async fn connect(&self, tls: Option<&Tls>) -> Result<Channel> {
        match self {
            Self::Unix(path) => {
                let path = path.clone();
                // The name is for the HTTP header alone.
                Endpoint::from_static("http://localhost")
                    .connect_with_connector(tower::service_fn(move |_| {
                        let path = path.clone();
                        async move { UnixStream::connect(path).await.map(TokioIo::new) }
                    }))
                    .await
            }
            Self::Tcp(address, asks) => {
                let scheme = if *asks || tls.is_some() {
                    "https"
                } else {
                    "http"
                };
                let mut endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))
                    .with_context(|| format!("{address:?} is no address"))?;
                if scheme == "https" {
                    let config = tls.cloned().unwrap_or_default().config()?;
                    endpoint = endpoint
                        .tls_config(config)
                        .context("the certificates can't be used")?;
                }
                endpoint
                    .connect_timeout(std::time::Duration::from_secs(5))
                    .connect()
                    .await
            }
        }
        .with_context(|| format!("could not connect to {self}"))
    }
}

impl std::fmt::Display for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(address, _) => f.write_str(address),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_sockets_or_addresses() {
        let unix = Server::parse("unix:///run/xebec/hubble.sock").unwrap();
        assert_eq!(unix.to_string(), "unix:///run/xebec/hubble.sock");
        for (text, tls) in [
            ("localhost:4245", false),
            ("tcp://localhost:4245", false),
            ("tls://localhost:4245", true),
        ] {
            let tcp = Server::Tcp("localhost:4245".to_owned(), tls);
            assert_eq!(Server::parse(text).unwrap(), tcp);
        }
        for text in ["", "localhost", "localhost:x", "[::1]"] {
            assert!(Server::parse(text).is_err(), "{text}");
        }
    }

    #[tokio::test]
    async fn who_can_not_be_reached_is_named() {
        let nobody = Server::parse("unix:///nowhere.sock").unwrap();
        let error = format!("{:#}", nobody.connect(None).await.unwrap_err());
        assert!(error.contains("unix:///nowhere.sock"), "{error}");
        let anybody = Server::parse("tls://localhost:1").unwrap();
        let error = format!("{:#}", anybody.connect(None).await.unwrap_err());
        assert!(error.contains("--tls-ca-cert-files"), "{error}");
    }
}
