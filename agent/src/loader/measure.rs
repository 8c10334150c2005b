//! What each program costs: instructions that the kernel's check walks through, stack, and machine code.

use std::path::Path;

use anyhow::{Context, Result, bail};
use aya::programs::{Program, ProgramError, ProgramInfo};
use aya::{EbpfLoader, VerifierLogLevel};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::{mount, object};

/// One program, and what the kernel says of it.
pub struct Measured {
    /// Its name in the object.
    pub name: String,
    /// Its figures, or why the kernel refuses it.
    pub outcome: Result<Figures>,
}

/// What a program costs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Figures {
    /// Instructions that the check walked through.
    pub instructions: u32,
    /// Bytes of stack of the program and of each of its functions.
    pub stack: Vec<u32>,
    /// Bytes of machine code; 0 where the kernel interprets programs.
    pub machine_code: u32,
}

/// Has the kernel check every program of the object, each by itself: one that is refused does not hide the others.
/// The maps are pinned in a BPF filesystem that is mounted on `dir`, and that the caller unmounts.
///
/// Each is told of as soon as it is known. The process should have no other thread that opens files meanwhile.
pub fn measure(dir: &Path, mut tell: impl FnMut(Measured)) -> Result<()> {
    mount(dir)?;
    let mut ebpf = EbpfLoader::new()
        .default_map_pin_directory(dir)
        .verifier_log_level(VerifierLogLevel::STATS)
        .load(object()?)
        .context("the kernel refused the eBPF maps (is this root?)")?;
    for (name, program) in ebpf.programs_mut() {
        tell(Measured {
            name: name.to_owned(),
            outcome: figures(program),
        });
    }
    Ok(())
}

fn figures(program: &mut Program) -> Result<Figures> {
    let stack = stack(program)?;
    load(program)?;
    let info = info(program)?;
    Ok(Figures {
        instructions: info
            .verified_instruction_count()
            .context("this kernel does not count what it checks (Linux 5.16 does)")?,
        stack,
        machine_code: info.size_jitted(),
    })
}

/// The check's statistics, which are handed out only where the program is not loaded in the end: while this process
/// may open no further file, the check succeeds and then nothing can be made of its outcome.
fn stack(program: &mut Program) -> Result<Vec<u32>> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("could not read limits")?;
    let probe = std::fs::File::open("/dev/null").context("could not open /dev/null")?;
    let lowest = std::os::fd::AsRawFd::as_raw_fd(&probe);
    drop(probe);
    let lowest = lowest.try_into().context("a file has no number")?;
    setrlimit(Resource::RLIMIT_NOFILE, lowest, hard).context("could not limit open files")?;
    let outcome = load(program);
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).context("could not allow files again")?;
    match outcome.as_ref().map_err(|error| error.downcast_ref()) {
        Err(Some(ProgramError::LoadError {
            io_error,
            verifier_log,
        })) if io_error.raw_os_error() == Some(libc::EMFILE) => depths(&verifier_log.to_string())
            .with_context(|| {
                format!("the kernel's statistics tell no stack depth: {verifier_log}")
            }),
        Err(_) => Err(outcome.err().unwrap_or_else(|| anyhow::anyhow!("unknown"))),
        Ok(()) => bail!("the kernel gave out a program beyond the limit of open files"),
    }
}

/// Reads the line `stack depth 216+0+32`.
fn depths(log: &str) -> Option<Vec<u32>> {
    let depths = log
        .lines()
        .find_map(|line| line.strip_prefix("stack depth "))?;
    // Newer kernels append the deepest chain of calls in words.
    let depths = depths.split_whitespace().next()?;
    depths.split('+').map(|depth| depth.parse().ok()).collect()
}

/// Loads a program of any kind that the object has.
fn load(program: &mut Program) -> Result<()> {
    let mut tries = super::TRIES;
    loop {
        let outcome = match program {
            Program::SchedClassifier(program) => program.load(),
            Program::Xdp(program) => program.load(),
            Program::CgroupSockAddr(program) => program.load(),
            Program::CgroupSock(program) => program.load(),
            Program::CgroupSockopt(program) => program.load(),
            Program::CgroupSkb(program) => program.load(),
            Program::SockOps(program) => program.load(),
            Program::SkLookup(program) => program.load(),
            other => bail!("no one loads programs of the kind {:?}", other.prog_type()),
        };
        match outcome {
            Err(error) if super::interrupted(&error) && tries > 0 => tries -= 1,
            outcome => return Ok(outcome?),
        }
    }
}

fn info(program: &Program) -> Result<ProgramInfo> {
    let info = match program {
        Program::SchedClassifier(program) => program.info(),
        Program::Xdp(program) => program.info(),
        Program::CgroupSockAddr(program) => program.info(),
        Program::CgroupSock(program) => program.info(),
        Program::CgroupSockopt(program) => program.info(),
        Program::CgroupSkb(program) => program.info(),
        Program::SockOps(program) => program.info(),
        Program::SkLookup(program) => program.info(),
        other => bail!("no one loads programs of the kind {:?}", other.prog_type()),
    };
    info.context("the kernel tells nothing of a program")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stacks_of_all_functions_are_read() {
        let log = "verification time 5 usec\nstack depth 216+0+32\nprocessed 12 insns";
        assert_eq!(depths(log), Some(vec![216, 0, 32]));
        assert_eq!(depths("stack depth 8 max 8"), Some(vec![8]));
        assert_eq!(depths("processed 12 insns"), None);
    }
}
