//! Container logs: the CRI log format, read from the end or the beginning and followed without polling.

use std::io::SeekFrom;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use bytes::Bytes;
use k8s_openapi::jiff::Timestamp;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::fs::File;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::sync::{mpsc, watch};

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

/// How much of a log is in memory at once.
const BLOCK: usize = 32 * 1024;
/// Runtimes split lines at 16 KiB; what is longer is no log and is passed on in pieces.
const LONGEST_LINE: usize = 1024 * 1024;

/// Where the last `lines` lines of a file begin; read from its end, block by block.
async fn tail_start(file: &mut File, lines: usize) -> std::io::Result<u64> {
    let length = file.metadata().await?.len();
    let (mut at, mut found) = (length, 0);
    let mut block = vec![0; BLOCK];
    while at > 0 && lines > 0 {
        let size = at.min(BLOCK as u64) as usize;
        at -= size as u64;
        file.seek(SeekFrom::Start(at)).await?;
        file.read_exact(&mut block[..size]).await?;
        for (index, _) in block[..size]
            .iter()
            .enumerate()
            .rev()
            .filter(|(_, byte)| **byte == b'\n')
        {
            let next = at + index as u64 + 1;
            // The line end at the very end closes the last line, it does not begin another.
            found += usize::from(next != length);
            if found == lines && next != length {
                return Ok(next);
            }
        }
    }
    Ok(if lines == 0 { length } else { 0 })
}

/// A log that is open, and what of it is wanted.
pub(crate) struct Log {
    path: PathBuf,
    wanted: Wanted,
    file: File,
    watch: Option<AsyncFd<InotifyFd>>,
    /// The line that is not complete yet.
    pending: Vec<u8>,
    left: usize,
}

impl Log {
    /// Opens a log where the wanted part begins.
    pub(crate) async fn open(path: PathBuf, wanted: Wanted) -> Result<Self> {
        let watch = if wanted.follow {
            Some(changes(&path)?)
        } else {
            None
        };
        let mut file = File::open(&path)
            .await
            .with_context(|| format!("could not open {}", path.display()))?;
        if let Some(lines) = wanted.tail {
            let start = tail_start(&mut file, lines).await;
            let start = start.context("could not read the log")?;
            file.seek(SeekFrom::Start(start))
                .await
                .context("could not read the log")?;
        }
        Ok(Self {
            path,
            left: wanted.limit.unwrap_or(usize::MAX),
            wanted,
            file,
            watch,
            pending: Vec::new(),
        })
    }

    /// Sends the log; ends at its end, or when `ended` says that a followed container is over and all is read.
    pub(crate) async fn send(
        mut self,
        out: mpsc::Sender<Bytes>,
        mut ended: watch::Receiver<bool>,
    ) -> Result<()> {
        loop {
            // Asked before reading: what was written before the end is read.
            let over = *ended.borrow_and_update();
            if !self.drain(&out).await? {
                return Ok(());
            }
            if let Some(rotated) = self.rotated().await? {
                if !self.drain(&out).await? {
                    return Ok(());
                }
                self.file = rotated;
                continue;
            }
            let Some(watch) = self.watch.as_mut().filter(|_| !over) else {
                return Ok(());
            };
            tokio::select! {
                changed = next(watch) => changed?,
                told = ended.changed() => {
                    // Nobody is left to tell of the end: better a log that ends than one that hangs.
                    if told.is_err() && !*ended.borrow() {
                        self.drain(&out).await?;
                        return Ok(());
                    }
                }
                () = out.closed() => return Ok(()),
            }
        }
    }

    /// Sends what there is up to the end of the file; false when no more is wanted.
    async fn drain(&mut self, out: &mpsc::Sender<Bytes>) -> Result<bool> {
        let mut block = vec![0; BLOCK];
        loop {
            let size = self.file.read(&mut block).await;
            let size = size.context("could not read the log")?;
            if size == 0 {
                return Ok(true);
            }
            let mut batch = Vec::new();
            let mut rest = &block[..size];
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                let line = if self.pending.is_empty() {
                    render(&rest[..end], &self.wanted)
                } else {
                    self.pending.extend_from_slice(&rest[..end]);
                    let line = render(&self.pending, &self.wanted);
                    self.pending.clear();
                    line
                };
                batch.extend(line.unwrap_or_default());
                rest = &rest[end + 1..];
            }
            self.pending.extend_from_slice(rest);
            if self.pending.len() > LONGEST_LINE {
                batch.append(&mut self.pending);
            }
            batch.truncate(self.left);
            self.left -= batch.len();
            if !batch.is_empty() && out.send(batch.into()).await.is_err() || self.left == 0 {
                return Ok(false);
            }
        }
    }

    /// The file that has taken the log's name since it was opened, or the same one where it was cut.
    async fn rotated(&mut self) -> Result<Option<File>> {
        use std::os::unix::fs::MetadataExt;
        if self.watch.is_none() {
            return Ok(None);
        }
        let Ok(found) = File::open(&self.path).await else {
            return Ok(None);
        };
        let at = self.file.stream_position().await;
        let (at, old, new) = (at, self.file.metadata().await, found.metadata().await);
        let (at, old, new) = (
            at.context("could not read the log")?,
            old.context("could not read the log")?,
            new.context("could not read the log")?,
        );
        Ok((old.ino() != new.ino() || new.len() < at).then_some(found))
    }
}

/// The last lines of a log as text, at most `bytes` of it.
pub(crate) async fn last(path: &Path, lines: usize, bytes: usize) -> Result<String> {
    let wanted = Wanted {
        tail: Some(lines),
        ..Wanted::default()
    };
    let log = Log::open(path.to_path_buf(), wanted).await?;
    let (sender, mut receiver) = mpsc::channel(4);
    let (_, ended) = watch::channel(true);
    let send = log.send(sender, ended);
    let read = async {
        let mut all = Vec::new();
        while let Some(part) = receiver.recv().await {
            all.extend_from_slice(&part);
            let extra = all.len().saturating_sub(bytes);
            all.drain(..extra);
        }
        all
    };
    let (sent, all) = tokio::join!(send, read);
    sent?;
    Ok(String::from_utf8_lossy(&all).into_owned())
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
        let log = Log::open(path, wanted).await.unwrap();
        tokio::spawn(log.send(sender, watch));
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
        let log = Log::open(path.clone(), following()).await.unwrap();
        let task = tokio::spawn(log.send(sender, watch));
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

    fn following() -> Wanted {
        Wanted {
            follow: true,
            ..Wanted::default()
        }
    }

    #[tokio::test]
    async fn a_followed_log_ends_when_nobody_can_tell_of_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        std::fs::write(&path, "2026-01-01T00:00:01Z stdout F one\n").unwrap();
        let (sender, mut receiver) = mpsc::channel(8);
        let (ended, watch) = tokio::sync::watch::channel(false);
        let log = Log::open(path, following()).await.unwrap();
        let task = tokio::spawn(log.send(sender, watch));
        assert_eq!(receiver.recv().await.unwrap(), "one\n");
        drop(ended);
        let limit = std::time::Duration::from_secs(5);
        tokio::time::timeout(limit, task)
            .await
            .expect("it must end")
            .unwrap()
            .unwrap();
    }

    #[tokio::test]
    async fn large_logs_are_read_block_by_block() {
        let line = |n: usize| format!("2026-01-01T00:00:01Z stdout F {n} {}\n", "x".repeat(n % 97));
        let log: String = (0..20_000).map(line).collect();
        let plain = |range: std::ops::Range<usize>| -> String {
            range
                .map(|n| format!("{n} {}\n", "x".repeat(n % 97)))
                .collect()
        };
        assert_eq!(read(&log, Wanted::default()).await, plain(0..20_000));
        for lines in [1, 2, 999, 5_000, 19_999, 20_000, 30_000] {
            let tail = Some(lines);
            let got = read(
                &log,
                Wanted {
                    tail,
                    ..Wanted::default()
                },
            )
            .await;
            assert_eq!(got, plain(20_000 - lines.min(20_000)..20_000), "{lines}");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        std::fs::write(&path, &log).unwrap();
        let text = last(&path, 80, 2048).await.unwrap();
        assert_eq!(text.len(), 2048);
        assert!(plain(0..20_000).ends_with(&text));
    }
}
