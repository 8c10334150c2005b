//! The XDP hook: which devices it is for, and keeping it attached beyond the agent's life by pinned links.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::xdp::{XdpLink, XdpMode};
use aya::programs::{ProgramError, Xdp as Program};
use serde::{Deserialize, Serialize};
use xebec_dataplane_common::nat::{BACK_BY_QUEUE, BACK_BY_REDIRECT};

use super::{Loaded, NETWORK_LINKS, checked, hook, pin_name};
use crate::network::Device;

const HOOK: &str = "xebec_express";
/// How long a link may take to end: 50 times 10 ms.
const TRIES: u32 = 50;
const PAUSE: Duration = Duration::from_millis(10);

/// How XDP is used on the devices that lead to other nodes and the outside. tc does there whatever XDP does not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Xdp {
    /// By the driver, on hardware whose driver can.
    #[default]
    Auto,
    /// By the driver on all of them, which must be able to.
    Native,
    /// By the kernel's network stack on all of them: for tests.
    Generic,
    /// Not at all.
    Off,
}

/// Who does the XDP hook's work on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum By {
    /// The driver.
    Native,
    /// The network stack.
    Generic,
    /// Nobody: tc has it all, and why.
    Tc(String),
}

impl fmt::Display for By {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Native => "xdp",
            Self::Generic => "xdpgeneric",
            Self::Tc(_) => "tc",
        })
    }
}

/// What a device is to have.
enum Wish {
    Attach(XdpMode),
    Leave(&'static str),
}

impl Xdp {
    fn wish(self, device: &Device) -> Wish {
        match self {
            Self::Native => Wish::Attach(XdpMode::Driver),
            Self::Generic => Wish::Attach(XdpMode::Skb),
            Self::Off => Wish::Leave("it is turned off"),
            // What a sender of the same machine hands over has no checksums yet, which XDP can't see. Hardware's
            // frames have theirs, but for Xen's.
            Self::Auto => match device.bus.as_deref() {
                None => Wish::Leave("the device is no hardware"),
                Some("xen") => {
                    Wish::Leave("frames of this machine's other guests may lack their checksums")
                }
                Some(_) => Wish::Attach(XdpMode::Driver),
            },
        }
    }

    /// The pin of a device's link, if it may have one. A link's mode can't be changed, so the name tells it.
    pub(super) fn pin(self, device: &Device) -> Option<String> {
        match self.wish(device) {
            Wish::Attach(mode) => Some(pin(device, mode)),
            Wish::Leave(_) => None,
        }
    }
}

fn pin(device: &Device, mode: XdpMode) -> String {
    let mode = if mode == XdpMode::Skb {
        "generic"
    } else {
        "native"
    };
    pin_name(&device.name, &format!("{HOOK}_{mode}"))
}

impl Loaded {
    /// Attaches the XDP hook where it was asked for by name and none is yet, so that a device which can't have it is
    /// told of at once. Before the maps are filled, the hook does nothing but what is known already.
    pub(crate) async fn prove_express(&mut self, devices: &[Device], xdp: Xdp) -> Result<()> {
        if !matches!(xdp, Xdp::Native | Xdp::Generic) {
            return Ok(());
        }
        let links = self.dir.join(NETWORK_LINKS);
        for device in devices {
            let pinned = [XdpMode::Driver, XdpMode::Skb].map(|mode| links.join(pin(device, mode)));
            if !pinned.iter().any(|pin| pin.exists()) {
                self.attach_express(device, xdp, false).await?;
            }
        }
        Ok(())
    }

    /// Attaches the XDP hook to a device as far as it is wanted and can be; `let_go` if links were let go just now.
    pub(super) async fn attach_express(
        &mut self,
        device: &Device,
        xdp: Xdp,
        let_go: bool,
    ) -> Result<By> {
        let mode = match xdp.wish(device) {
            Wish::Attach(mode) => mode,
            Wish::Leave(why) => return Ok(By::Tc(why.into())),
        };
        match &self.without_express {
            Some(why) if xdp == Xdp::Auto => return Ok(By::Tc(why.clone())),
            Some(why) => anyhow::bail!("XDP was asked for: {why}"),
            None => {}
        }
        let pin = self.dir.join(NETWORK_LINKS).join(pin(device, mode));
        // A link that was let go ends a moment later.
        let tries = if let_go { TRIES } else { 0 };
        match self.attach_xdp(device, mode, &pin, tries).await {
            Ok(()) => {
                // Frames may be sent on to it now.
                let back = if device.bus.is_some() {
                    BACK_BY_QUEUE
                } else {
                    BACK_BY_REDIRECT
                };
                self.set_device(device, back)?;
                Ok(if mode == XdpMode::Skb {
                    By::Generic
                } else {
                    By::Native
                })
            }
            Err(error) if xdp == Xdp::Auto => Ok(By::Tc(format!("{error:#}"))),
            Err(error) => Err(error).with_context(|| {
                format!(
                    "XDP was asked for, and {} can't have it (--xdp auto uses it where it can be had)",
                    device.name
                )
            }),
        }
    }

    async fn attach_xdp(
        &mut self,
        device: &Device,
        mode: XdpMode,
        pin: &Path,
        mut tries: u32,
    ) -> Result<()> {
        let program = hook::<Program>(&mut self.ebpf, HOOK)?;
        let name = &device.name;
        if pin.exists() {
            let link = PinnedLink::from_pin(pin)
                .with_context(|| format!("could not open {}", pin.display()))?;
            let link = XdpLink::try_from(FdLink::from(link))
                .with_context(|| format!("{} is another kind of link", pin.display()))?;
            match program.attach_to_link(link) {
                Ok(link) => {
                    // The pin keeps the link; ours may go.
                    drop(program.take_link(link));
                    return Ok(());
                }
                // Its device went meanwhile.
                Err(error) => {
                    tracing::debug!(%error, device = name, "a pinned link is of no use any more");
                    std::fs::remove_file(pin)
                        .with_context(|| format!("could not remove {}", pin.display()))?;
                }
            }
        }
        let link = loop {
            match program.attach_to_if_index(device.index, mode) {
                Ok(link) => break link,
                Err(error) if tries > 0 && is_busy(&error) => {
                    tries -= 1;
                    tokio::time::sleep(PAUSE).await;
                }
                Err(error) => {
                    return Err(reason(error)).with_context(|| {
                        format!("the device {name} refuses XDP in {} mode", words(mode))
                    });
                }
            }
        };
        let link = program
            .take_link(link)
            .with_context(|| format!("could not keep the link of {HOOK}"))?;
        let link = FdLink::try_from(link)
            .with_context(|| format!("this kernel attaches {HOOK} without a link"))?;
        link.pin(pin)
            .with_context(|| format!("could not pin the link of {HOOK} on {name}"))?;
        Ok(())
    }

    /// The XDP program, to be run by `BPF_PROG_TEST_RUN`.
    pub fn express(&mut self) -> Result<&mut Program> {
        hook(&mut self.ebpf, HOOK)
    }

    /// Loads the program; the kernel checks it. Says why an older kernel refuses it: tc does all that it would do.
    pub(super) fn load_express(ebpf: &mut aya::Ebpf) -> Result<Option<String>> {
        let program = hook::<Program>(ebpf, HOOK)?;
        match checked(HOOK, || program.load()) {
            Err(error) if is_refusal(&error) => {
                let why = format!("{error:#}");
                // The reason is on the first line; the rest is the program's text.
                let why = why.lines().next().unwrap_or_default().to_owned();
                tracing::warn!(why, "there will be no XDP");
                Ok(Some(why))
            }
            outcome => outcome.map(|()| None),
        }
    }
}

/// Whether another program, or one in another mode, has the device.
fn is_busy(error: &ProgramError) -> bool {
    matches!(error, ProgramError::SyscallError(error)
        if matches!(error.io_error.raw_os_error(), Some(libc::EBUSY | libc::EEXIST)))
}

/// Whether the kernel found the program itself wanting.
fn is_refusal(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(ProgramError::LoadError { io_error, .. })
        if matches!(io_error.raw_os_error(), Some(libc::EACCES | libc::EINVAL | libc::E2BIG)))
}

fn words(mode: XdpMode) -> &'static str {
    if mode == XdpMode::Skb {
        "generic"
    } else {
        "native"
    }
}

/// The kernel's own words are few.
fn reason(error: ProgramError) -> anyhow::Error {
    let why = match &error {
        ProgramError::SyscallError(error) => match error.io_error.raw_os_error() {
            Some(libc::EOPNOTSUPP) => "its driver can't, or not beside what its host does for it",
            Some(libc::EBUSY | libc::EEXIST) => "another XDP program is attached",
            _ => return anyhow::anyhow!("{}", error.io_error),
        },
        _ => return error.into(),
    };
    anyhow::anyhow!(why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_default_only_hardware_is_asked() {
        let device = |bus: Option<&str>| Device {
            name: "eth0.7".into(),
            index: 3,
            bus: bus.map(str::to_owned),
        };
        let pins = |xdp: Xdp| [None, Some("pci"), Some("xen")].map(|bus| xdp.pin(&device(bus)));
        let native = Some("eth0_7-xebec_express_native".to_owned());
        assert_eq!(pins(Xdp::Auto), [None, native.clone(), None]);
        assert_eq!(pins(Xdp::Native), [native.clone(), native.clone(), native]);
        assert_eq!(pins(Xdp::Off), [None, None, None]);
        let generic = Some("eth0_7-xebec_express_generic".to_owned());
        assert_eq!(
            pins(Xdp::Generic),
            [generic.clone(), generic.clone(), generic]
        );
    }
}
