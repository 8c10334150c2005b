//! Quantities (`resource.Quantity` of apimachinery): exact amounts with decimal, binary or exponent suffixes.

/// Which kind of suffix a quantity is written with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `n u m "" k M G T P E`: powers of 1000.
    DecimalSi,
    /// `Ki Mi Gi Ti Pi Ei`: powers of 1024.
    BinarySi,
    /// `e3`, `E6`: powers of ten that are multiples of three.
    DecimalExponent,
}

/// An amount in billionths, with the format it was written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantity {
    nanos: i128,
    format: Format,
}

/// Why a text is no quantity; the message is the real server's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
)]
pub struct ParseError;

const NANO: i128 = 1_000_000_000;
/// The largest amount that apimachinery keeps: 2^63-1 units.
const LARGEST: i128 = i64::MAX as i128 * NANO;

impl Quantity {
    /// Reads a quantity. Amounts finer than a billionth are rounded up (away from zero), larger ones than 2^63-1 are capped.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let (negative, rest) = match text.as_bytes().first() {
            Some(b'-') => (true, &text[1..]),
            Some(b'+') => (false, &text[1..]),
            _ => (false, text),
        };
        let number_end = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(rest.len());
        let (number, suffix) = rest.split_at(number_end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
            return Err(ParseError);
        }
        let (numerator, denominator, format) = scale(suffix)?;
        let mut amount: i128 = 0;
        let mut divisor: i128 = denominator;
        let mut lost = false;
        for digit in whole.bytes() {
            amount = amount
                .saturating_mul(10)
                .saturating_add(i128::from(digit - b'0'));
        }
        for digit in fraction.bytes() {
            // Past 24 digits nothing of the fraction is left but its rounding.
            if divisor > 1_000_000_000_000_000_000_000_000 {
                lost |= digit != b'0';
                continue;
            }
            amount = amount
                .saturating_mul(10)
                .saturating_add(i128::from(digit - b'0'));
            divisor *= 10;
        }
        let scaled = amount
            .checked_mul(numerator)
            .and_then(|n| n.checked_mul(NANO));
        let nanos = match scaled {
            Some(scaled) => {
                let up = scaled % divisor != 0 || lost;
                (scaled / divisor + i128::from(up)).min(LARGEST)
            }
            None if amount == 0 => 0,
            None => LARGEST,
        };
        Ok(Self {
            nanos: if negative { -nanos } else { nanos },
            format,
        })
    }

    /// Whole units, rounded up.
    pub fn value(&self) -> i64 {
        self.rounded_up(NANO)
    }

    /// Thousandths, rounded up: milli-cores for CPU.
    pub fn milli_value(&self) -> i64 {
        self.rounded_up(NANO / 1000)
    }

    /// Billionths, exact.
    pub fn nano_value(&self) -> i128 {
        self.nanos
    }

    fn rounded_up(&self, unit: i128) -> i64 {
        let (quotient, rest) = (self.nanos / unit, self.nanos % unit);
        let rounded = quotient + rest.signum();
        i64::try_from(rounded).unwrap_or(if rounded < 0 { i64::MIN } else { i64::MAX })
    }

    /// The canonical text that the API server stores: the largest suffix that leaves a whole number.
    pub fn canonical(&self) -> String {
        let whole = self.nanos % NANO == 0;
        let units = self.nanos / NANO;
        match self.format {
            Format::BinarySi if whole && units.unsigned_abs() >= 1024 => {
                let mut amount = units;
                let mut suffix = "";
                for next in ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"] {
                    if amount % 1024 != 0 {
                        break;
                    }
                    amount /= 1024;
                    suffix = next;
                }
                format!("{amount}{suffix}")
            }
            Format::DecimalExponent => {
                let (amount, exponent) = self.decimal();
                if exponent == 0 {
                    amount.to_string()
                } else {
                    format!("{amount}e{exponent}")
                }
            }
            _ => {
                let (amount, exponent) = self.decimal();
                let suffix = match exponent {
                    -9 => "n",
                    -6 => "u",
                    -3 => "m",
                    0 => "",
                    3 => "k",
                    6 => "M",
                    9 => "G",
                    12 => "T",
                    15 => "P",
                    _ => "E",
                };
                format!("{amount}{suffix}")
            }
        }
    }

    /// Mantissa and exponent (a multiple of three from -9 to 18) with the largest exponent that leaves a whole number.
    fn decimal(&self) -> (i128, i32) {
        if self.nanos == 0 {
            return (0, 0);
        }
        let (mut amount, mut exponent) = (self.nanos, -9);
        while amount % 1000 == 0 && exponent < 18 {
            amount /= 1000;
            exponent += 3;
        }
        (amount, exponent)
    }
}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        self.nanos.partial_cmp(&other.nanos)
    }
}

/// A suffix as numerator and denominator.
fn scale(suffix: &str) -> Result<(i128, i128, Format), ParseError> {
    let decimal = |numerator, denominator| Ok((numerator, denominator, Format::DecimalSi));
    let binary = |power: u32| Ok((1i128 << (10 * power), 1, Format::BinarySi));
    match suffix {
        "" => decimal(1, 1),
        "n" => decimal(1, 1_000_000_000),
        "u" => decimal(1, 1_000_000),
        "m" => decimal(1, 1_000),
        "k" => decimal(1_000, 1),
        "M" => decimal(1_000_000, 1),
        "G" => decimal(1_000_000_000, 1),
        "T" => decimal(1_000_000_000_000, 1),
        "P" => decimal(1_000_000_000_000_000, 1),
        "E" => decimal(1_000_000_000_000_000_000, 1),
        "Ki" => binary(1),
        "Mi" => binary(2),
        "Gi" => binary(3),
        "Ti" => binary(4),
        "Pi" => binary(5),
        "Ei" => binary(6),
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E']).ok_or(ParseError)?;
            let exponent: i32 = exponent.parse().map_err(|_| ParseError)?;
            // Beyond these every amount is zero or capped, so they can stand for all.
            let power = 10i128.pow(exponent.unsigned_abs().min(24));
            let (numerator, denominator) = if exponent < 0 { (1, power) } else { (power, 1) };
            Ok((numerator, denominator, Format::DecimalExponent))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_texts() {
        for (text, canonical) in [
            ("0", "0"),
            ("100m", "100m"),
            ("0.1", "100m"),
            ("1000m", "1"),
            ("1.5", "1500m"),
            ("2000", "2k"),
            ("1Gi", "1Gi"),
            ("0.5Gi", "512Mi"),
            ("1024Mi", "1Gi"),
            ("1000Ki", "1000Ki"),
            ("512", "512"),
            ("1023", "1023"),
            ("0.5Ki", "512"),
            ("1e3", "1e3"),
            ("1E3", "1e3"),
            ("12e2", "1200"),
            ("-1.5k", "-1500"),
            ("1n", "1n"),
            ("0.1n", "1n"),
            ("+3", "3"),
            ("5.", "5"),
            (".5", "500m"),
            ("1048576", "1048576"),
        ] {
            assert_eq!(
                Quantity::parse(text).map(|q| q.canonical()),
                Ok(canonical.to_owned()),
                "{text}"
            );
        }
    }

    #[test]
    fn values_round_up() {
        let q = |text: &str| Quantity::parse(text).unwrap();
        assert_eq!((q("1.1").value(), q("1.1").milli_value()), (2, 1100));
        assert_eq!((q("1n").value(), q("1n").milli_value()), (1, 1));
        assert_eq!(q("-1.1").value(), -2);
        assert_eq!(q("64Mi").value(), 64 << 20);
        assert_eq!(q("999999999999999999999E").value(), i64::MAX);
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "", "m", "1.2.3", "1 Gi", "1gi", "1K", "--1", "1e", "1e+-3", "0x10", "1mm",
        ] {
            assert_eq!(Quantity::parse(text), Err(ParseError), "{text}");
        }
    }
}
