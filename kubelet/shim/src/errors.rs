//! Keeps what `libcontainer` reports as it fails. Its error values name the
//! step; only its log events name the cause, and those come from the forked
//! processes in which the step failed.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Seek, Write as _};
use std::os::fd::FromRawFd;
use std::sync::OnceLock;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Memory that this process and its children share: they all append to it.
static NOTES: OnceLock<File> = OnceLock::new();

struct Collector;

impl Subscriber for Collector {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR
    }

    fn max_level_hint(&self) -> Option<tracing::level_filters::LevelFilter> {
        Some(tracing::level_filters::LevelFilter::ERROR)
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = Text::default();
        event.record(&mut text);
        let line = format!("{}{}\n", text.message, text.fields);
        eprint!("{line}");
        if let Some(mut notes) = NOTES.get() {
            let _ = notes.write_all(line.as_bytes());
        }
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

/// Starts collecting; once per process.
pub(crate) fn install() {
    // SAFETY: memfd_create with a NUL-terminated name; the descriptor is ours.
    let fd = unsafe { libc::memfd_create(c"notes".as_ptr(), libc::MFD_CLOEXEC) };
    if fd >= 0 {
        // SAFETY: the descriptor was just made and belongs to nothing else.
        let _ = NOTES.set(unsafe { File::from_raw_fd(fd) });
    }
    let _ = tracing::subscriber::set_global_default(Collector);
}

/// Forgets what was collected before.
pub(crate) fn clear() {
    if let Some(mut notes) = NOTES.get() {
        let _ = notes.set_len(0);
        let _ = notes.rewind();
    }
}

/// The first thing that was reported: the cause of all that followed.
pub(crate) fn first() -> Option<String> {
    let mut notes = NOTES.get()?;
    let mut text = String::new();
    notes.rewind().ok()?;
    notes.read_to_string(&mut text).ok()?;
    text.lines()
        .find(|l| !l.trim().is_empty())
        .map(str::to_owned)
}
