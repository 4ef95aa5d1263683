//! How long a request may take: as its client says, else as we think right.
//! It knows nothing of what is done meanwhile.

use std::time::Duration;

use tokio::time::Instant;
use tonic::metadata::MetadataMap;

use crate::limits::DEFAULT_DEADLINE;

/// tonic ends a call when its time is up, with a bare CANCELLED. We end it a
/// little before, with words: a tenth of the time, and at most this much.
const MARGIN: Duration = Duration::from_millis(100);

/// When a request must have ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline(Option<Instant>);

impl Deadline {
    /// As the client says in `grpc-timeout`.
    pub fn of_request(metadata: &MetadataMap) -> Self {
        let timeout = metadata.get("grpc-timeout").and_then(|value| parse_timeout(value.to_str().ok()?));
        Self(timeout.and_then(|timeout| Instant::now().checked_add(timeout - MARGIN.min(timeout / 10))))
    }

    /// The client's own, if it named one.
    pub fn named(self) -> Option<Instant> {
        self.0
    }

    /// For the next step of the request: the client's, else the default from now on.
    pub fn of_step(self) -> Instant {
        self.0.unwrap_or_else(|| Instant::now() + DEFAULT_DEADLINE)
    }
}

/// `grpc-timeout` as in the gRPC-over-HTTP/2 specification: at most eight digits and a unit.
fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(value * 3_600),
        "M" => Duration::from_secs(value * 60),
        "S" => Duration::from_secs(value),
        "m" => Duration::from_millis(value),
        "u" => Duration::from_micros(value),
        "n" => Duration::from_nanos(value),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_timeouts_are_read_as_the_specification_says() {
        assert_eq!(parse_timeout("2H"), Some(Duration::from_secs(7_200)));
        assert_eq!(parse_timeout("3M"), Some(Duration::from_secs(180)));
        assert_eq!(parse_timeout("10S"), Some(Duration::from_secs(10)));
        assert_eq!(parse_timeout("99999999m"), Some(Duration::from_millis(99_999_999)));
        assert_eq!(parse_timeout("5u"), Some(Duration::from_micros(5)));
        assert_eq!(parse_timeout("5n"), Some(Duration::from_nanos(5)));
        for bad in ["", "S", "10", "-1S", "+1S", "123456789S", "1s", "1é"] {
            assert_eq!(parse_timeout(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_request_without_a_deadline_gets_one_for_each_step() {
        let deadline = Deadline::of_request(&MetadataMap::new());
        assert_eq!(deadline.named(), None);
        assert!(deadline.of_step() > Instant::now());
    }
}
