//! Container logs: the CRI log format, read from the end or the beginning and followed without polling.

use std::io::SeekFrom;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use bytes::Bytes;
use k8s_openapi::jiff::Timestamp;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::sync::mpsc;

/// What of a log is wanted (`PodLogOptions`).
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted {
    pub follow: bool,
    pub timestamps: bool,
    pub tail: Option<usize>,
    pub since: Option<Timestamp>,
    pub limit: Option<usize>,
}

/// One line as it goes out; none where it is older than wanted or no CRI log line.
fn render(line: &[u8], wanted: &Wanted) -> Option<Vec<u8>> {
    // `<RFC 3339 time> <stream> <tags> <content>`
    let mut parts = line.splitn(4, |byte| *byte == b' ');
    let (time, _stream, tags) = (parts.next()?, parts.next()?, parts.next()?);
    let content = parts.next().unwrap_or_default();
    if let Some(since) = wanted.since {
        let time: Timestamp = std::str::from_utf8(time).ok()?.parse().ok()?;
        if time < since {
            return None;
        }
    }
    let mut out = Vec::with_capacity(content.len() + 40);
    if wanted.timestamps {
        out.extend_from_slice(time);
        out.push(b' ');
    }
    out.extend_from_slice(content);
    // A partial line goes on in the next record.
    if !tags.split(|byte| *byte == b':').any(|tag| tag == b"P") {
        out.push(b'\n');
    }
    Some(out)
}

/// Where the last `lines` lines of a log begin.
fn tail_start(data: &[u8], lines: usize) -> usize {
    if lines == 0 {
        return data.len();
    }
    let end = data.strip_suffix(b"\n").unwrap_or(data).len();
    data[..end]
        .iter()
        .enumerate()
        .rev()
        .filter(|(_, byte)| **byte == b'\n')
        .nth(lines - 1)
        .map_or(0, |(at, _)| at + 1)
}

/// Sends a log; ends at its end, or when `ended` says that a followed container is over and all is read.
pub(crate) async fn send(
    path: PathBuf,
    wanted: Wanted,
    out: mpsc::Sender<Bytes>,
    mut ended: tokio::sync::watch::Receiver<bool>,
) -> Result<()> {
    let mut watch = if wanted.follow {
        Some(changes(&path)?)
    } else {
        None
    };
    let mut file = tokio::fs::File::open(&path)
        .await
        .with_context(|| format!("could not open {}", path.display()))?;
    let mut buffer = Vec::new();
    if let Some(lines) = wanted.tail {
        file.read_to_end(&mut buffer)
            .await
            .context("could not read the log")?;
        buffer.drain(..tail_start(&buffer, lines));
    }
    let mut left = wanted.limit.unwrap_or(usize::MAX);
    loop {
        let over = *ended.borrow();
        file.read_to_end(&mut buffer)
            .await
            .context("could not read the log")?;
        let mut batch = Vec::new();
        while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = buffer.drain(..=end).collect();
            batch.extend(render(&line[..end], &wanted).unwrap_or_default());
        }
        batch.truncate(left);
        left -= batch.len();
        if !batch.is_empty() && out.send(batch.into()).await.is_err() {
            return Ok(());
        }
        let Some(watch) = watch.as_mut().filter(|_| !over && left > 0) else {
            return Ok(());
        };
        tokio::select! {
            changed = next(watch) => changed?,
            _ = ended.changed() => {}
            () = out.closed() => return Ok(()),
        }
        // A rotated log begins anew under the same name.
        let position = file
            .stream_position()
            .await
            .context("could not read the log")?;
        let reopened = tokio::fs::File::open(&path).await;
        if let Ok(mut reopened) = reopened {
            use std::os::unix::fs::MetadataExt;
            let (old, new) = (
                file.metadata().await.context("could not read the log")?,
                reopened
                    .metadata()
                    .await
                    .context("could not read the log")?,
            );
            if old.ino() != new.ino() {
                file.read_to_end(&mut buffer)
                    .await
                    .context("could not read the log")?;
                file = reopened;
            } else if new.len() < position {
                reopened
                    .seek(SeekFrom::Start(0))
                    .await
                    .context("could not read the log")?;
                file = reopened;
            }
        }
    }
}

/// Changes in the log's folder: writes, and rotation.
fn changes(path: &Path) -> Result<AsyncFd<InotifyFd>> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)
        .context("could not watch the log")?;
    let dir = path.parent().unwrap_or(path);
    inotify
        .add_watch(
            dir,
            AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO,
        )
        .with_context(|| format!("could not watch {}", dir.display()))?;
    // SAFETY: `InotifyFd` owns its descriptor and gives the same one for as long as it lives.
    unsafe { AsyncFd::register(InotifyFd(inotify)) }.context("could not watch the log")
}

struct InotifyFd(Inotify);

impl AsFd for InotifyFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for InotifyFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

async fn next(watch: &mut AsyncFd<InotifyFd>) -> Result<()> {
    let mut guard = watch
        .readable_mut()
        .await
        .context("could not wait for the log")?;
    // What changed does not matter: the file is read to its end anyway.
    while guard.get_inner().0.read_events().is_ok() {}
    guard.clear_ready();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(content: &str, wanted: Wanted) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        std::fs::write(&path, content).unwrap();
        let (sender, mut receiver) = mpsc::channel(8);
        let (_ended, watch) = tokio::sync::watch::channel(true);
        send(path, wanted, sender, watch).await.unwrap();
        let mut out = Vec::new();
        while let Some(bytes) = receiver.recv().await {
            out.extend_from_slice(&bytes);
        }
        String::from_utf8(out).unwrap()
    }

    const LOG: &str = "2026-01-01T00:00:01.5Z stdout F one\n2026-01-01T00:00:02Z stderr P tw\n2026-01-01T00:00:02Z stderr F o\n2026-01-01T00:00:03Z stdout F \n";

    #[tokio::test]
    async fn lines_partial_lines_times_and_limits() {
        assert_eq!(read(LOG, Wanted::default()).await, "one\ntwo\n\n");
        assert_eq!(
            read(
                LOG,
                Wanted {
                    tail: Some(1),
                    ..Wanted::default()
                }
            )
            .await,
            "\n"
        );
        assert_eq!(
            read(
                LOG,
                Wanted {
                    tail: Some(0),
                    ..Wanted::default()
                }
            )
            .await,
            ""
        );
        assert_eq!(
            read(
                LOG,
                Wanted {
                    limit: Some(5),
                    ..Wanted::default()
                }
            )
            .await,
            "one\nt"
        );
        assert_eq!(
            read(
                LOG,
                Wanted {
                    timestamps: true,
                    tail: Some(2),
                    ..Wanted::default()
                }
            )
            .await,
            "2026-01-01T00:00:02Z o\n2026-01-01T00:00:03Z \n"
        );
        let since = Some("2026-01-01T00:00:03Z".parse().unwrap());
        assert_eq!(
            read(
                LOG,
                Wanted {
                    since,
                    ..Wanted::default()
                }
            )
            .await,
            "\n"
        );
    }

    #[tokio::test]
    async fn a_followed_log_goes_on_over_rotation_and_ends_with_its_container() {
        use std::io::Write;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        std::fs::write(&path, "2026-01-01T00:00:01Z stdout F one\n").unwrap();
        let (sender, mut receiver) = mpsc::channel(8);
        let (ended, watch) = tokio::sync::watch::channel(false);
        let task = tokio::spawn(send(
            path.clone(),
            Wanted {
                follow: true,
                ..Wanted::default()
            },
            sender,
            watch,
        ));
        assert_eq!(receiver.recv().await.unwrap(), "one\n");
        std::fs::OpenOptions::new()
            .append(true)
            .open(&path)
            .unwrap()
            .write_all(b"2026-01-01T00:00:01Z stdout F two\n")
            .unwrap();
        assert_eq!(receiver.recv().await.unwrap(), "two\n");
        std::fs::rename(&path, dir.path().join("0.log.1")).unwrap();
        std::fs::write(&path, "2026-01-01T00:00:01Z stdout F three\n").unwrap();
        assert_eq!(receiver.recv().await.unwrap(), "three\n");
        ended.send(true).unwrap();
        assert!(receiver.recv().await.is_none());
        task.await.unwrap().unwrap();
    }
}
