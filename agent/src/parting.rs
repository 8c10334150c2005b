//! Parts UDP's flows and sockets from a backend that left their Service and is still another's: the very next datagram goes
//! to one that the Service has. Those of a backend that is gone altogether learn it from its generation, and need
//! nobody to tell them.

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::maps::parted::{Pairs, part};
use crate::sockets::{self, Backend};

/// A backend that left a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parted {
    /// Number of the Service's port.
    pub service: u32,
    /// The backend's number.
    pub number: u32,
    /// The backend.
    pub backend: Backend,
}

/// How long others are waited for after a pass, which looks at all flows.
const REST: Duration = Duration::from_millis(100);

/// Parts those that are told of until `shutdown`, or until nobody can tell any more. They must be told of after the maps
/// stopped naming the backend for the Service. `namespaces` names those of the pods.
pub async fn run<N: Future<Output = Vec<PathBuf>>>(
    mut told: mpsc::UnboundedReceiver<Parted>,
    namespaces: impl Fn() -> N,
    shutdown: CancellationToken,
) -> Result<()> {
    loop {
        let first = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            first = told.recv() => first,
        };
        let Some(first) = first else {
            return Ok(());
        };
        let mut all = vec![first];
        while let Ok(next) = told.try_recv() {
            all.push(next);
        }
        let namespaces = namespaces().await;
        let outcome = tokio::task::spawn_blocking(move || pass(&all, &namespaces)).await;
        match outcome.context("the pass ended early") {
            Ok(Ok((flows, ended))) => debug!(flows, ?ended, "parted from backends that left"),
            Ok(Err(error)) | Err(error) => {
                warn!("could not part datagrams from backends that left their Service: {error:#}");
            }
        }
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            () = tokio::time::sleep(REST) => {}
        }
    }
}

fn pass(all: &[Parted], namespaces: &[PathBuf]) -> Result<(usize, sockets::Ended)> {
    let pairs: Pairs = all.iter().map(|one| (one.service, one.number)).collect();
    let parted = part(&pairs)?;
    if parted.sockets.is_empty() {
        return Ok((parted.flows, sockets::Ended::default()));
    }
    let backends: HashSet<Backend> = all.iter().map(|one| one.backend).collect();
    let ended = sockets::end(&backends, namespaces, &|cookie, _| {
        parted.sockets.contains(&cookie)
    })?;
    Ok((parted.flows, ended))
}
