//! The kernel's side of `xdp-lb`: programs by number, empty ones for the floor, and runs of them (`BPF_PROG_TEST_RUN`).

use std::io::Error;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};

const PROG_LOAD: libc::c_int = 5;
const PROG_TEST_RUN: libc::c_int = 10;
const PROG_GET_FD_BY_ID: libc::c_int = 13;
const SCHED_CLS: u32 = 3;
const XDP: u32 = 6;
/// `struct __sk_buff` up to the index of the device, which is its last field that is given.
const SKB_WORDS: usize = 11;
/// `struct xdp_md`.
const XDP_WORDS: usize = 6;

/// Which kind of program.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub enum Kind {
    /// At the driver.
    Xdp,
    /// tc.
    Classifier,
}

/// The part of `union bpf_attr` for a test run.
#[repr(C)]
#[derive(Default)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    pad: u32,
}

/// The part for loading a program.
#[repr(C)]
#[derive(Default)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

/// The part for finding one by its number.
#[repr(C)]
#[derive(Default)]
struct ById {
    id: u32,
    next: u32,
    open_flags: u32,
    pad: u32,
}

fn bpf<T>(command: libc::c_int, attr: &mut T) -> Result<libc::c_long, Error> {
    // SAFETY: `attr` is a part of `union bpf_attr` of the size that is told, and what it points to lives longer.
    let outcome = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attr),
            size_of::<T>(),
        )
    };
    if outcome < 0 {
        Err(Error::last_os_error())
    } else {
        Ok(outcome)
    }
}

/// A loaded program.
pub struct Program {
    fd: OwnedFd,
    kind: Kind,
}

/// What one run gave.
pub struct Ran {
    /// Nanoseconds of one run, as the kernel measured them around the program.
    pub nanos: u32,
    /// What the program returned.
    pub verdict: u32,
}

impl Program {
    /// One that is loaded already.
    pub fn by_id(id: u32, kind: Kind) -> Result<Self> {
        let mut attr = ById {
            id,
            ..Default::default()
        };
        let fd = bpf(PROG_GET_FD_BY_ID, &mut attr)
            .with_context(|| format!("could not open the eBPF program {id}"))?;
        Ok(Self::new(fd, kind))
    }

    /// One that lets every packet pass and does nothing else.
    pub fn empty(kind: Kind) -> Result<Self> {
        // r0 = XDP_PASS or TC_ACT_OK; exit. See linux/bpf.h for the form of instructions.
        let verdict: u64 = match kind {
            Kind::Xdp => 2,
            Kind::Classifier => 0,
        };
        let instructions = [0xb7 | verdict << 32, 0x95_u64];
        let mut attr = Load {
            prog_type: match kind {
                Kind::Xdp => XDP,
                Kind::Classifier => SCHED_CLS,
            },
            insn_cnt: instructions.len() as u32,
            insns: instructions.as_ptr() as u64,
            license: c"MIT".as_ptr() as u64,
            ..Default::default()
        };
        let fd = bpf(PROG_LOAD, &mut attr).context("the kernel refused an empty program")?;
        Ok(Self::new(fd, kind))
    }

    fn new(fd: libc::c_long, kind: Kind) -> Self {
        // SAFETY: the kernel just gave this descriptor, and nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        Self { fd, kind }
    }

    /// Runs it `repeat` times on a frame that comes in at a device; the frame as it left goes to `out`, if there is
    /// one, cut to its length.
    pub fn run(
        &self,
        frame: &[u8],
        device: u32,
        repeat: u32,
        out: Option<&mut Vec<u8>>,
    ) -> Result<Ran> {
        let mut xdp = [0_u32; XDP_WORDS];
        xdp[1] = frame.len() as u32;
        xdp[3] = device;
        let mut skb = [0_u32; SKB_WORDS];
        skb[SKB_WORDS - 1] = device;
        let context: &[u32] = match self.kind {
            Kind::Xdp => &xdp,
            Kind::Classifier => &skb,
        };
        let mut attr = TestRun {
            prog_fd: self.fd.as_raw_fd() as u32,
            data_size_in: frame.len() as u32,
            data_in: frame.as_ptr() as u64,
            repeat,
            ctx_size_in: size_of_val(context) as u32,
            ctx_in: context.as_ptr() as u64,
            ..Default::default()
        };
        if let Some(out) = &out {
            attr.data_out = out.as_ptr() as u64;
            attr.data_size_out = out.len() as u32;
        }
        bpf(PROG_TEST_RUN, &mut attr).context("the kernel did not run the program")?;
        if let Some(out) = out {
            ensure!(
                attr.data_size_out as usize <= out.len(),
                "the program made the frame longer than there is room"
            );
            out.truncate(attr.data_size_out as usize);
        }
        Ok(Ran {
            nanos: attr.duration,
            verdict: attr.retval,
        })
    }
}
