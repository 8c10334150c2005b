//! The kernel side of the dataplane: one file per hook.
#![no_std]
#![no_main]
// For one instruction, in `table`.
#![feature(asm_experimental_arch)]

mod balance;
mod crc;
mod direct;
mod errors;
mod express;
mod flow;
mod frame;
mod hash;
mod hold;
mod host;
mod lookup;
mod maps;
mod message;
mod nat;
mod network;
mod packet;
mod pod;
mod policy;
mod refuse;
mod rewrite;
mod route;
mod scratch;
mod socket;
mod table;
mod tell;
mod translate;
mod verdicts;
mod way;

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// Some helpers may only be called by programs under the GPL.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
