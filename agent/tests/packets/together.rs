//! Programs on several CPUs at once, which enter flows in one table.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Barrier;

use super::{
    FAMILIES, Kernel, OK, SHOT, client, left_out, node, pod, settings, source_port, tcp, udp,
};

const CPUS: usize = 2;
/// Ports that there are, and flows that ask for one, of all CPUs together.
const PORTS: u16 = 64;
const ROUNDS: usize = 300;

/// `BPF_PROG_TEST_RUN`, and its part of `union bpf_attr`.
const TEST_RUN: libc::c_long = 10;
#[repr(C)]
#[derive(Default)]
struct TestRun {
    program: u32,
    verdict: u32,
    size_in: u32,
    size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_size_in: u32,
    context_size_out: u32,
    context_in: u64,
    context_out: u64,
    rest: [u32; 4],
}

/// What a program makes of a frame: its verdict and the frame.
fn run(program: &OwnedFd, device: u32, frame: &[u8]) -> (u32, Vec<u8>) {
    // The eleventh word of struct __sk_buff is the device.
    let mut context = [0_u32; 48];
    context[10] = device;
    let mut out = vec![0; frame.len() + 256];
    let mut order = TestRun {
        program: program.as_raw_fd() as u32,
        size_in: frame.len() as u32,
        size_out: out.len() as u32,
        data_in: frame.as_ptr() as u64,
        data_out: out.as_mut_ptr() as u64,
        repeat: 1,
        context_size_in: size_of_val(&context) as u32,
        context_in: context.as_ptr() as u64,
        ..TestRun::default()
    };
    // SAFETY: the kernel reads and writes no more than the sizes that it is told of.
    let outcome = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            TEST_RUN,
            &raw mut order,
            size_of::<TestRun>(),
        )
    };
    assert_eq!(outcome, 0, "{}", std::io::Error::last_os_error());
    out.truncate(order.size_out as usize);
    (order.verdict, out)
}

/// Runs a program on frames on each CPU, on all at the same time.
fn together(
    kernel: &mut Kernel,
    program: &str,
    frames: [Vec<Vec<u8>>; CPUS],
) -> [Vec<(u32, Vec<u8>)>; CPUS] {
    let program = kernel.program(program);
    let barrier = Barrier::new(CPUS);
    std::thread::scope(|scope| {
        let threads = frames.map(|frames| {
            let (program, barrier) = (&program, &barrier);
            scope.spawn(move || {
                barrier.wait();
                let ran = frames.iter().map(|frame| run(program, 1, frame));
                ran.collect::<Vec<_>>()
            })
        });
        threads.map(|thread| thread.join().unwrap())
    })
}

/// Two flows to one destination never have one port, however close they follow.
#[test]
fn no_port_is_given_twice() {
    if left_out() {
        return;
    }
    let mut kernel = Kernel::shared();
    kernel.settings(settings(61_000, PORTS));
    let mut dropped = 0;
    for round in 0..ROUNDS {
        let f = FAMILIES[round % 2];
        let half = PORTS / CPUS as u16;
        let frames = [0, 1].map(|cpu| {
            let own = (0..half).map(|number| 1_024 + cpu * half + number);
            own.map(|own| udp(pod(f), client(f), own, 53).bytes())
                .collect::<Vec<_>>()
        });
        let mut given = BTreeSet::new();
        for (verdict, out) in together(&mut kernel, "xebec_to_network", frames).concat() {
            match verdict {
                SHOT => dropped += 1,
                _ => {
                    assert_eq!(verdict, OK);
                    let port = source_port(&out);
                    assert!(given.insert(port), "round {round}: {port} is given twice");
                }
            }
        }
        kernel.tables().flows.clear();
    }
    // Two that look for the last port at once may both go without.
    let all = ROUNDS * usize::from(PORTS);
    assert!(dropped * 100 < all, "{dropped} of {all} flows got no port");
}

/// One flow that begins on several CPUs at once is one flow from then on.
#[test]
fn a_flow_that_begins_twice_is_one() {
    if left_out() {
        return;
    }
    for f in FAMILIES {
        let mut kernel = Kernel::shared();
        kernel.settings(settings(61_000, 4_000));
        let sent: Vec<_> = (0..1_000)
            .map(|number| tcp(pod(f), client(f), 2_000 + number, 443, "S").bytes())
            .collect();
        let frames = [sent.clone(), sent.clone()];
        for (verdict, _) in together(&mut kernel, "xebec_to_network", frames).concat() {
            assert_eq!(verdict, OK);
        }
        let program = kernel.program("xebec_to_network");
        let mut given = BTreeSet::new();
        for frame in &sent {
            let outs = [0, 1, 2].map(|_| run(&program, 1, frame));
            assert!(outs.iter().all(|out| *out == outs[0]));
            // Its answer comes to it.
            let port = source_port(&outs[0].1);
            assert!(given.insert(port), "{port} is two flows'");
            let own = source_port(frame);
            let answer = tcp(client(f), node(f), 443, port, "SA").bytes();
            let (verdict, out) = kernel.run("xebec_from_network", &answer);
            let meant = tcp(client(f), pod(f), 443, own, "SA").bytes();
            assert_eq!((verdict, out), (OK, meant), "the answer to {own}");
        }
    }
}
