//! Finds the user and groups a container runs as, from its own passwd and group files.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::Path;

use anyhow::{Context, bail};

/// Who a process runs as.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Home directory, if the passwd file names one.
    pub home: Option<String>,
}

/// Resolves `user` (`name`, `uid`, `user:group`; empty means root).
pub fn resolve(user: &str, passwd: &str, group: &str) -> anyhow::Result<Identity> {
    let (user, wanted_group) = match user.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (user, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number = user.parse::<u32>().ok();
    let line = passwd
        .lines()
        .map(|l| l.split(':').collect::<Vec<_>>())
        .find(|f| {
            f.len() >= 6
                && match number {
                    Some(uid) => f[2].parse() == Ok(uid),
                    None => f[0] == user,
                }
        });
    let mut found = Identity::default();
    let mut name = user;
    match (&line, number) {
        (Some(f), _) => {
            name = f[0];
            found.uid = f[2]
                .parse()
                .context("a user id in /etc/passwd is no number")?;
            found.gid = f[3]
                .parse()
                .context("a group id in /etc/passwd is no number")?;
            found.home = Some(f[5].to_owned()).filter(|h| !h.is_empty());
        }
        (None, Some(uid)) => found.uid = uid,
        (None, None) => bail!("unable to find user {user}: no matching entries in passwd file"),
    }
    let groups = || {
        group
            .lines()
            .map(|l| l.split(':').collect::<Vec<_>>())
            .filter(|f| f.len() >= 4)
    };
    if let Some(wanted) = wanted_group.filter(|g| !g.is_empty()) {
        found.gid = match wanted.parse() {
            Ok(gid) => gid,
            Err(_) => groups()
                .find(|f| f[0] == wanted)
                .and_then(|f| f[2].parse().ok())
                .with_context(|| {
                    format!("unable to find group {wanted}: no matching entries in group file")
                })?,
        };
    } else {
        found.groups = groups()
            .filter(|f| f[3].split(',').any(|member| member == name))
            .filter_map(|f| f[2].parse().ok())
            .collect();
    }
    Ok(found)
}

/// Reads a small file below `root`, never leaving it; empty if it is not there.
pub fn read_in_root(root: &Path, path: &str) -> anyhow::Result<String> {
    let dir = File::open(root).with_context(|| format!("cannot open {}", root.display()))?;
    let path = std::ffi::CString::new(path)?;
    // SAFETY: open_how is plain data for which all zeros is valid.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
    how.resolve = libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS;
    // SAFETY: the arguments are valid for the call; the new descriptor is ours.
    let file = unsafe {
        let fd = libc::syscall(
            libc::SYS_openat2,
            dir.as_raw_fd(),
            path.as_ptr(),
            &how,
            size_of::<libc::open_how>(),
        );
        if fd < 0 {
            return Ok(String::new());
        }
        File::from_raw_fd(fd as i32)
    };
    if !file.metadata()?.is_file() {
        return Ok(String::new());
    }
    let mut text = Vec::new();
    file.take(1 << 20).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nweb:x:101:102:Web:/srv:/bin/false\nbroken\n";
    const GROUP: &str = "root:x:0:\nweb:x:102:\nlog:x:4:syslog,web\nssl:x:7:web\n";

    #[test]
    fn names_and_numbers_resolve() {
        let web = resolve("web", PASSWD, GROUP).unwrap();
        assert_eq!(
            (web.uid, web.gid, web.groups.as_slice()),
            (101, 102, &[4, 7][..])
        );
        assert_eq!(resolve("101", PASSWD, GROUP).unwrap(), web);
        assert_eq!(resolve("", PASSWD, GROUP).unwrap().uid, 0);
        let other = resolve("5000:log", PASSWD, GROUP).unwrap();
        assert_eq!((other.uid, other.gid), (5000, 4));
        assert!(other.groups.is_empty());
        assert!(resolve("nobody-here", PASSWD, GROUP).is_err());
        assert!(resolve("web:nothing", PASSWD, GROUP).is_err());
    }
}
