//! Times as people type and read them.

use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use k8s_openapi::jiff::civil::{Date, DateTime};
use k8s_openapi::jiff::fmt::{rfc2822, strtime};
use k8s_openapi::jiff::tz::TimeZone;
use k8s_openapi::jiff::{SignedDuration, Timestamp, Zoned};

/// How times are printed: names of Go's layouts, as `hubble` takes them. All are in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "PascalCase")]
pub enum Format {
    /// Jan  2 15:04:05.000
    StampMilli,
    /// 2006-01-02
    YearMonthDay,
    /// 2006-01-02T15Z
    YearMonthDayHour,
    /// 2006-01-02T15:04Z
    YearMonthDayHourMinute,
    /// 2006-01-02T15:04:05Z
    #[value(name = "RFC3339")]
    Rfc3339,
    /// 2006-01-02T15:04:05.999Z
    #[value(name = "RFC3339Milli")]
    Rfc3339Milli,
    /// 2006-01-02T15:04:05.999999Z
    #[value(name = "RFC3339Micro")]
    Rfc3339Micro,
    /// 2006-01-02T15:04:05.999999999Z
    #[value(name = "RFC3339Nano")]
    Rfc3339Nano,
    /// Mon, 02 Jan 2006 15:04:05 +0000
    #[value(name = "RFC1123Z")]
    Rfc1123Z,
}

impl Format {
    /// A time in this format.
    pub fn write(self, time: Timestamp) -> String {
        let time = time.to_zoned(TimeZone::UTC);
        // The end of a second's part is left out where it is 0, and so is the point.
        let parts = |digits: usize| {
            let whole = format!("{:09}", time.subsec_nanosecond());
            let part = whole[..digits].trim_end_matches('0');
            let point = if part.is_empty() { "" } else { "." };
            format!("{}{point}{part}Z", time.strftime("%Y-%m-%dT%H:%M:%S"))
        };
        match self {
            Self::StampMilli => time.strftime("%b %e %H:%M:%S%.3f").to_string(),
            Self::YearMonthDay => time.strftime("%Y-%m-%d").to_string(),
            Self::YearMonthDayHour => time.strftime("%Y-%m-%dT%HZ").to_string(),
            Self::YearMonthDayHourMinute => time.strftime("%Y-%m-%dT%H:%MZ").to_string(),
            Self::Rfc3339 => parts(0),
            Self::Rfc3339Milli => parts(3),
            Self::Rfc3339Micro => parts(6),
            Self::Rfc3339Nano => parts(9),
            Self::Rfc1123Z => time.strftime("%a, %d %b %Y %H:%M:%S +0000").to_string(),
        }
    }
}

/// A time ago, such as `5m` or `1h30m`, or a date with or without a time (UTC where it names no zone).
pub fn parse(text: &str) -> Result<Timestamp> {
    parse_at(text, Timestamp::now())
}

fn parse_at(text: &str, now: Timestamp) -> Result<Timestamp> {
    if let Some(ago) = duration(text) {
        let ago = SignedDuration::try_from(ago).ok();
        let time = ago.and_then(|ago| now.checked_sub(ago).ok());
        return time.with_context(|| format!("{text:?} is too long ago"));
    }
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time);
    }
    if let Ok(time) = rfc2822::DateTimeParser::new().parse_timestamp(text) {
        return Ok(time);
    }
    for format in ["%Y-%m-%dT%H:%M%:z", "%Y-%m-%dT%H%:z"] {
        // Go's layouts take Z for +00:00.
        let zoned = text.strip_suffix('Z').map(|start| format!("{start}+00:00"));
        let time = strtime::parse(format, zoned.as_deref().unwrap_or(text));
        if let Ok(time) = time.and_then(|time| time.to_timestamp()) {
            return Ok(time);
        }
    }
    let utc = |time: DateTime| {
        time.to_zoned(TimeZone::UTC)
            .as_ref()
            .map(Zoned::timestamp)
            .ok()
    };
    let naive = text.parse::<DateTime>().ok().and_then(utc);
    let day = || {
        text.parse::<Date>()
            .ok()
            .and_then(|day| utc(day.at(0, 0, 0, 0)))
    };
    let stamp = || {
        // A stamp says no year: this one is meant.
        let whole = format!("{} {text}", now.to_zoned(TimeZone::UTC).year());
        let time = DateTime::strptime("%Y %b %e %H:%M:%S%.f", whole).ok()?;
        utc(time)
    };
    naive.or_else(day).or_else(stamp).with_context(|| {
        format!("{text:?} is no time: try 5m, 1h30m, 2006-01-02 or 2006-01-02T15:04:05Z")
    })
}

/// A span of time as Go writes it: numbers with units, `90s`, `1h30m`, `1.5h`; days, too. A bare number is in seconds.
pub fn duration(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let mut rest = text;
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let letters = rest.find(|c: char| c.is_ascii_digit() || c == '.');
        let (unit, after) = rest.split_at(letters.unwrap_or(rest.len()));
        seconds += number
            * match unit {
                "ns" => 1e-9,
                "us" | "µs" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3_600.0,
                "d" => 86_400.0,
                _ => return None,
            };
        rest = after;
    }
    (!text.is_empty()).then(|| Duration::try_from_secs_f64(seconds).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_hubble_reads_them() {
        let now: Timestamp = "2026-03-04T05:06:07Z".parse().unwrap();
        for (text, wanted) in [
            ("90", "2026-03-04T05:04:37Z"),
            ("90s", "2026-03-04T05:04:37Z"),
            ("5m", "2026-03-04T05:01:07Z"),
            ("1h6m7s", "2026-03-04T04:00:00Z"),
            ("1.5h", "2026-03-04T03:36:07Z"),
            ("250ms", "2026-03-04T05:06:06.75Z"),
            ("2d", "2026-03-02T05:06:07Z"),
            ("2026-01-02", "2026-01-02T00:00:00Z"),
            ("2026-01-02T15+01:00", "2026-01-02T14:00:00Z"),
            ("2026-01-02T15:04Z", "2026-01-02T15:04:00Z"),
            ("2026-01-02T15:04-07:00", "2026-01-02T22:04:00Z"),
            ("2026-01-02T15:04:05.5Z", "2026-01-02T15:04:05.5Z"),
            ("2026-01-02T15:04:05", "2026-01-02T15:04:05Z"),
            ("Fri, 02 Jan 2026 15:04:05 -0700", "2026-01-02T22:04:05Z"),
            ("Jan  2 15:04:05.250", "2026-01-02T15:04:05.25Z"),
        ] {
            let time = parse_at(text, now).map_err(|error| format!("{error:#}"));
            assert_eq!(time, Ok(wanted.parse().unwrap()), "{text}");
        }
        for text in [
            "",
            "m",
            "5 parsecs",
            "5x",
            "tomorrow",
            "2026-13-01",
            "99999999999999999999s",
            "1e400s",
        ] {
            assert!(parse_at(text, now).is_err(), "{text}");
        }
    }

    #[test]
    fn times_are_written_as_hubble_writes_them() {
        let time: Timestamp = "2026-01-02T15:04:05.12345Z".parse().unwrap();
        for (format, wanted) in [
            (Format::StampMilli, "Jan  2 15:04:05.123"),
            (Format::YearMonthDay, "2026-01-02"),
            (Format::YearMonthDayHour, "2026-01-02T15Z"),
            (Format::YearMonthDayHourMinute, "2026-01-02T15:04Z"),
            (Format::Rfc3339, "2026-01-02T15:04:05Z"),
            (Format::Rfc3339Milli, "2026-01-02T15:04:05.123Z"),
            (Format::Rfc3339Micro, "2026-01-02T15:04:05.12345Z"),
            (Format::Rfc3339Nano, "2026-01-02T15:04:05.12345Z"),
            (Format::Rfc1123Z, "Fri, 02 Jan 2026 15:04:05 +0000"),
        ] {
            assert_eq!(format.write(time), wanted, "{format:?}");
        }
    }
}
