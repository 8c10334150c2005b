//! Validation of addresses and ranges of addresses.

use std::net::IpAddr;

use ipnet::IpNet;

use super::at::{At, Errors};

const BAD_RANGE: &str = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";

/// An address that a packet can be sent to from another machine.
pub(super) fn not_special(at: &At<'_, '_>, errors: &mut Errors) {
    let Ok(address) = at.text().parse::<IpAddr>() else {
        at.invalid("must be a valid IP address", errors);
        return;
    };
    let (link_local, link_multicast) = match address {
        IpAddr::V4(v4) => (v4.is_link_local(), v4.octets()[..3] == [224, 0, 0]),
        IpAddr::V6(v6) => (
            v6.is_unicast_link_local(),
            v6.segments()[0] & 0xff0f == 0xff02,
        ),
    };
    if address.is_unspecified() {
        let detail = format!("may not be unspecified ({address})");
        at.invalid(&detail, errors);
    }
    if address.is_loopback() {
        at.invalid(
            "may not be in the loopback range (127.0.0.0/8, ::1/128)",
            errors,
        );
    }
    if link_local {
        let detail = "may not be in the link-local range (169.254.0.0/16, fe80::/10)";
        at.invalid(detail, errors);
    }
    if link_multicast {
        let detail = "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)";
        at.invalid(detail, errors);
    }
}

/// A range. `exact`: no bits are set that it does not fix. Gives the range where there is one.
pub(super) fn range(at: &At<'_, '_>, exact: bool, errors: &mut Errors) -> Option<IpNet> {
    let Ok(range) = at.text().trim().parse::<IpNet>() else {
        at.invalid_as(serde_json::json!(at.text()), BAD_RANGE, errors);
        return None;
    };
    if exact && range.network() != range.addr() {
        at.invalid("must not have bits set beyond the prefix length", errors);
        return None;
    }
    Some(range)
}
