//! Installing what the build and the tests lack, on Debian and Ubuntu; elsewhere it says what is missing.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::ebpf;
use crate::shell::{Cmd, is_root, on_path};

/// Packages whose integration tests named `root_*` need root.
pub const ROOT_TEST_PACKAGES: &[&str] = &[
    "xebec-store",
    "xebec-cri",
    "xebec-kubelet",
    "xebec-agent",
    "xebec-tests",
];

/// What is looked for, and the Debian package that brings it.
pub struct Need {
    /// A program on the PATH, or an absolute file.
    pub what: &'static str,
    /// The package.
    pub package: &'static str,
}

const BUILD: &[Need] = &[
    Need {
        what: "cc",
        package: "gcc",
    },
    Need {
        what: "/usr/include/stdio.h",
        package: "libc6-dev",
    },
];

const TEST: &[Need] = &[
    Need {
        what: "ip",
        package: "iproute2",
    },
    Need {
        what: "ethtool",
        package: "ethtool",
    },
    Need {
        what: "iptables",
        package: "iptables",
    },
    // Peers of the benchmarks.
    Need {
        what: "nft",
        package: "nftables",
    },
    Need {
        what: "ipset",
        package: "ipset",
    },
    Need {
        what: "nsenter",
        package: "util-linux",
    },
    Need {
        what: "curl",
        package: "curl",
    },
    Need {
        what: "pip3",
        package: "python3-pip",
    },
    Need {
        what: "/bin/busybox",
        package: "busybox-static",
    },
    Need {
        what: "dnsmasq",
        package: "dnsmasq-base",
    },
    Need {
        what: "chromium",
        package: "chromium",
    },
    Need {
        what: "chromedriver",
        package: "chromium-driver",
    },
    Need {
        what: "docker-registry",
        package: "docker-registry",
    },
    Need {
        what: "/usr/lib/cni/bridge",
        package: "containernetworking-plugins",
    },
    Need {
        what: "mount",
        package: "mount",
    },
    Need {
        what: "python3",
        package: "python3",
    },
    Need {
        what: "/usr/lib/python3/dist-packages/yaml/__init__.py",
        package: "python3-yaml",
    },
];

/// Installs what `build` needs.
pub fn for_build() -> Result<()> {
    install(BUILD)?;
    ebpf::ensure_toolchain()
}

/// Installs what `test` and `bench` need besides.
pub fn for_tests() -> Result<()> {
    for_build()?;
    install(TEST)?;
    kubectl().map(drop)
}

/// A kubectl to test with: `$KUBECTL`, one on the PATH, or Debian's.
pub fn kubectl() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("KUBECTL") {
        return Ok(path.into());
    }
    if !on_path("kubectl") {
        install(&[Need {
            what: "kubectl",
            package: "kubernetes-client",
        }])?;
    }
    Ok("kubectl".into())
}

/// Installs Debian packages by name.
pub fn apt(packages: &[&str]) -> Result<()> {
    if !on_path("apt-get") {
        bail!(
            "please install with this system's package manager: {}",
            packages.join(" ")
        );
    }
    if !is_root() && !on_path("sudo") {
        bail!("please run as root: apt-get install {}", packages.join(" "));
    }
    let install = || {
        Cmd::as_root("apt-get")
            .args(["install", "-y", "-qq", "--no-install-recommends"])
            .args(packages)
            .env("DEBIAN_FRONTEND", "noninteractive")
    };
    if install().run().is_err() {
        Cmd::as_root("apt-get").args(["update", "-qq"]).run()?;
        install()
            .run()
            .with_context(|| format!("could not install {}", packages.join(" ")))?;
    }
    Ok(())
}

/// Installs the packages of what is not here.
pub fn install(needs: &[Need]) -> Result<()> {
    let missing: Vec<&str> = needs
        .iter()
        .filter(|need| match need.what.strip_prefix('/') {
            Some(_) => !std::path::Path::new(need.what).exists(),
            None => {
                !on_path(need.what) && !std::path::Path::new("/usr/sbin").join(need.what).exists()
            }
        })
        .map(|need| need.package)
        .collect();
    if missing.is_empty() {
        Ok(())
    } else {
        apt(&missing)
    }
}
