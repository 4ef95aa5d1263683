//! REAL values in decimal, exactly as SQLite prints them.
//!
//! SQLite converts REAL to TEXT with its own `%!.15g` (`printf.c`, etGENERIC
//! with the alternate form 2), which always shows a decimal point, and prints
//! JSON with `%!.20g`. Neither Rust nor C has that format.

use std::io::{self, Write};

/// As many digits as SQLite's REAL to TEXT conversion keeps.
pub const TEXT_DIGITS: usize = 15;
/// As many as its JSON output shows.
pub const JSON_DIGITS: usize = 20;

/// More digits than are kept, so that rounding can go half away from zero as SQLite's does;
/// Rust's own formatting goes half to even.
const GUARDED_DIGITS: usize = 30;

/// Writes a number as SQLite's `%!.<digits>g` does.
pub fn write_real(out: &mut impl Write, real: f64, digits: usize) -> io::Result<()> {
    if real.is_nan() {
        return Ok(());
    }
    if real < 0.0 {
        out.write_all(b"-")?;
    }
    if real.is_infinite() {
        return out.write_all(b"Inf");
    }
    let mut decimal = Decimal::of(real.abs());
    decimal.round(digits);
    if decimal.exponent < -4 || decimal.exponent >= digits as i32 {
        decimal.write_scientific(out)
    } else {
        decimal.write_plain(out)
    }
}

/// `d.ddd… × 10^exponent`, the digits in ASCII, without trailing zeros.
struct Decimal {
    digits: [u8; GUARDED_DIGITS],
    length: usize,
    exponent: i32,
}

impl Decimal {
    fn of(real: f64) -> Self {
        let mut text = [0; GUARDED_DIGITS + 8];
        let mut rest = &mut text[..];
        write!(rest, "{real:.precision$e}", precision = GUARDED_DIGITS - 1)
            .expect("30 digits, a point, and an exponent of at most five characters fit into 38 bytes");
        let unused = rest.len();
        let text = &text[..text.len() - unused];
        let e = text.iter().position(|byte| *byte == b'e').expect("the format writes an exponent");
        let exponent = std::str::from_utf8(&text[e + 1..]).ok().and_then(|exponent| exponent.parse().ok());

        let mut digits = [b'0'; GUARDED_DIGITS];
        digits[0] = text[0];
        digits[1..].copy_from_slice(&text[2..e]);
        Self { digits, length: GUARDED_DIGITS, exponent: exponent.expect("the exponent is a small integer") }
    }

    fn round(&mut self, keep: usize) {
        let up = self.digits[keep] >= b'5';
        self.length = keep;
        if up {
            while self.length > 0 && self.digits[self.length - 1] == b'9' {
                self.length -= 1;
            }
            match self.length {
                0 => {
                    (self.digits[0], self.length) = (b'1', 1);
                    self.exponent += 1;
                }
                length => self.digits[length - 1] += 1,
            }
        }
        while self.length > 1 && self.digits[self.length - 1] == b'0' {
            self.length -= 1;
        }
    }

    fn write_plain(&self, out: &mut impl Write) -> io::Result<()> {
        let digits = &self.digits[..self.length];
        if self.exponent < 0 {
            let zeros = (-self.exponent - 1) as usize;
            out.write_all(b"0.")?;
            out.write_all(&b"000"[..zeros])?;
            return out.write_all(digits);
        }
        let whole = self.exponent as usize + 1;
        if let Some((whole, fraction)) =
            digits.split_at_checked(whole).filter(|(_, fraction)| !fraction.is_empty())
        {
            out.write_all(whole)?;
            out.write_all(b".")?;
            return out.write_all(fraction);
        }
        out.write_all(digits)?;
        out.write_all(&[b'0'; JSON_DIGITS][..whole - digits.len()])?;
        out.write_all(b".0")
    }

    fn write_scientific(&self, out: &mut impl Write) -> io::Result<()> {
        let digits = &self.digits[..self.length];
        out.write_all(&digits[..1])?;
        out.write_all(b".")?;
        out.write_all(if digits.len() > 1 { &digits[1..] } else { b"0" })?;
        let sign = if self.exponent < 0 { '-' } else { '+' };
        write!(out, "e{sign}{:02}", self.exponent.abs())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(real: f64) -> String {
        let mut out = Vec::new();
        write_real(&mut out, real, TEXT_DIGITS).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn reals_print_as_sqlite_prints_them() {
        for (real, expected) in [
            (0.0, "0.0"),
            (-0.0, "0.0"),
            (2.0, "2.0"),
            (-1.5, "-1.5"),
            (0.1, "0.1"),
            (1.0 / 3.0, "0.333333333333333"),
            (123456789012345678.0, "1.23456789012346e+17"),
            (100000000000000.0, "100000000000000.0"),
            (1e15, "1.0e+15"),
            (999999999999999.9, "1.0e+15"),
            (100000000000000.5, "100000000000001.0"),
            (0.0001, "0.0001"),
            (0.00001, "1.0e-05"),
            (-1.5e-7, "-1.5e-07"),
            (1e100, "1.0e+100"),
            (f64::MAX, "1.79769313486232e+308"),
            (5e-324, "4.94065645841247e-324"),
            (f64::INFINITY, "Inf"),
            (f64::NEG_INFINITY, "-Inf"),
        ] {
            assert_eq!(text(real), expected);
        }
    }

    #[test]
    fn json_shows_twenty_digits() {
        for (real, expected) in [
            (0.1, "0.10000000000000000555"),
            (1e19, "10000000000000000000.0"),
            (1e20, "1.0e+20"),
            (1.5, "1.5"),
        ] {
            let mut out = Vec::new();
            write_real(&mut out, real, JSON_DIGITS).unwrap();
            assert_eq!(String::from_utf8(out).unwrap(), expected);
        }
    }

    proptest! {
        #[test]
        fn fifteen_digits_name_the_number_to_half_a_unit_in_the_fifteenth(real in any::<f64>()) {
            prop_assume!(real.is_normal());
            let back: f64 = text(real).parse().unwrap();
            prop_assert!(((back - real) / real).abs() <= 5.001e-15 || back.is_infinite(), "{} {}", real, text(real));
        }
    }
}
