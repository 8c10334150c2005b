//! Flows as lines of JSON in a file that is replaced when it is long.

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use file_rotate::compression::Compression;
use file_rotate::suffix::AppendCount;
use file_rotate::{ContentLimit, FileRotate};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tracing::warn;
use xebec_hubble::flow::FlowFilter;
use xebec_hubble::observer::{GetFlowsRequest, GetFlowsResponse};
use xebec_hubble::wkt::FieldMask;

use super::metrics::Lost;
use super::reader::Reader;
use super::{Flows, give_way};

/// How often it is said that nothing can be written.
const SAY_AGAIN: Duration = Duration::from_secs(60);

/// What is written where.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// The file; those before it are called so with `.1`, `.2` and so on.
    pub path: PathBuf,
    /// How long a file may be, bytes.
    pub longest: usize,
    /// How many are kept besides it.
    pub backups: usize,
    /// Whether those are compressed (gzip).
    pub compress: bool,
    /// Flows that one of these passes, or all where there is none.
    pub allow: Vec<FlowFilter>,
    /// But those that one of these passes.
    pub deny: Vec<FlowFilter>,
    /// Parts of flows that are written; none for all.
    pub fields: Vec<String>,
}

/// Writes until `shutdown`, on a thread of its own, which gives way to whom it observes.
///
/// # Errors
/// If the filters or fields can't be read, or the file can't be written when it begins.
pub(crate) async fn run(options: Options, flows: Flows, shutdown: CancellationToken) -> Result<()> {
    let asked = GetFlowsRequest {
        follow: true,
        whitelist: options.allow.clone(),
        blacklist: options.deny.clone(),
        field_mask: (!options.fields.is_empty()).then(|| FieldMask {
            paths: options.fields.clone(),
        }),
        ..GetFlowsRequest::default()
    };
    let reader = Reader::new(flows.clone(), &asked);
    let reader = reader.await.context("could not export flows")?;
    // The library would only say so by a panic.
    private()
        .open(&options.path)
        .with_context(|| format!("could not export flows to {}", options.path.display()))?;
    let (ends, ended) = oneshot::channel();
    std::thread::Builder::new()
        .name("export".to_owned())
        .spawn(move || {
            give_way();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .build()
                .context("could not start a runtime for the export of flows");
            let written = runtime.map(|one| one.block_on(write(options, reader, flows, shutdown)));
            // Nobody waits any more when the agent stops.
            let _ = ends.send(written);
        })
        .context("could not start a thread for the export of flows")?;
    ended.await.context("the export of flows panicked")?
}

/// How files are opened: who reads flows sees who talks to whom, so root alone.
fn private() -> std::fs::OpenOptions {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = std::fs::OpenOptions::new();
    options.read(true).create(true).append(true).mode(0o600);
    options
}

async fn write(options: Options, mut reader: Reader, flows: Flows, shutdown: CancellationToken) {
    let compression = if options.compress {
        Compression::OnRotate(0)
    } else {
        Compression::None
    };
    let mut file = FileRotate::new(
        &options.path,
        AppendCount::new(options.backups),
        ContentLimit::BytesSurpassed(options.longest),
        compression,
        Some(private()),
    );
    let mut said = None::<Instant>;
    let mut lines = Vec::new();
    loop {
        let first = tokio::select! {
            () = shutdown.cancelled() => return,
            first = reader.next() => first,
        };
        let Some(first) = first else { return };
        let mut count = 0;
        for answer in std::iter::once(first).chain(reader.ready()) {
            count += u64::from(line(&answer, &mut lines).is_ok());
        }
        if let Err(error) = file.write_all(&lines) {
            flows.metrics.count_lost(Lost::Export, count);
            if said.is_none_or(|said| said.elapsed() > SAY_AGAIN) {
                let path = options.path.display().to_string();
                warn!(path, %error, "flows are lost: they can't be written");
                said = Some(Instant::now());
            }
        }
        lines.clear();
    }
}

fn line(answer: &GetFlowsResponse, lines: &mut Vec<u8>) -> serde_json::Result<()> {
    let before = lines.len();
    let written = serde_json::to_writer(&mut *lines, answer);
    match written {
        Ok(()) => lines.push(b'\n'),
        Err(_) => lines.truncate(before),
    }
    written
}
