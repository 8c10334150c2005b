//! Map keys, values and events: the only code that both sides of the kernel boundary share.
#![no_std]
