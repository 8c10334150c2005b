//! Layers applied one over another in a plain directory, as any user.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::*;

/// Writes archives by hand, so that even paths that a tar library refuses can be tried.
struct Layer(tar::Builder<Vec<u8>>);

impl Layer {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn entry(mut self, kind: EntryType, path: &str, mode: u32, link: &str, data: &[u8]) -> Self {
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
        if !link.is_empty() {
            header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
        }
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_mtime(1_000_000);
        // SAFETY: geteuid and getegid can't fail and touch no memory.
        let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
        header.set_uid(uid.into());
        header.set_gid(gid.into());
        header.set_size(data.len() as u64);
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    fn file(self, path: &str, data: &str) -> Self {
        self.entry(EntryType::Regular, path, 0o644, "", data.as_bytes())
    }

    fn dir(self, path: &str) -> Self {
        self.entry(EntryType::Directory, path, 0o755, "", b"")
    }

    fn link(self, path: &str, to: &str) -> Self {
        self.entry(EntryType::Symlink, path, 0o777, to, b"")
    }

    fn hard(self, path: &str, to: &str) -> Self {
        self.entry(EntryType::Link, path, 0o644, to, b"")
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }

    fn on(self, dir: &Path) -> anyhow::Result<()> {
        apply(self.bytes().as_slice(), dir)
    }
}

fn tree(dir: &Path) -> Vec<String> {
    fn walk(dir: &Path, prefix: &str, out: &mut Vec<String>) {
        let mut entries: Vec<_> = std::fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap())
            .collect();
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for e in entries {
            let name = format!("{prefix}{}", e.file_name().to_string_lossy());
            out.push(name.clone());
            if e.file_type().unwrap().is_dir() {
                walk(&e.path(), &format!("{name}/"), out);
            }
        }
    }
    let mut out = Vec::new();
    walk(dir, "", &mut out);
    out
}

#[test]
fn whiteouts_remove_files_and_trees() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    Layer::new()
        .dir("d")
        .file("d/a", "1")
        .file("d/b", "2")
        .file("f", "3")
        .on(root)
        .unwrap();
    Layer::new()
        .file("d/.wh.a", "")
        .file(".wh.f", "")
        .file(".wh.absent", "")
        .on(root)
        .unwrap();
    assert_eq!(tree(root), ["d", "d/b"]);
    Layer::new().file(".wh.d", "").on(root).unwrap();
    assert!(tree(root).is_empty());
}

#[test]
fn an_opaque_directory_hides_lower_layers_only() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    Layer::new()
        .dir("d")
        .file("d/old", "1")
        .dir("d/s")
        .file("d/s/old", "1")
        .on(root)
        .unwrap();
    // The mark may come after entries of its own layer.
    Layer::new()
        .dir("d")
        .file("d/new", "2")
        .dir("d/s")
        .file("d/s/new", "2")
        .file("d/.wh..wh..opq", "")
        .file("d/later", "2")
        .on(root)
        .unwrap();
    assert_eq!(tree(root), ["d", "d/later", "d/new", "d/s", "d/s/new"]);
}

#[test]
fn kinds_replace_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    Layer::new()
        .dir("x")
        .file("x/deep", "1")
        .file("y", "2")
        .link("z", "y")
        .on(root)
        .unwrap();
    Layer::new()
        .file("x", "now a file")
        .dir("y")
        .file("z", "not y")
        .on(root)
        .unwrap();
    assert_eq!(tree(root), ["x", "y", "z"]);
    assert!(root.join("y").is_dir());
    assert_eq!(std::fs::read_to_string(root.join("z")).unwrap(), "not y");
}

#[test]
fn modes_times_and_links_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    Layer::new()
        .dir("bin")
        .entry(EntryType::Regular, "bin/su", 0o4755, "", b"x")
        .hard("bin/su2", "bin/su")
        .link("sh", "bin/su")
        .on(root)
        .unwrap();
    let su = root.join("bin/su").metadata().unwrap();
    assert_eq!(su.permissions().mode() & 0o7777, 0o4755);
    assert_eq!(su.mtime(), 1_000_000);
    assert_eq!(root.join("bin").metadata().unwrap().mtime(), 1_000_000);
    assert_eq!(su.ino(), root.join("bin/su2").metadata().unwrap().ino());
    assert_eq!(
        std::fs::read_link(root.join("sh")).unwrap(),
        Path::new("bin/su")
    );
}

#[test]
fn nothing_gets_out_of_the_layer() {
    let outside = tempfile::tempdir().unwrap();
    let victim = outside.path().join("victim");
    std::fs::write(&victim, "safe").unwrap();
    let away = outside.path().to_str().unwrap();
    let fresh = || tempfile::tempdir_in(outside.path()).unwrap();

    for layer in [
        Layer::new().file("../victim", "gone"),
        Layer::new().file("a/../../victim", "gone"),
        Layer::new().hard("mine", "../victim"),
        Layer::new().file("../.wh.victim", ""),
    ] {
        let dir = fresh();
        let err = layer.on(dir.path()).unwrap_err();
        assert!(format!("{err:#}").contains("leaves the layer"), "{err:#}");
    }
    // Links are followed only as far as the layer's own root reaches.
    let dir = fresh();
    Layer::new()
        .link("up", "..")
        .file("up/victim", "in the layer")
        .on(dir.path())
        .unwrap();
    assert_eq!(
        std::fs::read_to_string(dir.path().join("victim")).unwrap(),
        "in the layer"
    );
    let dir = fresh();
    let _ = Layer::new()
        .link("abs", away)
        .file("abs/victim", "gone")
        .on(dir.path());
    let dir = fresh();
    let _ = Layer::new()
        .link("abs", away)
        .file("abs/.wh.victim", "")
        .on(dir.path());
    let dir = fresh();
    let _ = Layer::new()
        .link("abs", away)
        .hard("mine", "abs/victim")
        .on(dir.path());
    assert!(!dir.path().join("mine").exists());
    // A file written over a link replaces the link.
    let dir = fresh();
    Layer::new()
        .link("l", &format!("{away}/victim"))
        .file("l", "own")
        .on(dir.path())
        .unwrap();
    assert_eq!(
        std::fs::read_to_string(dir.path().join("l")).unwrap(),
        "own"
    );
    assert_eq!(std::fs::read_to_string(&victim).unwrap(), "safe");
}

#[test]
fn a_damaged_archive_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let whole = Layer::new().file("f", &"x".repeat(3000)).bytes();
    let err = apply(&whole[..2000], dir.path()).unwrap_err();
    assert!(format!("{err:#}").contains("damaged"), "{err:#}");
    assert!(apply(&[7u8; 1024][..], dir.path()).is_err());
}

#[test]
fn compressed_layers_are_read_and_checked() {
    use std::io::Write;
    let plain = Layer::new().file("f", "hello").bytes();
    let diff_id = super::super::store::sha256(&plain);
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(&plain).unwrap();
    let zstd = ruzstd::encoding::compress_to_vec(
        plain.as_slice(),
        ruzstd::encoding::CompressionLevel::Fastest,
    );
    for packed in [plain.clone(), gz.finish().unwrap(), zstd] {
        let dir = tempfile::tempdir().unwrap();
        let store = ImageStore::open(dir.path()).unwrap();
        let file = dir.path().join("layer");
        std::fs::write(&file, &packed).unwrap();
        let chain = vec![diff_id[7..].to_owned()];
        let wrong = super::super::store::sha256(b"other");
        let err = ensure_layer(&store, &chain, &wrong, &file).unwrap_err();
        assert!(format!("{err:#}").contains("corrupt"), "{err:#}");
        assert!(
            !store.layer_dir(&chain[0]).exists(),
            "nothing is left of it"
        );
        ensure_layer(&store, &chain, &diff_id, &file).unwrap();
        let text = std::fs::read_to_string(store.layer_dir(&chain[0]).join("f")).unwrap();
        assert_eq!(text, "hello");
    }
}
