//! Trying the eBPF programs on other kernels: Debian's, under qemu, each with a small file system of our own.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::initramfs::Archive;
use crate::setup::{self, Need};
use crate::shell::{self, Cmd};

/// What is tried where nothing else is asked for.
pub const DEFAULT: &[&str] = &["6.1", "6.12"];

/// A machine that is emulated takes its time; one that hangs is ended.
const PATIENCE: &str = "3000";

const NEEDS: &[Need] = &[
    Need {
        what: "qemu-system-x86_64",
        package: "qemu-system-x86",
    },
    Need {
        what: "xz",
        package: "xz-utils",
    },
    Need {
        what: "ip",
        package: "iproute2",
    },
];

/// Modules that the hooks and the tests need; none of them needs another.
const MODULES: &[&str] = &["veth", "sch_ingress", "cls_bpf"];

/// The agent's tests that run there, with words of the names of a few that together go through every hook: each
/// test has the kernel check all programs, which takes an emulated one half a minute.
pub const TESTS: &[(&str, &[&str])] = &[
    (
        "root_attach",
        &["the_way", "filters_judge", "a_networks_filters"],
    ),
    (
        "root_packets",
        &[
            "node_port_to_a_pod_of_another_node",
            "to_a_pod_of_another_node_and_back",
            "programs_and_model_agree",
        ],
    ),
];

/// What is put into every kernel's file system.
pub struct Contents {
    /// The first process.
    pub init: PathBuf,
    /// Test executables, by name.
    pub tests: Vec<(String, PathBuf)>,
    /// Whether all of their tests are run.
    pub all: bool,
}

/// Boots each kernel, prints a table of each, and fails if a program or a test did.
pub fn verify(kernels: &[String], contents: &Contents) -> Result<()> {
    setup::install(NEEDS)?;
    let folder = shell::target_dir()?.join("kernels");
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("could not make {}", folder.display()))?;
    let mut failed = Vec::new();
    for version in kernels {
        let kernel = Kernel::get(version, &folder)?;
        let report = kernel.boot(contents)?;
        if !report.print() {
            failed.push(version.as_str());
        }
    }
    ensure!(
        failed.is_empty(),
        "not all is well on {}",
        failed.join(", ")
    );
    Ok(())
}

/// An unpacked kernel package.
struct Kernel {
    folder: PathBuf,
}

impl Kernel {
    /// Gets the newest package of a version, unless it lies here from before.
    fn get(version: &str, folder: &Path) -> Result<Self> {
        let package = match newest(version)? {
            Some(package) => package,
            None => {
                Cmd::as_root("apt-get").args(["update", "-qq"]).run()?;
                newest(version)?.with_context(|| {
                    format!("apt knows no package linux-image-{version}.*-amd64: Debian 12 and its updates have 6.1 and 6.12")
                })?
            }
        };
        let folder = folder.join(&package);
        let done = folder.join("unpacked");
        if !done.exists() {
            std::fs::create_dir_all(&folder)
                .with_context(|| format!("could not make {}", folder.display()))?;
            Cmd::new("apt-get")
                .args(["download", "-q", &package])
                .dir(&folder)
                .run()?;
            // Its modules are many: only these are unpacked.
            let wanted: Vec<String> = MODULES
                .iter()
                .map(|module| format!("'*/{module}.ko*'"))
                .collect();
            let line = format!(
                "dpkg-deb --fsys-tarfile linux-image-*.deb | tar -x --wildcards './boot/vmlinuz-*' {}",
                wanted.join(" ")
            );
            Cmd::new("sh").args(["-ec", &line]).dir(&folder).run()?;
            std::fs::write(&done, "").context("could not note that the kernel is unpacked")?;
        }
        Ok(Self { folder })
    }

    fn boot(&self, contents: &Contents) -> Result<Report> {
        let mut archive = Archive::default();
        archive.file("init", &stripped(&contents.init)?)?;
        archive.program("bin/ip", &which("ip")?)?;
        for (name, path) in &contents.tests {
            archive.file(&format!("tests/{name}"), &stripped(path)?)?;
            let words = TESTS.iter().find(|(test, _)| test == name);
            if let (false, Some((_, words))) = (contents.all, words) {
                archive.file(&format!("words/{name}"), words.join(" ").as_bytes())?;
            }
        }
        archive.folder("modules")?;
        for (index, module) in MODULES.iter().enumerate() {
            let name = format!("modules/{index}-{module}.ko");
            if let Some(xz) = find(&self.folder, &format!("{module}.ko.xz"))? {
                archive.file(&name, &bytes("xz", &["-dc".as_ref(), xz.as_os_str()])?)?;
            } else {
                let plain = find(&self.folder, &format!("{module}.ko"))?
                    .with_context(|| format!("the kernel has no module {module}"))?;
                archive.copy(&name, &plain)?;
            }
        }
        let initrd = self.folder.join("initrd");
        archive.write(&initrd)?;
        let boot = self.folder.join("boot");
        let image = std::fs::read_dir(&boot)
            .with_context(|| format!("could not list {}", boot.display()))?
            .flatten()
            .next()
            .context("the package has no kernel")?
            .path();
        let console = self.folder.join("console");
        // Emulated: nested virtualisation is not to be had everywhere, and the check is the same.
        Cmd::new("timeout")
            .args([
                PATIENCE,
                "qemu-system-x86_64",
                "-accel",
                "tcg",
                "-cpu",
                "max",
            ])
            .args(["-m", "2048", "-smp", "1", "-display", "none", "-no-reboot"])
            .args(["-nic", "none", "-monitor", "none", "-serial"])
            .arg(format!("file:{}", console.display()))
            .arg("-kernel")
            .arg(&image)
            .arg("-initrd")
            .arg(&initrd)
            .args(["-append", "console=ttyS0 panic=-1 oops=panic quiet"])
            .run()?;
        let _ = std::fs::remove_file(&initrd);
        let console = std::fs::read_to_string(&console)
            .with_context(|| format!("could not read {}", console.display()))?;
        Ok(Report::read(&console))
    }
}

/// What a machine told.
#[derive(Default)]
struct Report {
    release: String,
    programs: Vec<[String; 4]>,
    /// Program, and why it was refused.
    refused: Vec<(String, String)>,
    attached: Vec<String>,
    passed: Vec<String>,
    /// Everything that went wrong besides.
    wrong: Vec<String>,
    /// Whether it came to its end.
    ended: bool,
}

impl Report {
    fn read(console: &str) -> Self {
        let mut report = Self::default();
        let mut output = Vec::new();
        for line in console.lines() {
            let Some((_, told)) = line.split_once("xebec-kernel: ") else {
                continue;
            };
            let (what, words) = told
                .trim_end()
                .split_once(' ')
                .unwrap_or((told.trim_end(), ""));
            let words = words.to_owned();
            match what {
                "release" => report.release = words,
                "program" => {
                    let mut figures = words.split(' ').map(str::to_owned);
                    report
                        .programs
                        .push(std::array::from_fn(|_| figures.next().unwrap_or_default()));
                }
                "refused" => {
                    let (name, why) = words.split_once(' ').unwrap_or((&words, ""));
                    report.refused.push((name.to_owned(), why.to_owned()));
                }
                "attached" => report.attached.push(words),
                "output" => output.push(words),
                "passed" => {
                    let result = output.iter().find(|line| line.starts_with("test result"));
                    let result = result.map_or("", String::as_str);
                    let told = format!("{words}: {result}");
                    // Where no test has the name that was asked for, none fails.
                    let none = result.is_empty() || result.contains(" 0 passed");
                    let list = if none {
                        &mut report.wrong
                    } else {
                        &mut report.passed
                    };
                    list.push(told);
                    output.clear();
                }
                "tests-failed" => {
                    report
                        .wrong
                        .push(format!("{words} failed:\n    {}", output.join("\n    ")));
                    output.clear();
                }
                "end" => report.ended = true,
                _ => report.wrong.push(told.trim_end().to_owned()),
            }
        }
        if !report.ended {
            let last: Vec<&str> = console.lines().rev().take(20).collect();
            let last: Vec<&str> = last.into_iter().rev().collect();
            report.wrong.push(format!(
                "the machine did not come to its end:\n{}",
                last.join("\n")
            ));
        }
        report.programs.sort();
        report.refused.sort();
        if report.programs.is_empty() && report.refused.is_empty() {
            report.wrong.push("no program was tried".into());
        }
        report
    }

    fn well(&self) -> bool {
        self.refused.is_empty() && self.wrong.is_empty()
    }

    /// Prints it, and says whether all was well.
    fn print(&self) -> bool {
        println!("Linux {}", self.release);
        println!(
            "  {:<22} {:>12} {:>12}  stack",
            "program", "instructions", "machine code"
        );
        for [name, instructions, stack, code] in &self.programs {
            println!("  {name:<22} {instructions:>12} {code:>12}  {stack}");
        }
        for (name, why) in &self.refused {
            println!("  {name:<22} refused: {why}");
        }
        for attached in &self.attached {
            println!("  attached: {attached}");
        }
        for passed in &self.passed {
            println!("  passed: {passed}");
        }
        for wrong in &self.wrong {
            println!("  wrong: {wrong}");
        }
        self.well()
    }
}

/// The newest package of a version's ordinary kernel, as apt knows it.
fn newest(version: &str) -> Result<Option<String>> {
    let known = Cmd::new("apt-cache")
        .args(["search", "--names-only", "^linux-image-[0-9].*-amd64$"])
        .output()?;
    let names = known.lines().filter_map(|line| line.split(' ').next());
    Ok(newest_of(version, names))
}

fn newest_of<'a>(version: &str, names: impl Iterator<Item = &'a str>) -> Option<String> {
    let prefix = format!("linux-image-{version}.");
    names
        // Neither those for clouds and real time, nor those without a signature.
        .filter(|name| {
            !["-cloud-", "-rt-", "unsigned"]
                .iter()
                .any(|kind| name.contains(kind))
        })
        .filter(|name| name.starts_with(&prefix))
        .max_by_key(|name| numbers(name))
        .map(str::to_owned)
}

/// The numbers in a name, by which 6.12.117 is newer than 6.12.99.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit())
        .filter_map(|number| number.parse().ok())
        .collect()
}

/// An executable without what only debuggers read.
fn stripped(path: &Path) -> Result<Vec<u8>> {
    let to = path.with_extension("stripped");
    Cmd::new("strip").arg("-o").arg(&to).arg(path).output()?;
    let content = std::fs::read(&to).with_context(|| format!("could not read {}", to.display()))?;
    let _ = std::fs::remove_file(&to);
    Ok(content)
}

fn which(program: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|folder| folder.join(program))
        .find(|path| path.is_file())
        .with_context(|| format!("there is no {program}"))
}

/// A file of this name somewhere in a folder.
fn find(folder: &Path, name: &str) -> Result<Option<PathBuf>> {
    let entries = std::fs::read_dir(folder)
        .with_context(|| format!("could not list {}", folder.display()))?;
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() && !path.is_symlink() {
            if let Some(found) = find(&path, name)? {
                return Ok(Some(found));
            }
        } else if entry.file_name() == name {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// What a program prints, as it is.
fn bytes(program: &str, args: &[&std::ffi::OsStr]) -> Result<Vec<u8>> {
    let output = std::process::Command::new(program)
        .args(args)
        .output()
        .with_context(|| format!("could not start {program}"))?;
    if !output.status.success() {
        bail!(
            "{program} failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_ordinary_kernel_is_taken() {
        let names = [
            "linux-image-6.1.0-9-amd64",
            "linux-image-6.1.0-56-amd64",
            "linux-image-6.1.0-57-cloud-amd64",
            "linux-image-6.12-amd64",
            "linux-image-6.12.99+deb12-amd64",
            "linux-image-6.12.117+deb12-amd64",
            "linux-image-6.12.118+deb12-amd64-unsigned",
        ];
        let newest = |version| newest_of(version, names.iter().copied());
        assert_eq!(newest("6.1").as_deref(), Some(names[1]));
        assert_eq!(newest("6.12").as_deref(), Some(names[5]));
        assert_eq!(newest("6.6"), None);
    }

    #[test]
    fn what_a_machine_tells_is_judged() {
        let good = "noise\r\n[ 1.0] xebec-kernel: release 6.1\r\nxebec-kernel: program a 10 8+16 99\r\nxebec-kernel: end \r\n";
        let report = Report::read(good);
        assert!(report.well(), "{:?}", report.wrong);
        assert_eq!(report.programs, [["a", "10", "8+16", "99"]]);
        for bad in [
            "xebec-kernel: refused a invalid argument\r\n",
            "xebec-kernel: unattached pod why\r\n",
            "xebec-kernel: failed why\r\n",
            "xebec-kernel: tests-failed root_packets\r\n",
            "xebec-kernel: output test result: ok. 0 passed\r\nxebec-kernel: passed a\r\n",
        ] {
            assert!(!Report::read(&format!("{bad}{good}")).well(), "{bad}");
        }
        assert!(!Report::read(&good.replace("end", "")).well());
        assert!(!Report::read("xebec-kernel: end").well());
    }
}
