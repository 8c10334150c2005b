//! Writes container output in the CRI log format: `<time> <stream> <P|F> <text>`.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// A line longer than this is cut into parts tagged `P`, the last one `F`.
const MAX_LINE: usize = 16 * 1024;

/// The log of one container.
pub struct LogFile {
    path: PathBuf,
    file: File,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

/// Which stream a piece of output came from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Stream {
    /// Standard output, or a terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

impl LogFile {
    /// Opens (or makes) the log; its directory is made as well.
    pub fn open(path: &Path) -> io::Result<Self> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        Ok(Self {
            path: path.to_owned(),
            file: open_append(path)?,
            stdout: Vec::new(),
            stderr: Vec::new(),
        })
    }

    /// Opens the path anew, so that a rotated file is left behind.
    pub fn reopen(&mut self) -> io::Result<()> {
        self.file = open_append(&self.path)?;
        Ok(())
    }

    /// Takes output as it was read; whole lines are written at once.
    pub fn write(&mut self, stream: Stream, data: &[u8]) -> io::Result<()> {
        let (rest, name) = match stream {
            Stream::Stdout => (&mut self.stdout, "stdout"),
            Stream::Stderr => (&mut self.stderr, "stderr"),
        };
        let mut out = Vec::with_capacity(data.len() + 64);
        let stamp = timestamp(SystemTime::now());
        for part in data.split_inclusive(|b| *b == b'\n') {
            rest.extend_from_slice(part);
            let whole = rest.last() == Some(&b'\n');
            if whole {
                rest.pop();
            }
            while rest.len() > MAX_LINE {
                line(&mut out, &stamp, name, 'P', &rest[..MAX_LINE]);
                rest.drain(..MAX_LINE);
            }
            if whole {
                line(&mut out, &stamp, name, 'F', rest);
                rest.clear();
            }
        }
        if rest.is_empty() && rest.capacity() > MAX_LINE {
            rest.shrink_to_fit();
        }
        self.file.write_all(&out)
    }

    /// Writes what is left without a line end; call when the process has ended.
    pub fn finish(&mut self) -> io::Result<()> {
        let mut out = Vec::new();
        let stamp = timestamp(SystemTime::now());
        for (rest, name) in [(&mut self.stdout, "stdout"), (&mut self.stderr, "stderr")] {
            if !rest.is_empty() {
                line(&mut out, &stamp, name, 'F', rest);
                rest.clear();
            }
        }
        self.file.write_all(&out)
    }
}

fn open_append(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o640)
        .open(path)
}

fn line(out: &mut Vec<u8>, stamp: &str, stream: &str, tag: char, text: &[u8]) {
    out.extend_from_slice(stamp.as_bytes());
    out.extend_from_slice(format!(" {stream} {tag} ").as_bytes());
    out.extend_from_slice(text);
    out.push(b'\n');
}

/// RFC 3339 with nanoseconds, in UTC.
pub fn timestamp(at: SystemTime) -> String {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (secs, nanos) = (since.as_secs(), since.subsec_nanos());
    let (days, rest) = (secs / 86_400, secs % 86_400);
    // Years are counted from March, so that the leap day is a year's last day.
    let z = days + 719_468;
    let era = z / 146_097;
    let doe = z % 146_097;
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{nanos:09}Z",
        rest / 3600,
        rest % 3600 / 60,
        rest % 60
    )
}

/// Nanoseconds since 1970, the unit of CRI timestamps.
pub fn now_nanos() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_nanos() as i64
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn lines(path: &Path) -> Vec<String> {
        std::fs::read_to_string(path)
            .unwrap()
            .lines()
            .map(|l| l.split_once(' ').unwrap().1.to_owned())
            .collect()
    }

    #[test]
    fn timestamps_are_rfc3339() {
        for (secs, text) in [
            (0, "1970-01-01T00:00:00.000000005Z"),
            (951_782_399, "2000-02-28T23:59:59.000000005Z"),
            (951_782_400, "2000-02-29T00:00:00.000000005Z"),
            (951_868_800, "2000-03-01T00:00:00.000000005Z"),
            (1_795_231_462, "2026-11-21T03:24:22.000000005Z"),
        ] {
            assert_eq!(timestamp(UNIX_EPOCH + Duration::new(secs, 5)), text);
        }
    }

    #[test]
    fn lines_are_joined_across_reads_and_streams_kept_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/er/0.log");
        let mut log = LogFile::open(&path).unwrap();
        log.write(Stream::Stdout, b"one\ntw").unwrap();
        log.write(Stream::Stderr, b"err\n").unwrap();
        log.write(Stream::Stdout, b"o\n\nlast").unwrap();
        log.finish().unwrap();
        assert_eq!(
            lines(&path),
            [
                "stdout F one",
                "stderr F err",
                "stdout F two",
                "stdout F ",
                "stdout F last"
            ]
        );
    }

    #[test]
    fn long_lines_are_cut_in_parts_and_lose_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let mut log = LogFile::open(&path).unwrap();
        let long = vec![b'x'; MAX_LINE * 2 + 5];
        log.write(Stream::Stdout, &long).unwrap();
        log.write(Stream::Stdout, b"\n").unwrap();
        let got = lines(&path);
        assert_eq!(got.len(), 3);
        assert!(got[0].starts_with("stdout P x") && got[1].starts_with("stdout P x"));
        assert_eq!(got[2], "stdout F xxxxx");
        let total: usize = got.iter().map(|l| l.len() - "stdout P ".len()).sum();
        assert_eq!(total, long.len());
    }

    #[test]
    fn reopen_leaves_the_rotated_file_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let mut log = LogFile::open(&path).unwrap();
        log.write(Stream::Stdout, b"old\n").unwrap();
        std::fs::rename(&path, dir.path().join("0.log.1")).unwrap();
        log.reopen().unwrap();
        log.write(Stream::Stdout, b"new\n").unwrap();
        assert_eq!(lines(&path), ["stdout F new"]);
        assert_eq!(lines(&dir.path().join("0.log.1")), ["stdout F old"]);
    }
}
