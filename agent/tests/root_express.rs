//! Frames through the XDP program, by `BPF_PROG_TEST_RUN`: byte for byte what tc makes of them, or untouched.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(dead_code, reason = "the packets are those of other tests, too")]

mod packets;

use packets::{Kernel, OK, PASS, client, icmp, node, tcp, udp, web};

/// A client outside, a node port, and a backend on this node: rewritten, and on to the stack.
#[test]
fn to_a_pod_of_this_node() {
    if packets::left_out() {
        return;
    }
    let mut without_checksum = udp(client(), node(), 4000, 30_080);
    without_checksum.no_checksum = true;
    for sent in [
        tcp(client(), node(), 4000, 30_080, "S"),
        udp(client(), node(), 4000, 30_080),
        without_checksum,
    ] {
        let mut kernel = Kernel::new();
        kernel.node_port(30_080, web(), 8080);
        let mut expected = sent.clone();
        (expected.destination, expected.destination_port) = (web(), 8080);
        let (verdict, out) = kernel.run_early(0, &sent.bytes());
        assert_eq!((verdict, &out), (PASS, &expected.bytes()), "{sent:?}");
        // tc sees it next, and does not translate it again.
        assert_eq!(kernel.run("xebec_from_network", &out), (OK, out));
        assert_eq!(kernel.translated(), (0, 1));
        // The answer of the pod finds the translation.
        let mut answer = expected.answer();
        answer.no_checksum = sent.no_checksum;
        let mut back = answer.clone();
        (back.source, back.source_port) = (node(), 30_080);
        assert_eq!(
            kernel.run("xebec_to_network", &answer.bytes()),
            (OK, back.bytes())
        );
    }
}

#[test]
fn what_is_not_simple_or_not_translated_passes_untouched() {
    if packets::left_out() {
        return;
    }
    let mut kernel = Kernel::new();
    kernel.node_port(30_080, web(), 8080);
    let simple = || tcp(client(), node(), 4000, 30_080, "S");
    let mut options = simple();
    options.options = vec![1, 1, 1, 0];
    let (mut first, mut later, mut last) = (simple(), simple(), simple());
    first.fragment(7, 0, true);
    later.fragment(7, 64, false);
    last.ttl = 1;
    let quoted = udp(node(), client(), 30_080, 4000).bytes()[14..].to_vec();
    let mut tagged = simple().bytes();
    tagged.splice(12..12, [0x81, 0, 0, 7]);
    let mut other = simple().bytes();
    other[12..14].copy_from_slice(&0x86dd_u16.to_be_bytes());
    for frame in [
        options.bytes(),
        first.bytes(),
        later.bytes(),
        last.bytes(),
        tagged,
        other,
        tcp(client(), node(), 4000, 22, "S").bytes(),
        tcp(client(), node(), 4000, 30_080, "A").bytes(),
        tcp(client(), web(), 4000, 30_080, "S").bytes(),
        icmp(client(), node(), 3, 3, &quoted).bytes(),
        icmp(client(), node(), 8, 0, &[0, 1, 0, 1]).bytes(),
    ] {
        assert_eq!(
            kernel.run_early(0, &frame),
            (PASS, frame.clone()),
            "{frame:02x?}"
        );
    }
    let whole = simple().bytes();
    for length in 14..54 {
        let cut = &whole[..length];
        assert_eq!(kernel.run_early(0, cut), (PASS, cut.to_vec()), "{length}");
    }
    kernel.no_backends(30_080);
    assert_eq!(kernel.run_early(0, &whole), (PASS, whole.clone()));
    assert_eq!(kernel.translated(), (0, 0));
}
