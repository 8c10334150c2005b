//! Moments as the API writes them: read by the layouts of Go, refused in its words, kept in UTC.

use time::format_description::well_known::Rfc3339;
use time::macros::format_description;
use time::{OffsetDateTime, UtcOffset};

/// How a moment is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// `meta/v1` Time: whole seconds; a fraction is read and dropped.
    Seconds,
    /// `meta/v1` MicroTime: six digits of a fraction, always.
    Micros,
}

impl Precision {
    fn layout(self) -> &'static str {
        match self {
            Precision::Seconds => "2006-01-02T15:04:05Z07:00",
            Precision::Micros => "2006-01-02T15:04:05.000000Z07:00",
        }
    }
}

/// A moment in the form in which it is kept, or why it is none.
pub fn canonical(text: &str, precision: Precision) -> Result<String, String> {
    let layout = precision.layout();
    if let Err((rest, element)) = scan(text, precision) {
        return Err(format!(
            "parsing time {text:?} as {layout:?}: cannot parse {rest:?} as {element:?}"
        ));
    }
    let Ok(moment) = OffsetDateTime::parse(text, &Rfc3339) else {
        return Err(format!("parsing time {text:?}: {}", out_of_range(text)));
    };
    let moment = moment.to_offset(UtcOffset::UTC);
    let written = match precision {
        Precision::Seconds => moment.format(format_description!(
            "[year]-[month]-[day]T[hour]:[minute]:[second]Z"
        )),
        Precision::Micros => moment.format(format_description!(
            "[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z"
        )),
    };
    written.map_err(|error| format!("parsing time {text:?}: {error}"))
}

/// Which element the text does not have, with what is there instead.
fn scan(text: &str, precision: Precision) -> Result<(), (&str, &'static str)> {
    let mut rest = text;
    for element in [
        "2006", "-", "01", "-", "02", "T", "15", ":", "04", ":", "05",
    ] {
        let taken = rest.get(..element.len());
        let fits = taken.is_some_and(|taken| {
            if element.starts_with(|c: char| c.is_ascii_digit()) {
                taken.bytes().all(|c| c.is_ascii_digit())
            } else {
                taken == element
            }
        });
        if !fits {
            return Err((rest, element));
        }
        rest = &rest[element.len()..];
    }
    let digits = rest.strip_prefix('.').map_or(0, |fraction| {
        fraction.bytes().take_while(u8::is_ascii_digit).count()
    });
    match precision {
        Precision::Micros if digits < 6 => return Err((rest, ".000000")),
        Precision::Micros => rest = &rest[7..],
        Precision::Seconds if digits > 0 => rest = &rest[1 + digits..],
        Precision::Seconds => {}
    }
    const ZONE: &str = "Z07:00";
    if let Some(more) = rest.strip_prefix('Z') {
        return if more.is_empty() {
            Ok(())
        } else {
            Err((rest, ZONE))
        };
    }
    let shape = rest.bytes().enumerate().all(|(at, c)| match at {
        0 => matches!(c, b'+' | b'-'),
        3 => c == b':',
        _ => c.is_ascii_digit(),
    });
    if rest.len() == 6 && shape {
        Ok(())
    } else {
        Err((rest, ZONE))
    }
}

/// Which part of a well-formed moment does not exist.
fn out_of_range(text: &str) -> &'static str {
    let number = |range: std::ops::Range<usize>| -> u32 {
        text.get(range)
            .and_then(|digits| digits.parse().ok())
            .unwrap_or(0)
    };
    if !(1..=12).contains(&number(5..7)) {
        "month out of range"
    } else if number(11..13) > 23 {
        "hour out of range"
    } else if number(14..16) > 59 {
        "minute out of range"
    } else if number(17..19) > 59 {
        "second out of range"
    } else {
        "day out of range"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_kept_in_utc_and_in_their_precision() {
        let seconds = |text| canonical(text, Precision::Seconds);
        assert_eq!(
            seconds("2020-01-02T03:04:05.678+01:00").unwrap(),
            "2020-01-02T02:04:05Z"
        );
        let micros = canonical("2020-01-02T03:04:05.000001Z", Precision::Micros);
        assert_eq!(micros.unwrap(), "2020-01-02T03:04:05.000001Z");
    }

    #[test]
    fn what_is_no_moment_is_refused_where_it_goes_wrong() {
        let micros = canonical("2020-01-02T03:04:05Z", Precision::Micros).unwrap_err();
        assert!(
            micros.ends_with("cannot parse \"Z\" as \".000000\""),
            "{micros}"
        );
        let words = canonical("soon", Precision::Seconds).unwrap_err();
        assert!(
            words.ends_with("cannot parse \"soon\" as \"2006\""),
            "{words}"
        );
        let month = canonical("2020-13-02T03:04:05Z", Precision::Seconds).unwrap_err();
        assert!(month.ends_with("month out of range"), "{month}");
        let day = canonical("2021-02-29T03:04:05Z", Precision::Seconds).unwrap_err();
        assert!(day.ends_with("day out of range"), "{day}");
    }
}
