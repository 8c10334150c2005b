//! What resolvers answered, kept in a file: an agent that starts again must not cut connections to names that pods asked
//! for before.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tracing::warn;
use xebec_policy::domains::{Domains, Told};

/// Lines that the file may have beyond those that say something new, before it is written anew.
const SPARE: usize = 4_096;

/// A line of the file.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    name: String,
    address: IpAddr,
    until: u64,
}

/// The file.
pub(super) struct Kept {
    path: PathBuf,
    file: File,
    lines: usize,
    failed: bool,
}

/// What a file said.
pub(super) type Before = BTreeMap<String, Vec<Told>>;

impl Kept {
    /// Opens the file of a folder, and gives what it says. A line that can't be read, as a crash of the machine may leave
    /// it, says nothing.
    pub fn open(folder: &Path) -> Result<(Self, Before)> {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("could not make {}", folder.display()))?;
        let path = folder.join("domains.jsonl");
        let mut before = Before::new();
        match File::open(&path) {
            Ok(file) => {
                for line in BufReader::new(file).split(b'\n') {
                    let line =
                        line.with_context(|| format!("could not read {}", path.display()))?;
                    if let Ok(line) = serde_json::from_slice::<Line>(&line) {
                        before.entry(line.name).or_default().push(Told {
                            address: line.address,
                            until: line.until,
                        });
                    }
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error).with_context(|| format!("could not read {}", path.display()));
            }
        }
        let lines = before.iter().map(|(name, told)| (name.as_str(), &told[..]));
        let (file, lines) =
            write(&path, lines).with_context(|| format!("could not write {}", path.display()))?;
        let kept = Self {
            path,
            file,
            lines,
            failed: false,
        };
        Ok((kept, before))
    }

    /// Adds what a name was told to be. It need not survive the machine, whose connections do not either, but this process.
    pub fn add(&mut self, name: &str, told: &[Told]) {
        let written = lines(name, told).and_then(|text| self.file.write_all(&text));
        self.lines += told.len();
        self.warn(written);
    }

    /// Writes the file anew if most of it is old.
    pub fn tidy(&mut self, domains: &Domains) {
        if self.lines < SPARE {
            return;
        }
        let all: Vec<_> = domains.all().collect();
        let count: usize = all.iter().map(|(_, told)| told.len()).sum();
        if self.lines < 2 * count + SPARE {
            return;
        }
        let all = all.iter().map(|(name, told)| (&***name, &told[..]));
        match write(&self.path, all) {
            Ok((file, lines)) => {
                self.file = file;
                self.lines = lines;
            }
            Err(error) => self.warn(Err(error)),
        }
    }

    fn warn(&mut self, outcome: std::io::Result<()>) {
        match outcome {
            Ok(()) => self.failed = false,
            // Said once for each time.
            Err(error) if !std::mem::replace(&mut self.failed, true) => warn!(
                %error,
                "names of domains are not kept in {}: connections to them may end when the agent starts again",
                self.path.display()
            ),
            Err(_) => {}
        }
    }
}

fn lines(name: &str, told: &[Told]) -> std::io::Result<Vec<u8>> {
    let mut text = Vec::new();
    for one in told {
        let line = Line {
            name: name.to_owned(),
            address: one.address,
            until: one.until,
        };
        serde_json::to_writer(&mut text, &line)?;
        text.push(b'\n');
    }
    Ok(text)
}

/// Writes a file in the place of another, and opens it for more.
fn write<'a>(
    path: &Path,
    all: impl Iterator<Item = (&'a str, &'a [Told])>,
) -> std::io::Result<(File, usize)> {
    let (mut text, mut count) = (Vec::new(), 0);
    for (name, told) in all {
        text.extend(lines(name, told)?);
        count += told.len();
    }
    let temporary = path.with_extension("tmp");
    std::fs::write(&temporary, text)?;
    std::fs::rename(&temporary, path)?;
    Ok((OpenOptions::new().append(true).open(path)?, count))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(last: u8, until: u64) -> Told {
        Told {
            address: IpAddr::from([192, 0, 2, last]),
            until,
        }
    }

    #[test]
    fn what_was_added_is_there_the_next_time() {
        let folder = tempfile::tempdir().unwrap();
        let (mut kept, before) = Kept::open(folder.path()).unwrap();
        assert!(before.is_empty());
        kept.add("a.example", &[told(1, 10), told(2, 20)]);
        kept.add("b.example", &[told(1, 30)]);
        // A crash in the middle of a line.
        kept.file.write_all(b"{\"name\": \"c.ex").unwrap();
        let (_, before) = Kept::open(folder.path()).unwrap();
        assert_eq!(before["a.example"], [told(1, 10), told(2, 20)]);
        assert_eq!(before.len(), 2);
    }

    #[test]
    fn the_file_does_not_grow_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let (mut kept, _) = Kept::open(folder.path()).unwrap();
        let mut domains = Domains::default();
        for until in 0..2 * SPARE as u64 {
            kept.add("a.example", &[told(1, until)]);
            domains.learn("a.example", &[told(1, until)], |_| true);
            kept.tidy(&domains);
        }
        assert!(kept.lines < SPARE + 2, "{}", kept.lines);
        kept.add("b.example", &[told(9, 5)]);
        let (_, before) = Kept::open(folder.path()).unwrap();
        let last = before["a.example"].last();
        assert_eq!(last, Some(&told(1, 2 * SPARE as u64 - 1)));
        assert_eq!(before["b.example"], [told(9, 5)]);
    }
}
