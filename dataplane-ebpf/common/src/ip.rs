//! Addresses of both families in one form.

use bytemuck::{Pod, Zeroable};

/// An IPv6 address, or an IPv4 address as the IPv6 address that stands for it (`::ffff:a.b.c.d`, RFC 4291, 2.5.5.2).
/// One form means one set of maps and one path through the programs for both families.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct Ip(pub [u32; 4]);

/// The third word of an IPv4 address.
const MAPPED: u32 = 0x0000_ffff_u32.to_be();

impl Ip {
    /// `::`, which is no address of anything.
    pub const NONE: Self = Self([0; 4]);
    /// Stands for all node addresses of IPv4: the address of a node port's frontend.
    pub const EVERY_V4: Self = Self::v4(0);
    /// Stands for all node addresses of IPv6.
    pub const EVERY_V6: Self = Self::NONE;

    /// An IPv4 address.
    #[inline(always)]
    pub const fn v4(address: u32) -> Self {
        Self([0, 0, MAPPED, address])
    }

    /// The same, word by word: LLVM makes of a plain copy between maps' entries a call that goes byte by byte.
    #[inline(always)]
    pub const fn words(&self) -> Self {
        Self([self.0[0], self.0[1], self.0[2], self.0[3]])
    }

    /// 0 if it is the same as another: for who compares more than addresses, and with one branch for all.
    #[inline(always)]
    pub const fn differs(&self, other: &Self) -> u32 {
        (self.0[0] ^ other.0[0])
            | (self.0[1] ^ other.0[1])
            | (self.0[2] ^ other.0[2])
            | (self.0[3] ^ other.0[3])
    }

    /// Whether it is an IPv4 address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == MAPPED
    }

    /// The IPv4 address, if it is one; otherwise the last word.
    #[inline(always)]
    pub const fn as_v4(&self) -> u32 {
        self.0[3]
    }

    /// Whether there is an address.
    #[inline(always)]
    pub const fn is_some(&self) -> bool {
        self.0[0] | self.0[1] | self.0[2] | self.0[3] != 0
    }

    /// Whether it is an IPv4 address of the host itself (RFC 1122, 3.2.1.3), which no packet on a wire may have.
    #[inline(always)]
    pub const fn is_loopback_v4(&self) -> bool {
        let [first, ..] = self.0[3].to_ne_bytes();
        self.is_v4() && first == 127
    }

    /// Whether a router sends on what is for it by its routes alone: none of a group (RFC 5771; RFC 4291, 2.7), of a
    /// link, of the host itself, and none at all.
    #[inline(always)]
    pub const fn is_sent_on(&self) -> bool {
        if self.is_v4() {
            let [first, ..] = self.0[3].to_ne_bytes();
            return first != 0 && first != 127 && first < 224;
        }
        let first = u32::from_be(self.0[0]);
        first >> 22 != 0xfe80 >> 6 && first >> 24 != 0xff && self.0[0] | self.0[1] | self.0[2] != 0
    }

    /// The address that stands for all node addresses of its family.
    #[inline(always)]
    pub const fn every(&self) -> Self {
        if self.is_v4() {
            Self::EVERY_V4
        } else {
            Self::EVERY_V6
        }
    }

    /// The bits of a prefix of this length in its own family, counted in 128 bits.
    pub const fn prefix_bits(&self, length: u8) -> u32 {
        if self.is_v4() {
            96 + length as u32
        } else {
            length as u32
        }
    }
}

impl From<core::net::IpAddr> for Ip {
    fn from(address: core::net::IpAddr) -> Self {
        let octets = match address {
            core::net::IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
            core::net::IpAddr::V6(address) => address.octets(),
        };
        Self(bytemuck::cast(octets))
    }
}

impl From<core::net::Ipv4Addr> for Ip {
    fn from(address: core::net::Ipv4Addr) -> Self {
        core::net::IpAddr::V4(address).into()
    }
}

impl From<Ip> for core::net::IpAddr {
    fn from(address: Ip) -> Self {
        let octets: [u8; 16] = bytemuck::cast(address.0);
        core::net::Ipv6Addr::from(octets).to_canonical()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::{IpAddr, Ipv4Addr};

    #[test]
    fn both_families_come_back_as_they_were() {
        for text in ["10.0.0.1", "0.0.0.0", "fd00::1", "::1"] {
            let address: IpAddr = text.parse().unwrap();
            let ip = Ip::from(address);
            assert_eq!(IpAddr::from(ip), address);
            assert_eq!(ip.is_v4(), address.is_ipv4());
        }
        let ip = Ip::from(Ipv4Addr::new(10, 0, 0, 1));
        assert_eq!(ip, Ip::v4(u32::from_ne_bytes([10, 0, 0, 1])));
        assert_eq!(ip.as_v4().to_ne_bytes(), [10, 0, 0, 1]);
        assert_eq!((ip.prefix_bits(24), ip.every()), (120, Ip::EVERY_V4));
        assert!(!Ip::NONE.is_some() && ip.is_some() && Ip::EVERY_V4.is_some());
    }

    #[test]
    fn loopback_is_a_block_of_ipv4() {
        for (text, is) in [
            ("127.0.0.1", true),
            ("127.255.0.9", true),
            ("126.0.0.1", false),
            ("128.0.0.1", false),
            ("::1", false),
            ("::7f00:1", false),
        ] {
            let address: IpAddr = text.parse().unwrap();
            assert_eq!(Ip::from(address).is_loopback_v4(), is, "{text}");
        }
    }

    #[test]
    fn routers_send_on_what_is_for_one_host_elsewhere() {
        for (text, sent_on) in [
            ("10.0.0.1", true),
            ("223.255.255.255", true),
            ("169.254.1.1", true),
            ("2001:db8::1", true),
            ("fd00::1", true),
            ("fec0::1", true),
            ("0.0.0.0", false),
            ("127.0.0.1", false),
            ("224.0.0.1", false),
            ("255.255.255.255", false),
            ("::", false),
            ("::1", false),
            ("fe80::1", false),
            ("febf::1", false),
            ("ff02::1", false),
        ] {
            let address: IpAddr = text.parse().unwrap();
            assert_eq!(Ip::from(address).is_sent_on(), sent_on, "{text}");
        }
    }
}
