//! Programs on several CPUs at once, which enter flows in one table.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};

use bytemuck::Zeroable;
use xebec_dataplane_common::policy::{
    ALLOW, Chains, Decision, NO_SHAPE, RuleKey, SET_DENIES, SHAPE_IDENTITY, SHAPE_PROTOCOL, SHAPES,
    Set,
};
use xebec_policy::kernel::{Endpoint, PolicyKernel};

use super::{
    FAMILIES, Kernel, OK, REDIRECT, SHOT, client, left_out, node, pod, settings, source_port, tcp,
    udp,
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
pub(super) fn run(program: &OwnedFd, device: u32, frame: &[u8]) -> (u32, Vec<u8>) {
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

/// While the maps of policy are replaced by larger ones, each packet is judged as before, and what is written is there.
#[test]
fn maps_of_policy_grow_and_no_packet_sees_half() {
    const MANY: u32 = 20_000;
    if left_out() {
        return;
    }
    let mut kernel = Kernel::own();
    kernel.isolate_pod_egress(80);
    let program = kernel.program("xebec_from_pod");
    let (done, f) = (AtomicBool::new(false), FAMILIES[0]);
    let judged = std::thread::scope(|scope| {
        let judging = scope.spawn(|| {
            let mut judged = 0_u32;
            while !done.load(Ordering::Relaxed) {
                // Each begins a flow.
                let own = 1_024 + (judged % 60_000) as u16;
                let of = |port| run(&program, 1, &tcp(pod(f), client(f), own, port, "S").bytes()).0;
                assert!([OK, REDIRECT].contains(&of(80)), "{judged}");
                assert_eq!(of(81), SHOT, "{judged}");
                judged += 1;
            }
            judged
        });
        let rule = |number: u32| {
            let key = RuleKey {
                set: 1_000 + number,
                ..RuleKey::zeroed()
            };
            let decision = Decision {
                verdict: number,
                rule: 1,
            };
            (key, decision)
        };
        let policy = kernel.policy();
        for first in (0..MANY).step_by(100) {
            let rules: Vec<_> = (first..first + 100).map(rule).collect();
            policy.set_rules(&rules).unwrap();
            for number in first..first + 100 {
                let address = std::net::Ipv4Addr::from_bits(0x0b00_0000 + number);
                policy.set_identity(address.into(), number).unwrap();
                policy.set_set(1_000 + number, Set::zeroed()).unwrap();
            }
        }
        done.store(true, Ordering::Relaxed);
        judging.join().unwrap()
    });
    assert!(judged > 1_000, "{judged}");
    let tables = kernel.tables();
    let (rules, identities) = (tables.rules.now(), tables.identities.now());
    for number in 0..MANY {
        let key = RuleKey {
            set: 1_000 + number,
            ..RuleKey::zeroed()
        };
        assert_eq!(rules.get(&key).map(|found| found.verdict), Some(number));
        let address = std::net::Ipv4Addr::from_bits(0x0b00_0000 + number);
        let address = std::net::IpAddr::from(address).into();
        let found = identities.get(&address);
        assert_eq!(found.map(|found| found.identity), Some(number));
    }
}

/// A pod that is pointed at other sets all the while, as its neighbours are, is never unknown and never judged by theirs;
/// nor is whom it talks to, told of again and again, taken for another.
/// Where its sets stood in the entry of a hash map, one packet of some two million was lost.
#[test]
fn a_pod_whose_sets_change_is_always_known() {
    const OTHERS: u32 = 3_500;
    if left_out() {
        return;
    }
    let mut kernel = Kernel::own();
    let program = kernel.program("xebec_from_pod");
    let (done, f) = (AtomicBool::new(false), FAMILIES[0]);
    let endpoint = kernel.policy().endpoint(pod(f)).unwrap().unwrap();
    // Its rules change each time, and mean the same.
    let mut both = [endpoint; 2];
    both[0].chains.egress = [11, 0, 0, 0];
    both[1].chains.egress = [11, 0, 0, 0];
    both[1].chains.ingress[1] = 9;
    // Theirs is a set that lets nothing through.
    let other = Endpoint {
        chains: Chains {
            egress: [0, 9, 0, 0],
            ..Chains::default()
        },
        ..endpoint
    };
    let address = |number: u32| std::net::Ipv4Addr::from_bits(0x0b00_0000 + number).into();
    let denies = Set {
        shapes: [NO_SHAPE; SHAPES],
        flags: SET_DENIES,
    };
    kernel.policy().set_set(9, denies).unwrap();
    // The pod may talk to those of one identity.
    let shape = SHAPE_IDENTITY | SHAPE_PROTOCOL | 16;
    let key = RuleKey {
        set: 11,
        peer: 5_001,
        port: 80_u16.to_be(),
        protocol: 6,
        shape,
    };
    let allows = Decision {
        verdict: ALLOW,
        rule: 1,
    };
    let mut allowing = denies;
    allowing.shapes[0] = shape;
    kernel.policy().set_rules(&[(key, allows)]).unwrap();
    kernel.policy().set_set(11, allowing).unwrap();
    for number in 0..OTHERS {
        let policy = kernel.policy();
        policy.set_endpoint(address(number), other).unwrap();
        policy.set_identity(address(number), 5_002).unwrap();
    }
    kernel.policy().set_endpoint(pod(f), both[0]).unwrap();
    kernel.policy().set_identity(client(f), 5_001).unwrap();
    let (judged, lost) = std::thread::scope(|scope| {
        let judging = scope.spawn(|| {
            let (mut judged, mut lost) = (0_u32, 0);
            while !done.load(Ordering::Relaxed) {
                let own = 1_024 + (judged % 60_000) as u16;
                let frame = tcp(pod(f), client(f), own, 80, "S").bytes();
                lost += u32::from(run(&program, 1, &frame).0 == SHOT);
                judged += 1;
            }
            (judged, lost)
        });
        let policy = kernel.policy();
        let begun = std::time::Instant::now();
        let mut number = 0;
        while begun.elapsed().as_secs() < 5 {
            let own = both[number as usize % 2];
            policy.set_endpoint(pod(f), own).unwrap();
            policy.set_identity(client(f), 5_001).unwrap();
            policy
                .set_identity(address(number % OTHERS), 5_002)
                .unwrap();
            policy
                .set_endpoint(address(number % OTHERS), other)
                .unwrap();
            number += 1;
        }
        done.store(true, Ordering::Relaxed);
        judging.join().unwrap()
    });
    assert!(judged > 1_000, "{judged}");
    assert_eq!(lost, 0, "of {judged}");
}
