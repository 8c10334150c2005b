//! Mutual TLS for who reads flows from elsewhere: certificates from files, read anew when they change.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tracing::{debug, warn};

/// How long a client may take to prove who it is.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How many may prove it at a time.
const AT_ONCE: usize = 64;

/// Where certificates lie (PEM).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// The server's certificate, with those between it and its authority.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The authorities whose clients may read flows.
    pub client_cas: Vec<PathBuf>,
}

impl Files {
    /// When each file was changed.
    fn times(&self) -> Vec<Option<SystemTime>> {
        let files = [&self.cert, &self.key].into_iter().chain(&self.client_cas);
        files
            .map(|file| {
                std::fs::metadata(file)
                    .and_then(|data| data.modified())
                    .ok()
            })
            .collect()
    }

    fn read(&self) -> Result<TlsAcceptor> {
        let certificates = |path: &PathBuf| -> Result<Vec<CertificateDer<'static>>> {
            let found = CertificateDer::pem_file_iter(path)
                .and_then(|all| all.collect::<Result<Vec<_>, _>>())
                .with_context(|| format!("could not read certificates of {}", path.display()))?;
            ensure!(!found.is_empty(), "{} has no certificate", path.display());
            Ok(found)
        };
        let key = PrivateKeyDer::from_pem_file(&self.key)
            .with_context(|| format!("could not read the key of {}", self.key.display()))?;
        let mut roots = rustls::RootCertStore::empty();
        for path in &self.client_cas {
            for certificate in certificates(path)? {
                roots.add(certificate).with_context(|| {
                    format!("{} has no authority's certificate", path.display())
                })?;
            }
        }
        ensure!(
            !roots.is_empty(),
            "no authority of clients is named, so that nobody could read flows"
        );
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let clients =
            WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone()).build();
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .context("no version of TLS")?
            .with_client_cert_verifier(clients.context("the authorities of clients do not fit")?)
            .with_single_cert(certificates(&self.cert)?, key)
            .context("the server's certificate and its key do not fit")?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}

/// Certificates as they are in their files now.
struct Current {
    files: Files,
    times: Vec<Option<SystemTime>>,
    acceptor: TlsAcceptor,
}

impl Current {
    /// # Errors
    /// If a file can't be read, or is no certificate or key.
    fn read(files: Files) -> Result<Self> {
        let times = files.times();
        let acceptor = files.read()?;
        Ok(Self {
            files,
            times,
            acceptor,
        })
    }

    /// The newest ones; those from before while what is in the files does not fit, as in the middle of a change.
    fn acceptor(&mut self) -> TlsAcceptor {
        let times = self.files.times();
        if times != self.times {
            match self.files.read() {
                Ok(acceptor) => {
                    self.acceptor = acceptor;
                    self.times = times;
                }
                Err(error) => {
                    let error = format!("{error:#}");
                    warn!(
                        error,
                        "new certificates can't be used; those from before are"
                    );
                }
            }
        }
        self.acceptor.clone()
    }
}

/// Connections of clients that have proved who they are; ends when nobody takes them any more.
///
/// # Errors
/// If the certificates can't be used.
pub(crate) fn accept(
    listener: TcpListener,
    files: Files,
) -> Result<mpsc::Receiver<std::io::Result<TlsStream<TcpStream>>>> {
    let mut current = Current::read(files)?;
    let (sender, proved) = mpsc::channel(1);
    let room = Arc::new(tokio::sync::Semaphore::new(AT_ONCE));
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                () = sender.closed() => return,
                accepted = listener.accept() => accepted,
            };
            let (stream, client) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    warn!(%error, "could not accept who wants to read flows");
                    // No descriptor is left, perhaps.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Ok(place) = room.clone().try_acquire_owned() else {
                debug!(%client, "too many prove who they are at once");
                continue;
            };
            let (acceptor, sender) = (current.acceptor(), sender.clone());
            tokio::spawn(async move {
                let proved = tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await;
                drop(place);
                match proved {
                    Ok(Ok(stream)) => drop(sender.send(Ok(stream)).await),
                    Ok(Err(error)) => debug!(%client, %error, "a client may not read flows"),
                    Err(_) => debug!(%client, "a client did not prove who it is in time"),
                }
            });
        }
    });
    Ok(proved)
}
