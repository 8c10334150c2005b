//! Map keys, values and events: the only code that both sides of the kernel boundary share.
//!
//! Ports and the words of addresses are in network byte order, as packets and the kernel's socket structures hold them, and
//! stand in native integers: compare them, don't count with them.
#![no_std]

pub mod dns;
pub mod flow;
pub mod ip;
pub mod message;
pub mod nat;
pub mod policy;
pub mod service;
pub mod table;

/// Raised whenever a struct here changes, so that maps of another layout are never adopted.
pub const LAYOUT: u32 = 13;

/// TCP, as IP numbers it.
pub const TCP: u8 = 6;
/// UDP.
pub const UDP: u8 = 17;
/// ICMP.
pub const ICMP: u8 = 1;
/// ICMP of IPv6.
pub const ICMP6: u8 = 58;
/// SCTP.
pub const SCTP: u8 = 132;
