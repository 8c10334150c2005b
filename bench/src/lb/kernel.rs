//! The kernel's side of `xdp-lb`: programs by number, empty ones for the floor, and runs of them (`BPF_PROG_TEST_RUN`);
//! the agent's maps by number.

use std::io::Error;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};

const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const PROG_TEST_RUN: libc::c_int = 10;
const LINK_CREATE: libc::c_int = 28;
/// `BPF_XDP`.
const ATTACH_XDP: u32 = 37;
/// `BPF_F_TEST_XDP_LIVE_FRAMES`.
const LIVE_FRAMES: u32 = 2;
const REDIRECT: i32 = 23;
const PROG_GET_FD_BY_ID: libc::c_int = 13;
const SCHED_CLS: u32 = 3;
const XDP: u32 = 6;
const ARRAY: u32 = 2;
const PROG_ARRAY: u32 = 3;
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

/// The part for attaching a program.
#[repr(C)]
#[derive(Default)]
struct Link {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
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
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// The part for making a map.
#[repr(C)]
#[derive(Default)]
struct Create {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    pad: u32,
}

/// The part for setting an entry.
#[repr(C)]
#[derive(Default)]
struct Update {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

impl Kind {
    /// What the loader may have said about where a program is to be attached.
    pub fn attach_types(self) -> &'static [u32] {
        match self {
            // BPF_XDP, or nothing.
            Self::Xdp => &[37, 0],
            // Nothing, or one of BPF_TCX_INGRESS and BPF_TCX_EGRESS.
            Self::Classifier => &[0, 46, 47],
        }
    }
}

/// A map with one entry.
pub struct Map(OwnedFd);

impl Map {
    /// An array.
    pub fn array(value_size: u32) -> Result<Self> {
        Self::new(ARRAY, value_size)
    }

    /// A table of programs to jump into.
    pub fn programs() -> Result<Self> {
        Self::new(PROG_ARRAY, 4)
    }

    fn new(map_type: u32, value_size: u32) -> Result<Self> {
        let mut attr = Create {
            map_type,
            key_size: 4,
            value_size,
            max_entries: 1,
            ..Default::default()
        };
        let fd = bpf(MAP_CREATE, &mut attr).context("could not make a map")?;
        // SAFETY: the kernel just gave this descriptor, and nobody else has it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }

    /// Sets its entry; `value` is as long as the map's values are.
    pub fn set(&self, value: &[u8]) -> Result<()> {
        let key = 0_u32;
        let mut attr = Update {
            map_fd: self.fd() as u32,
            key: std::ptr::from_ref(&key) as u64,
            value: value.as_ptr() as u64,
            ..Default::default()
        };
        bpf(MAP_UPDATE, &mut attr)
            .context("could not set an entry")
            .map(drop)
    }

    /// Its descriptor.
    pub fn fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
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
    /// The device by which packets are said to have come to this node; 0 for those of its own processes.
    received: u32,
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
        Self::load(kind, &[0xb7 | verdict << 32, 0x95], kind.attach_types()[0])
    }

    /// One that drops every frame.
    pub fn drop() -> Result<Self> {
        // r0 = XDP_DROP; exit.
        Self::load(Kind::Xdp, &[0xb7 | 1 << 32, 0x95], ATTACH_XDP)
    }

    /// One that sends every frame to a device.
    pub fn redirect(device: u32) -> Result<Self> {
        // r1 = device; r2 = 0; call bpf_redirect; exit.
        let code = [
            0x01b7 | u64::from(device) << 32,
            0x02b7,
            0x85 | (REDIRECT as u64) << 32,
            0x95,
        ];
        Self::load(Kind::Xdp, &code, ATTACH_XDP)
    }

    /// One of these instructions.
    pub fn load(kind: Kind, instructions: &[u64], expected_attach_type: u32) -> Result<Self> {
        let mut log = vec![0_u8; 1 << 16];
        let mut attr = Load {
            prog_type: match kind {
                Kind::Xdp => XDP,
                Kind::Classifier => SCHED_CLS,
            },
            insn_cnt: instructions.len() as u32,
            insns: instructions.as_ptr() as u64,
            license: c"MIT".as_ptr() as u64,
            log_level: 1,
            log_size: log.len() as u32,
            log_buf: log.as_mut_ptr() as u64,
            expected_attach_type,
            ..Default::default()
        };
        let fd = bpf(PROG_LOAD, &mut attr).with_context(|| {
            let log = String::from_utf8_lossy(&log);
            let log = log.trim_end_matches('\0').trim_end();
            let last: Vec<&str> = log.lines().rev().take(3).collect();
            format!("the kernel refused a program of the benchmark: {last:?}")
        })?;
        Ok(Self::new(fd, kind))
    }

    fn new(fd: libc::c_long, kind: Kind) -> Self {
        // SAFETY: the kernel just gave this descriptor, and nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        Self {
            fd,
            kind,
            received: 0,
        }
    }

    /// From here on packets are said to have come to this node by a device of this number.
    pub fn receive_by(&mut self, device: u32) {
        self.received = device;
    }

    /// Its descriptor.
    pub fn fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }

    /// Attaches it to a device of this network namespace; it stays until the link is dropped.
    pub fn attach(&self, device: u32) -> Result<OwnedFd> {
        let mut attr = Link {
            prog_fd: self.fd.as_raw_fd() as u32,
            target_ifindex: device,
            attach_type: ATTACH_XDP,
            ..Default::default()
        };
        let fd = bpf(LINK_CREATE, &mut attr).context("could not attach a program")?;
        // SAFETY: the kernel just gave this descriptor, and nobody else has it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    /// Runs it on so many live frames that come in at a device; nanoseconds of all.
    pub fn run_live(&self, frame: &[u8], device: u32, frames: u32) -> Result<f64> {
        let mut xdp = [0_u32; XDP_WORDS];
        xdp[1] = frame.len() as u32;
        xdp[3] = device;
        let mut attr = TestRun {
            prog_fd: self.fd.as_raw_fd() as u32,
            data_size_in: frame.len() as u32,
            data_in: frame.as_ptr() as u64,
            repeat: frames,
            ctx_size_in: size_of_val(&xdp) as u32,
            ctx_in: xdp.as_ptr() as u64,
            flags: LIVE_FRAMES,
            ..Default::default()
        };
        let began = std::time::Instant::now();
        bpf(PROG_TEST_RUN, &mut attr).context("the kernel did not run the program")?;
        Ok(began.elapsed().as_secs_f64() * 1e9)
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
        skb[SKB_WORDS - 2] = self.received;
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
