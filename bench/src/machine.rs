//! What the measured machine is.

use anyhow::{Context, Result};

/// One line that names processor, cores, memory and kernel.
pub fn line() -> Result<String> {
    let cpuinfo =
        std::fs::read_to_string("/proc/cpuinfo").context("could not read /proc/cpuinfo")?;
    let model = cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == "model name")
        .map_or("unnamed processor", |(_, model)| model.trim());
    let virtual_machine = cpuinfo
        .lines()
        .any(|line| line.starts_with("flags") && line.split(' ').any(|flag| flag == "hypervisor"));
    let cores = std::thread::available_parallelism().context("could not count the cores")?;
    let memory =
        std::fs::read_to_string("/proc/meminfo").context("could not read /proc/meminfo")?;
    let kilobytes: u64 = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|number| number.trim().parse().ok())
        .context("/proc/meminfo has no MemTotal")?;
    let system = nix::sys::utsname::uname().context("could not ask for the kernel's version")?;
    Ok(format!(
        "{model}, {cores} cores{}, {} GB, Linux {}",
        if virtual_machine {
            " of a virtual machine"
        } else {
            ""
        },
        (kilobytes + 512 * 1024) / (1024 * 1024),
        system.release().to_string_lossy(),
    ))
}
