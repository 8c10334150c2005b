//! Gives Services larger maps when they need them, without a moment in which a packet sees half of anything.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::dataplane::Dataplane;
use crate::loader::{Grown, Sizes, Step};
use crate::maps::{Room, ServiceMaps};
use crate::services::Services;

/// When it is looked at again after larger maps were refused.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often it is looked at again at most while something changes: while some do not fit, every change tells so.
const PAUSE: Duration = Duration::from_secs(1);

/// Grows the maps of Services whenever something does not fit, until `shutdown`.
pub(crate) async fn run(
    services: Services,
    dataplane: Arc<Dataplane>,
    sizes: Sizes,
    shutdown: CancellationToken,
) -> Result<()> {
    let mut lack = services.lack();
    services.expect_growth();
    let mut refused = false;
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            changed = lack.changed() => if changed.is_err() { return Ok(()) },
            () = tokio::time::sleep(PATIENCE), if refused => {}
        }
        if lack.borrow_and_update().is_none() {
            refused = false;
            continue;
        }
        services.set_growing(true);
        let outcome = grow(&services, &dataplane, sizes).await;
        services.set_growing(false);
        match outcome? {
            Outcome::Done => refused = false,
            Outcome::Refused(why) => {
                if !std::mem::replace(&mut refused, true) {
                    warn!(why, "not all Services fit into the maps of the kernel");
                }
                services.refuse_growth(&why);
                tokio::select! {
                    () = shutdown.cancelled() => return Ok(()),
                    () = tokio::time::sleep(PAUSE) => {}
                }
            }
        }
    }
}

/// What became of a need for room.
enum Outcome {
    /// There is room, or will be when what was freed just now may be had again.
    Done,
    /// There is not, and why.
    Refused(String),
}

/// Makes room for all that is known, if that can be. After an error what is attached may be of two generations.
async fn grow(services: &Services, dataplane: &Arc<Dataplane>, sizes: Sizes) -> Result<Outcome> {
    let (now, need) = (services.room(), services.need());
    let Some(room) = sizes.grown(now, need) else {
        return Ok(if exceeds(need, now) {
            Outcome::Refused(most(now))
        } else {
            Outcome::Done
        });
    };
    // Backends first, and by themselves: flows name them, and programs of both generations have to know those of all
    // flows that either of them begins.
    let backends = Room {
        backends: room.backends,
        ..now
    };
    let steps = [Step::Backends(backends), Step::Tables(room)];
    for step in steps {
        let needless = match step {
            Step::Backends(room) => room == now,
            Step::Tables(room) => room == backends,
        };
        if needless {
            continue;
        }
        let begun = std::time::Instant::now();
        let loading = dataplane.clone();
        // The kernel checks programs for as long as a second.
        let loaded =
            tokio::task::spawn_blocking(move || loading.programs.blocking_lock().grown(step)).await;
        let (grown, maps) = match loaded.context("loading programs panicked")? {
            Ok(loaded) => loaded,
            Err(error) => return Ok(Outcome::Refused(format!("{error:#}"))),
        };
        let loaded = begun.elapsed();
        take_over(services, dataplane, grown, maps, step)
            .await
            .context("programs with larger maps could not take over from those before")?;
        let all = begun.elapsed();
        info!(
            ?now,
            ?need,
            ?step,
            ?loaded,
            ?all,
            "the maps of Services grew"
        );
    }
    Ok(Outcome::Done)
}

/// Fills the maps, and has the programs that know them take the place of those before.
async fn take_over(
    services: &Services,
    dataplane: &Arc<Dataplane>,
    grown: Grown,
    mut maps: ServiceMaps,
    step: Step,
) -> Result<()> {
    let writing = services.clone();
    let kept = match step {
        Step::Backends(_) => {
            let copied = tokio::task::spawn_blocking(move || {
                writing.copy_backends(&mut maps).map(|()| maps)
            });
            Some(copied.await.context("copying backends panicked")??)
        }
        Step::Tables(_) => {
            let written = tokio::task::spawn_blocking(move || writing.rewrite(maps));
            written.await.context("writing Services panicked")??;
            None
        }
    };
    dataplane.programs.lock().await.replace(grown).await?;
    match kept {
        Some(maps) => services.change_backends(maps),
        None => services.go_on(),
    }
    Ok(())
}

/// Whether not all of this fits.
fn exceeds(need: Room, room: Room) -> bool {
    need.frontends > room.frontends
        || need.chunks > room.chunks
        || need.backends > room.backends
        || need.ranges > room.ranges
}

fn most(room: Room) -> String {
    format!(
        "{} frontends, {} chunks of slots, {} backends and {} source ranges are the most that there may be, or as many as are needed",
        room.frontends, room.chunks, room.backends, room.ranges
    )
}
