//! Resolvers' answers: they are kept from pods until the agent has learned of them.

use bytemuck::{Pod, Zeroable};

use crate::ip::Ip;

/// Ports that resolvers may have.
pub const PORTS: usize = 4;

/// Whether, and where from, answers are held.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Listening {
    /// Until then the agent takes what is held, in ns of the monotonic clock: nobody would pass it on after its end.
    pub until: u64,
    /// Ports that resolvers answer from, as pods see them; one of them several times where there are fewer, and 0 where
    /// there is none.
    pub ports: [u16; PORTS],
}

/// Bytes of a frame that can be held.
pub const LONGEST: usize = 2_048;

/// An answer that is held.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct Held {
    /// Who answered, before its address became a Service's.
    pub server: Ip,
    /// Index of the host's end of the pod's veth pair.
    pub ifindex: u32,
    /// Bytes of the frame.
    pub length: u16,
    /// 1 where a process of this node answered.
    pub here: u8,
    /// Always 0.
    pub pad: u8,
    /// The frame as the pod is to get it.
    pub frame: [u8; LONGEST],
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::{offset_of, size_of};

    #[test]
    fn layouts_are_what_the_kernel_side_was_built_with() {
        assert_eq!([size_of::<Listening>(), size_of::<Held>()], [16, 2_072]);
        assert_eq!(
            [offset_of!(Listening, ports), offset_of!(Held, frame)],
            [8, 24]
        );
    }
}
