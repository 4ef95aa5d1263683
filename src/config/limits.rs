//! `sqlited.limits`: what clients may take together, so that none of them takes it all.

use serde::Deserialize;

use super::in_range;

/// Bounds on connections and on what is under way, at this node.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// How many connections there may be.
    pub connections: u64,
    /// How many of them from one address (of IPv6: from one network of 64 bits).
    pub connections_per_address: u64,
    /// A connection must have done its handshake and begun HTTP/2 after this.
    pub first_bytes_seconds: u64,
    /// A connection without a call is closed after this.
    pub idle_seconds: u64,
    /// How many calls one connection may have under way; its further ones wait.
    pub streams_per_connection: u32,
    /// How many calls may be under way.
    pub calls: u64,
    /// How many bytes the requests that are under way may have together.
    pub request_bytes: u64,
    /// How long a call may wait for the rest of its request, and a second more for each KiB of it that has come.
    pub request_seconds: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 4_096,
            connections_per_address: 1_024,
            first_bytes_seconds: 10,
            idle_seconds: 600,
            streams_per_connection: 1_024,
            calls: 16_384,
            request_bytes: 256 << 20,
            request_seconds: 20,
        }
    }
}

impl Limits {
    /// `largest`: the largest message that is taken.
    pub(super) fn check(&self, largest: u64) -> Result<(), (&'static str, usize, String)> {
        in_range("limits.connections", self.connections, 8, 1 << 20)?;
        in_range("limits.connections_per_address", self.connections_per_address, 1, 1 << 20)?;
        in_range("limits.first_bytes_seconds", self.first_bytes_seconds, 1, 3_600)?;
        in_range("limits.idle_seconds", self.idle_seconds, 1, 366 * 86_400)?;
        in_range("limits.streams_per_connection", self.streams_per_connection.into(), 1, 1 << 16)?;
        in_range("limits.calls", self.calls, 8, 1 << 20)?;
        in_range("limits.request_seconds", self.request_seconds, 1, 3_600)?;
        // Less would refuse requests that max_request_bytes allows.
        in_range("limits.request_bytes", self.request_bytes, 2 * largest, 1 << 40)
    }
}

#[cfg(test)]
mod tests {
    use crate::config::Config;

    #[test]
    fn less_room_than_for_two_of_the_largest_requests_is_refused() {
        let text = "node_id: 1\nsqlited:\n  limits:\n    request_bytes: 1000\n";
        let message = Config::parse(text, "f.yaml").unwrap_err().to_string();
        assert!(
            message.starts_with("f.yaml:4: limits.request_bytes: 1000 is not between 33554432 and"),
            "{message}"
        );
    }
}
