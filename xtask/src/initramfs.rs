//! The file system that a kernel unpacks into memory and starts from: an archive in cpio's `newc` format.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};

use crate::shell::Cmd;

const FOLDER: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;

/// An archive under construction.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    number: u32,
    /// What is in it, so that no folder and no library comes twice.
    paths: std::collections::BTreeSet<String>,
}

impl Archive {
    /// Adds a file with the folders that it lies in.
    pub fn file(&mut self, path: &str, content: &[u8]) -> Result<()> {
        self.folders_of(path)?;
        self.entry(path, EXECUTABLE, content)
    }

    /// Adds a file of this machine.
    pub fn copy(&mut self, path: &str, from: &Path) -> Result<()> {
        let content =
            std::fs::read(from).with_context(|| format!("could not read {}", from.display()))?;
        self.file(path, &content)
    }

    /// Adds a program of this machine with the libraries that it is linked to, each where it lies here.
    pub fn program(&mut self, path: &str, from: &Path) -> Result<()> {
        self.copy(path, from)?;
        let linked = Cmd::new("ldd").arg(from).output()?;
        for word in linked
            .split_whitespace()
            .filter(|word| word.starts_with('/'))
        {
            self.copy(word.trim_start_matches('/'), Path::new(word))?;
        }
        Ok(())
    }

    /// Adds an empty folder.
    pub fn folder(&mut self, path: &str) -> Result<()> {
        self.folders_of(path)?;
        self.entry(path, FOLDER, &[])
    }

    /// Writes it.
    pub fn write(mut self, to: &Path) -> Result<()> {
        self.entry("TRAILER!!!", 0, &[])?;
        std::fs::write(to, &self.bytes).with_context(|| format!("could not write {}", to.display()))
    }

    fn folders_of(&mut self, path: &str) -> Result<()> {
        for (end, _) in path.match_indices('/') {
            self.entry(&path[..end], FOLDER, &[])?;
        }
        Ok(())
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        if !self.paths.insert(path.to_owned()) {
            return Ok(());
        }
        self.number += 1;
        let size = u32::try_from(content.len()).context("the file is too large for cpio")?;
        let name = u32::try_from(path.len() + 1).context("the path is too long for cpio")?;
        // c_ino, c_mode, c_uid, c_gid, c_nlink, c_mtime, c_filesize, c_devmajor, c_devminor, c_rdevmajor,
        // c_rdevminor, c_namesize, c_check: initramfs/buffer-format of the kernel's documentation.
        let fields = [self.number, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name, 0];
        self.bytes.write_all(b"070701")?;
        for field in fields {
            write!(self.bytes, "{field:08x}")?;
        }
        self.bytes.extend(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_lies_where_the_kernel_looks_for_it() {
        let mut archive = Archive::default();
        archive.file("a/b", b"hello").expect("it is small");
        archive.file("a/c", b"").expect("it is small");
        let text = String::from_utf8(archive.bytes).expect("it is text");
        // Header of 110 bytes, "a" and its end, two to the next multiple of four.
        assert!(text.starts_with("07070100000001000041ed"));
        let file = &text[112..];
        assert!(file.starts_with("07070100000002000081ed"));
        assert_eq!(&file[54..62], "00000005");
        assert_eq!(&file[110..124], "a/b\0\0\0hello\0\0\0");
        // The folder is there once.
        assert_eq!(text.matches("070701").count(), 3);
    }
}
