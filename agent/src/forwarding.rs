//! Lets this network namespace pass packets on.

use std::path::Path;

use anyhow::{Context, Result};

/// The settings of IPv6, one folder a device.
const V6: &str = "/proc/sys/net/ipv6/conf";

/// Turns forwarding on for the families that are in use.
pub fn turn_on(v4: bool, v6: bool) -> Result<()> {
    if v4 {
        write(Path::new("/proc/sys/net/ipv4/ip_forward"), "1")?;
    }
    if v6 {
        turn_on_v6().context("could not turn on forwarding of IPv6 (is it off in the kernel?)")?;
    }
    Ok(())
}

/// A device that forwards does not hear routers, unless it is told to: what was heard before, and with it the
/// machine's own way out, must not be lost. Told so first, for the kernel forgets the routes at once.
fn turn_on_v6() -> Result<()> {
    let devices = std::fs::read_dir(V6).with_context(|| format!("could not read {V6}"))?;
    for device in devices {
        let device = device.with_context(|| format!("could not read {V6}"))?;
        // These are no devices.
        if ["all", "default"]
            .iter()
            .any(|name| device.file_name() == **name)
        {
            continue;
        }
        let is = |name: &str, value: &str| {
            // One that is gone meanwhile needs nothing.
            let text = std::fs::read_to_string(device.path().join(name));
            text.is_ok_and(|text| text.trim() == value)
        };
        if is("forwarding", "0") && is("accept_ra", "1") {
            match write(&device.path().join("accept_ra"), "2") {
                Err(_) if !device.path().exists() => {}
                outcome => outcome?,
            }
        }
    }
    write(&Path::new(V6).join("all/forwarding"), "1")
}

fn write(path: &Path, value: &str) -> Result<()> {
    std::fs::write(path, value).with_context(|| format!("could not write {}", path.display()))
}
