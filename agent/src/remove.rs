//! Takes away what the agent leaves when it ends: pinned links and maps, and routes to other nodes' pods.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};
use futures::TryStreamExt;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::route::RouteMessage;

use crate::link;
use crate::routes::PROTOCOL;

/// Removes all pins of an agent: with the last pin, a link is detached and a map is freed. No folder is no error.
pub fn pins(dir: &Path) -> Result<()> {
    let Ok(found) = std::fs::metadata(dir) else {
        return Ok(());
    };
    // Where the kernel has no tcx, hooks are filters that no pin holds.
    crate::loader::detach(dir)?;
    let above = dir.parent().and_then(|above| std::fs::metadata(above).ok());
    // One that an agent mounted for itself goes whole.
    if above.is_some_and(|above| above.dev() != found.dev()) {
        nix::mount::umount2(dir, nix::mount::MntFlags::MNT_DETACH)
            .with_context(|| format!("could not unmount {}", dir.display()))?;
    }
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("could not remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Removes the routes that bear the agent's mark, in this network namespace; tells how many.
pub async fn routes() -> Result<usize> {
    let handle = link::handle()?;
    let mut ours: Vec<RouteMessage> = Vec::new();
    for all in [
        RouteMessageBuilder::<Ipv4Addr>::new().build(),
        RouteMessageBuilder::<Ipv6Addr>::new().build(),
    ] {
        let mut routes = handle.route().get(all).execute();
        loop {
            match routes.try_next().await {
                Ok(Some(route)) if route.header.protocol == PROTOCOL => ours.push(route),
                Ok(Some(_)) => {}
                Ok(None) => break,
                // A kernel without IPv6 has no routes of it.
                Err(rtnetlink::Error::NetlinkError(error))
                    if matches!(-error.raw_code(), libc::EAFNOSUPPORT | libc::EOPNOTSUPP) =>
                {
                    break;
                }
                Err(error) => return Err(error).context("could not list routes"),
            }
        }
    }
    let mut removed = 0;
    for route in ours {
        match handle.route().del(route).execute().await {
            Ok(()) => removed += 1,
            // It went with its device meanwhile.
            Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -libc::ESRCH => {}
            Err(error) => return Err(error).context("could not remove a route"),
        }
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_of_pins_goes_with_all_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let pins_of = dir.path().join("xebec");
        std::fs::create_dir_all(pins_of.join("links")).unwrap();
        std::fs::write(pins_of.join("links/one"), "").unwrap();
        for _ in 0..2 {
            pins(&pins_of).unwrap();
            assert!(!pins_of.exists());
        }
        assert!(dir.path().exists());
    }
}
