//! Messages that pods exchange, as they are told of: an [`Event`](crate::flow::Event) with the message behind it.

use crate::flow::Event;

/// Bytes of a message that most have room in.
pub const SHORT: usize = 512;
/// Bytes of a message that are told of at most.
pub const LONG: usize = 2_048;

/// An event (`AT_MESSAGE`) with a message; `Event::length` says how many of its bytes are there.
#[repr(C)]
pub struct Message<const ROOM: usize> {
    /// Who sent it to whom.
    pub event: Event,
    /// What was sent, from its beginning.
    pub bytes: [u8; ROOM],
}

/// What messages of HTTP/1 begin with (RFC 9112): methods and the answers' protocol, as far as four bytes go.
pub const HTTP_BEGINNINGS: [[u8; 4]; 10] = [
    *b"HTTP", *b"GET ", *b"POST", *b"PUT ", *b"HEAD", *b"DELE", *b"PATC", *b"OPTI", *b"CONN",
    *b"TRAC",
];

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::{offset_of, size_of};

    #[test]
    fn layouts_are_what_the_kernel_side_was_built_with() {
        assert_eq!(
            [
                offset_of!(Message<SHORT>, bytes),
                size_of::<Message<SHORT>>(),
                size_of::<Message<LONG>>()
            ],
            [128, 640, 2_176]
        );
    }
}
