//! Ends sockets that are connected, through a Service, to a backend that is gone: their processes learn at once.

mod diag;
mod present;

pub(crate) use present::{Connection, connections};

use std::collections::HashSet;
use std::fs::File;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use diag::{Diag, Fate};

/// A backend, as sockets know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Backend {
    /// IP protocol number. TCP's and UDP's sockets are ended; the kernel ends no others.
    pub protocol: u8,
    /// Address.
    pub address: IpAddr,
    /// Port.
    pub port: u16,
}

/// Tells of a socket's cookie and its peer whether the socket got there through a Service.
pub type Translated<'a> = dyn Fn(u64, &Backend) -> bool + Send + Sync + 'a;

/// What one pass did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ended {
    /// TCP's sockets that were ended.
    pub tcp: usize,
    /// UDP's.
    pub udp: usize,
    /// Sockets to the backends that did not get there through a Service.
    pub spared: usize,
    /// Network namespaces that were looked through.
    pub namespaces: usize,
}

/// For so long further backends are waited for, so that many that go together cost one pass; and a socket that was
/// being connected when its backend went is connected by then.
const GATHER: Duration = Duration::from_millis(50);

/// Ends the sockets of backends that are told of as gone, until `shutdown` or until nobody can tell any more. A backend
/// must be told of after the maps stopped naming it. `namespaces` names those of the pods (`/proc/<pid>/ns/net` or
/// mounts of it); that of this process is always looked through.
pub async fn run<N: Future<Output = Vec<PathBuf>>>(
    mut gone: mpsc::UnboundedReceiver<Backend>,
    namespaces: impl Fn() -> N,
    translated: Arc<Translated<'static>>,
    shutdown: CancellationToken,
) -> Result<()> {
    loop {
        let first = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            first = gone.recv() => first,
        };
        let Some(first) = first else {
            return Ok(());
        };
        tokio::time::sleep(GATHER).await;
        let mut backends = HashSet::from([first]);
        while let Ok(next) = gone.try_recv() {
            backends.insert(next);
        }
        let (namespaces, translated) = (namespaces().await, translated.clone());
        let pass = move || end(&backends, &namespaces, &*translated);
        match tokio::task::spawn_blocking(pass).await {
            Ok(Ok(ended)) => debug!(?ended, "ended sockets to backends that are gone"),
            Ok(Err(error)) => {
                warn!("could not end sockets to backends that are gone: {error:#}");
            }
            Err(error) => warn!("could not end sockets to backends that are gone: {error}"),
        }
    }
}

/// Ends all such sockets now, on a thread that ends with the pass: whatever namespace it is in, no other work is.
pub fn end(
    gone: &HashSet<Backend>,
    namespaces: &[PathBuf],
    translated: &Translated<'_>,
) -> Result<Ended> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("sockets".into())
            .spawn_scoped(scope, || pass(gone, namespaces, translated))
            .context("could not start a thread")?;
        thread
            .join()
            .unwrap_or_else(|_| Err(anyhow!("the thread that ends sockets panicked")))
    })
}

fn pass(
    gone: &HashSet<Backend>,
    namespaces: &[PathBuf],
    translated: &Translated<'_>,
) -> Result<Ended> {
    let own = Path::new("/proc/thread-self/ns/net");
    let own = File::open(own).with_context(|| format!("could not open {}", own.display()))?;
    let mut ended = Ended::default();
    let mut seen = HashSet::from([number(&own)?]);
    end_in(&mut Diag::open()?, gone, translated, &mut ended)?;
    for path in namespaces {
        let namespace = match File::open(path) {
            Ok(namespace) => namespace,
            // The pod went meanwhile, and its sockets with it.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => {
                warn!(
                    "could not open the network namespace {}: {error}",
                    path.display()
                );
                continue;
            }
        };
        // Pods on the node's network are in its namespace.
        if !seen.insert(number(&namespace)?) {
            continue;
        }
        let outcome = Diag::open_in(&namespace, &own)
            .and_then(|mut diag| end_in(&mut diag, gone, translated, &mut ended));
        // What fails in one namespace need not fail in the others.
        if let Err(error) = outcome {
            warn!("could not end sockets in {}: {error:#}", path.display());
        }
    }
    Ok(ended)
}

/// What tells namespaces apart.
fn number(namespace: &File) -> Result<(u64, u64)> {
    let told = namespace
        .metadata()
        .context("could not look at a network namespace")?;
    Ok((told.dev(), told.ino()))
}

fn end_in(
    diag: &mut Diag,
    gone: &HashSet<Backend>,
    translated: &Translated<'_>,
    ended: &mut Ended,
) -> Result<()> {
    /// Said once, however often it happens.
    static UNSUPPORTED: AtomicBool = AtomicBool::new(false);
    static UNLISTED: AtomicBool = AtomicBool::new(false);
    ended.namespaces += 1;
    for protocol in [libc::IPPROTO_TCP, libc::IPPROTO_UDP] {
        let of_protocol = gone
            .iter()
            .filter(|one| i32::from(one.protocol) == protocol);
        let backends: Vec<Backend> = of_protocol.copied().collect();
        // A socket of IPv6 may be connected to an IPv4 address.
        let families = [
            (
                libc::AF_INET,
                backends.iter().any(|one| one.address.is_ipv4()),
            ),
            (libc::AF_INET6, !backends.is_empty()),
        ];
        for (family, _) in families.into_iter().filter(|(_, wanted)| *wanted) {
            let mut sockets = match diag.list(family, protocol as u8, &backends) {
                Ok(sockets) => sockets,
                Err(error) if is(&error, libc::ENOENT) => {
                    if !UNLISTED.swap(true, Ordering::Relaxed) {
                        warn!(
                            "this kernel does not list sockets of IP protocol {protocol} (CONFIG_INET_DIAG, CONFIG_INET_UDP_DIAG): those connected to backends that are gone stay until they time out"
                        );
                    }
                    continue;
                }
                Err(error) => return Err(error),
            };
            sockets.retain(|socket| gone.contains(&socket.peer()));
            let all = sockets.len();
            sockets.retain(|socket| translated(socket.cookie(), &socket.peer()));
            ended.spared += all - sockets.len();
            let fates = diag.end(&sockets)?;
            let count = fates.iter().filter(|fate| **fate == Fate::Ended).count();
            if protocol == libc::IPPROTO_TCP {
                ended.tcp += count;
            } else {
                ended.udp += count;
            }
            if fates.contains(&Fate::Unsupported) && !UNSUPPORTED.swap(true, Ordering::Relaxed) {
                warn!(
                    "this kernel ends no sockets (it is built without CONFIG_INET_DIAG_DESTROY): those connected to backends that are gone stay until they time out"
                );
            }
            let failed = fates.iter().find_map(|fate| match fate {
                Fate::Failed(error) => Some(std::io::Error::from_raw_os_error(*error)),
                _ => None,
            });
            if let Some(error) = failed {
                return Err(error).context("could not end a socket (it needs CAP_NET_ADMIN)");
            }
        }
    }
    Ok(())
}

fn is(error: &anyhow::Error, code: i32) -> bool {
    let found = error.downcast_ref::<std::io::Error>();
    found.and_then(std::io::Error::raw_os_error) == Some(code)
}
