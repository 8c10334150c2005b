//! What is taken down when a benchmark ends, fails, or is interrupted.

use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};

/// Commands that undo what was set up, newest last.
static PENDING: Mutex<Vec<(u64, Command)>> = Mutex::new(Vec::new());

/// Keeps a command that an interrupt would run; forgotten when this is dropped.
pub struct OnInterrupt(u64);

impl OnInterrupt {
    /// From now on an interrupt runs this command.
    pub fn run(command: Command) -> Self {
        let mut pending = PENDING.lock().unwrap_or_else(PoisonError::into_inner);
        let id = pending.last().map_or(0, |(id, _)| id + 1);
        pending.push((id, command));
        Self(id)
    }
}

impl Drop for OnInterrupt {
    fn drop(&mut self) {
        let mut pending = PENDING.lock().unwrap_or_else(PoisonError::into_inner);
        pending.retain(|(id, _)| *id != self.0);
    }
}

/// Handles SIGINT and SIGTERM on a thread of their own.
///
/// By handlers, not by blocking them: commands that are started later would inherit that and be deaf to both.
pub fn on_signals() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .context("could not start the runtime that hears signals")?;
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (
            signal(SignalKind::interrupt()).context("could not listen for SIGINT")?,
            signal(SignalKind::terminate()).context("could not listen for SIGTERM")?,
        )
    };
    std::thread::spawn(move || {
        let code = runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => 130,
                _ = terminate.recv() => 143,
            }
        });
        eprintln!("bench: interrupted; taking down what was set up");
        // The lock is kept, so that nothing new is registered while this process ends.
        let mut pending = PENDING.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some((_, mut command)) = pending.pop() {
            if let Err(error) = command.status() {
                eprintln!("bench: could not run {command:?}: {error}");
            }
        }
        std::process::exit(code);
    });
    Ok(())
}
