//! The file that the log is appended to, behind a trait so that tests can make it fail.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;

/// An append-only file. After an error the content past the last synced length is unknown, until `truncate`.
pub(crate) trait LogFile: Send {
    /// Appends all bytes, or fails; a failure may leave a part of them.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Returns once everything appended is on the disk.
    fn sync(&mut self) -> io::Result<()>;
    /// Cuts the file back to this length, durably.
    fn truncate(&mut self, length: u64) -> io::Result<()>;
}

/// Opens log files by name; tests put one that fails in its place.
pub(crate) trait Disk: Send + Sync + 'static {
    /// Opens a file for appending at its end, making it if need be.
    fn open(&self, path: &Path) -> io::Result<Box<dyn LogFile>>;
}

/// The real disk.
pub(crate) struct RealDisk;

impl Disk for RealDisk {
    fn open(&self, path: &Path) -> io::Result<Box<dyn LogFile>> {
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)?;
        file.seek(SeekFrom::End(0))?;
        Ok(Box::new(RealFile(file)))
    }
}

struct RealFile(File);

impl LogFile for RealFile {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.0.set_len(length)?;
        self.0.seek(SeekFrom::Start(length))?;
        self.0.sync_data()
    }
}

/// Makes a rename or a new file in this folder durable.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
