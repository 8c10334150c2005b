//! Running commands: echoing them, failing with what was run, and reaching for sudo where root is needed.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// One command line.
pub struct Cmd(Command);

impl Cmd {
    /// A program with no arguments yet.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let mut command = Command::new(program);
        command.current_dir(root());
        Self(command)
    }

    /// The cargo that runs this xtask.
    pub fn cargo<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Self {
        Self::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())).args(args)
    }

    /// The program as root: itself where we are root already, through sudo (keeping the environment) elsewhere.
    pub fn as_root(program: impl AsRef<OsStr>) -> Self {
        if is_root() {
            Self::new(program)
        } else {
            Self::new("sudo").arg("-E").arg(program)
        }
    }

    /// Adds one argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.0.arg(arg);
        self
    }

    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.0.args(args);
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.0.env(key, value);
        self
    }

    /// Removes an environment variable.
    pub fn env_remove(mut self, key: &str) -> Self {
        self.0.env_remove(key);
        self
    }

    /// The folder it runs in.
    pub fn dir(mut self, dir: impl AsRef<Path>) -> Self {
        self.0.current_dir(dir);
        self
    }

    /// Runs it with our output; a non-zero exit is an error that names the command.
    pub fn run(mut self) -> Result<()> {
        eprintln!("+ {}", self.line());
        let status = self
            .0
            .status()
            .with_context(|| format!("could not start `{}`", self.line()))?;
        if !status.success() {
            bail!("`{}` failed: {status}", self.line());
        }
        Ok(())
    }

    /// Runs it and gives what it printed on standard output.
    pub fn output(mut self) -> Result<String> {
        let output = self
            .0
            .output()
            .with_context(|| format!("could not start `{}`", self.line()))?;
        if !output.status.success() {
            bail!(
                "`{}` failed: {}\n{}",
                self.line(),
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Replaces this process; returns only when that failed.
    pub fn exec(mut self) -> std::io::Error {
        eprintln!("+ {}", self.line());
        self.0.exec()
    }

    fn line(&self) -> String {
        std::iter::once(self.0.get_program())
            .chain(self.0.get_args())
            .map(|part| part.to_string_lossy().into_owned())
            .collect::<Vec<_>>()
            .join(" ")
    }
}

/// The workspace's folder: asked when it runs, since several clones may share one target folder.
pub fn root() -> PathBuf {
    let here = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    here.parent().map(Path::to_path_buf).unwrap_or(here)
}

/// Whether we may do what needs root without asking.
pub fn is_root() -> bool {
    // The effective user id is the fourth word of `Uid:` in proc(5)'s status file: real, effective, saved, fs.
    std::fs::read_to_string("/proc/self/status").is_ok_and(|status| {
        status
            .lines()
            .find_map(|line| line.strip_prefix("Uid:"))
            .and_then(|ids| ids.split_whitespace().nth(1))
            == Some("0")
    })
}

/// Whether a program of this name is on the PATH.
pub fn on_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

/// Cargo's target folder for this workspace.
pub fn target_dir() -> Result<PathBuf> {
    let metadata = Cmd::cargo(["metadata", "--format-version=1", "--no-deps"]).output()?;
    let metadata: serde_json::Value =
        serde_json::from_str(&metadata).context("cargo metadata gave no JSON")?;
    metadata["target_directory"]
        .as_str()
        .map(PathBuf::from)
        .context("cargo metadata names no target directory")
}

/// The triple that rustc builds for on this machine.
pub fn host_triple() -> Result<String> {
    Cmd::new("rustc")
        .arg("-vV")
        .output()?
        .lines()
        .find_map(|line| line.strip_prefix("host: ").map(str::to_owned))
        .context("`rustc -vV` names no host")
}

/// A built test executable.
pub struct TestBinary {
    /// The test's name.
    pub name: String,
    /// Where it lies.
    pub path: PathBuf,
    /// Its package's folder, relative to the workspace.
    pub package_dir: PathBuf,
}

/// The test executables of a package's `root_*` integration tests, or all of them where the
/// package exists for root tests alone (it is no default member).
pub fn test_binaries(cargo: Cmd, package: &str) -> Result<Vec<TestBinary>> {
    let cmd = cargo.args([
        "test",
        "--no-run",
        "--quiet",
        "--message-format=json",
        "-p",
        package,
    ]);
    let mut found = Vec::new();
    for line in cmd.output()?.lines() {
        let Ok(message) = serde_json::from_str::<serde_json::Value>(line) else {
            continue;
        };
        let (Some(path), Some(manifest), Some(name)) = (
            message["executable"].as_str(),
            message["manifest_path"].as_str(),
            message["target"]["name"].as_str(),
        ) else {
            continue;
        };
        let is_test = message["profile"]["test"] == true && message["target"]["kind"][0] == "test";
        if is_test && name.starts_with("root_") {
            let dir = Path::new(manifest).parent().unwrap_or(Path::new("."));
            found.push(TestBinary {
                name: name.to_owned(),
                path: path.into(),
                package_dir: dir.into(),
            });
        }
    }
    if found.is_empty() {
        bail!("package {package} has no `root_*` integration test");
    }
    Ok(found)
}
