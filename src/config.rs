//! The one YAML file that both daemons read: its shape, its defaults, its checks.
//!
//! Every mistake becomes one line that names file, line and key, so that a
//! person who has just edited the file knows where to look. This is the only
//! file that may name `serde_yaml`.

mod limits;
mod tls;

use std::{
    collections::BTreeSet,
    fmt, fs, iter,
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
};

use serde::{Deserialize, Deserializer, de};

pub use self::{
    limits::Limits,
    tls::{PeerTlsFiles, SqlTlsFiles},
};

/// Where both daemons look for their configuration unless told otherwise.
pub const DEFAULT_PATH: &str = "/etc/resqlite/resqlite.yaml";

/// What `sysexits.h` calls a configuration error; systemd shows it as `CONFIG`.
pub const EXIT_CONFIG: u8 = 78;

/// The whole file.
///
/// ```
/// let config = resqlite::config::Config::parse("node_id: 1", "example.yaml").unwrap();
/// assert_eq!(config.cluster.members.len(), 1);
/// ```
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Which of the members this host is.
    pub node_id: u64,
    /// With less than so much free on the filesystem of either daemon's data, this host takes no new writes.
    #[serde(default = "default_min_free_bytes")]
    pub min_free_bytes: u64,
    /// What all members agree on; the same text on every host.
    #[serde(default)]
    pub cluster: Cluster,
    /// The consensus daemon of this host.
    #[serde(default)]
    pub raftd: Raftd,
    /// The SQL daemon of this host.
    #[serde(default)]
    pub sqlited: Sqlited,
}

/// What all members agree on.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cluster {
    /// Names the cluster; part of its identity, together with the member ids.
    pub name: String,
    /// The members, in any order. One member is a cluster, too.
    pub members: Vec<Member>,
    /// How long a follower waits for a leader before it campaigns, at least; at most twice as long.
    pub election_timeout_ms: u64,
    /// How often a leader that has nothing to say says so.
    pub heartbeat_interval_ms: u64,
    /// Nobody gets in who does not say who they are, from the first start on and at this node for certain.
    /// `resqlite auth on` says the same to a cluster that runs, and then holds at every node, whatever this says.
    pub require_auth: bool,
}

/// One member, as the others and the clients reach it.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Not zero, unique in the cluster, never given to another data directory.
    pub id: u64,
    /// Where its raftd is reached, `host:port`.
    pub raft: Address,
    /// Where its sqlited is reached, `host:port`.
    pub sql: Address,
}

/// The consensus daemon.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Raftd {
    /// Where it listens for its peers.
    pub listen: SocketAddr,
    /// How peers are encrypted and known; without it they speak plain text.
    pub tls: Option<PeerTlsFiles>,
    /// The decision to speak plain text to peers although others may listen, and speak, on that network.
    pub allow_plaintext_on_network: bool,
    /// Where the durable log lies.
    pub data_dir: PathBuf,
    /// The Unix socket on which it serves the sqlited beside it.
    pub socket: PathBuf,
    /// Which users may use it, by name or id, beside root and raftd's own; without any, `resqlite-sql`.
    pub socket_users: Vec<String>,
    /// How much memory sled may use to cache the log.
    pub cache_bytes: u64,
    /// How many entries the log keeps, after the database holds them durably, for followers that lag; one that
    /// lags further gets a snapshot.
    pub log_tail_entries: u64,
    /// How many bytes of such entries it keeps at most.
    pub log_tail_bytes: u64,
    /// Where it answers `/metrics`, `/livez` and `/readyz`; `null`: nowhere.
    pub metrics_listen: Option<SocketAddr>,
}

/// The SQL daemon.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sqlited {
    /// Where it listens for clients.
    pub listen: SocketAddr,
    /// How clients are encrypted and known; without it they speak plain text.
    pub tls: Option<SqlTlsFiles>,
    /// The decision to speak plain text to clients although others may listen, and speak, on that network.
    pub allow_plaintext_on_network: bool,
    /// Where the database lies, as `resqlite.db`.
    pub data_dir: PathBuf,
    /// How many reads may run at the same time, each on a connection of its own.
    pub readers: usize,
    /// What clients may take together.
    pub limits: Limits,
    /// The largest write request, as it is stored in the log.
    pub max_request_bytes: u64,
    /// The largest result of a write (RETURNING, or a SELECT inside a transaction).
    pub max_result_bytes: u64,
    /// How many SQLite virtual machine steps one write request may take.
    pub step_budget: u64,
    /// How fast a snapshot is sent to a node that was left behind, at most.
    pub snapshot_bytes_per_second: u64,
    /// How often the nodes compare their contents; 0 is never.
    pub verify_interval_seconds: u64,
    /// Where it answers `/metrics`, `/livez` and `/readyz`; `null`: nowhere.
    pub metrics_listen: Option<SocketAddr>,
}

/// Enough for what may be under way when the limit is reached, several times over.
fn default_min_free_bytes() -> u64 {
    256 << 20
}

impl Default for Cluster {
    fn default() -> Self {
        Self {
            name: "resqlite".into(),
            members: Vec::new(),
            election_timeout_ms: 1_000,
            heartbeat_interval_ms: 100,
            require_auth: false,
        }
    }
}

impl Default for Raftd {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 50050)),
            tls: None,
            allow_plaintext_on_network: false,
            data_dir: "/var/lib/resqlite/raft".into(),
            socket: "/run/resqlite/raftd.sock".into(),
            socket_users: Vec::new(),
            cache_bytes: 64 << 20,
            log_tail_entries: 100_000,
            log_tail_bytes: 64 << 20,
            metrics_listen: Some(SocketAddr::from(([127, 0, 0, 1], 50053))),
        }
    }
}

impl Default for Sqlited {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 50051)),
            tls: None,
            allow_plaintext_on_network: false,
            data_dir: "/var/lib/resqlite/sql".into(),
            readers: 4,
            limits: Limits::default(),
            max_request_bytes: 16 << 20,
            max_result_bytes: 16 << 20,
            // A few seconds of work: for as long nothing else is applied, on any node.
            step_budget: 50_000_000,
            snapshot_bytes_per_second: 64 << 20,
            verify_interval_seconds: 3_600,
            metrics_listen: Some(SocketAddr::from(([127, 0, 0, 1], 50052))),
        }
    }
}

/// A `host:port` that others connect to; the host may be a name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address(String);

impl Address {
    /// The `host:port` text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The host alone; an IPv6 address without its brackets.
    pub fn host(&self) -> &str {
        let host = self.0.rsplit_once(':').map_or(self.0.as_str(), |(host, _)| host);
        host.trim_start_matches('[').trim_end_matches(']')
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("\"{text}\" is not an address: expected host:port, such as 10.0.0.1:50050");
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let bracketed = host.starts_with('[') && host.ends_with(']');
        let plain = !host.is_empty() && !host.contains([':', '/', ' ', '[', ']']);
        match port.parse::<u16>() {
            Ok(1..) if plain || bracketed => Ok(Self(text.to_owned())),
            _ => Err(wrong()),
        }
    }
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Parsed here, and not later, so that serde_yaml adds the line to the message.
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// A configuration that cannot be used: one line that says where and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{file}: cannot read the configuration: {reason}")]
    Unreadable {
        /// The file's path.
        file: String,
        /// The operating system's words.
        reason: String,
    },
    /// The file is not YAML, or not of this shape.
    #[error("{file}:{line}: {reason}")]
    Malformed {
        /// The file's path.
        file: String,
        /// Counted from 1.
        line: usize,
        /// What is wrong, with the key's path.
        reason: String,
    },
    /// The values do not fit together.
    #[error("{file}:{line}: {key}: {reason}")]
    Invalid {
        /// The file's path.
        file: String,
        /// Counted from 1.
        line: usize,
        /// The key that is wrong.
        key: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

impl Config {
    /// Reads and checks a configuration file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let file = path.display().to_string();
        let text = fs::read_to_string(path)
            .map_err(|error| ConfigError::Unreadable { file: file.clone(), reason: error.to_string() })?;
        Self::parse(&text, &file)
    }

    /// Reads and checks the text of a configuration; `file` is only for messages.
    pub fn parse(text: &str, file: &str) -> Result<Self, ConfigError> {
        let mut config: Self = serde_yaml::from_str(text).map_err(|error| ConfigError::Malformed {
            file: file.to_owned(),
            line: error.location().map_or(1, |location| location.line()),
            reason: without_location(&error.to_string()),
        })?;
        if config.cluster.members.is_empty() {
            config.cluster.members = vec![config.only_member()];
        }
        config.check().map_err(|(key, nth, reason)| ConfigError::Invalid {
            file: file.to_owned(),
            line: line_of_key(text, key, nth),
            key,
            reason,
        })?;
        Ok(config)
    }

    /// The single node of a cluster whose members are not listed.
    fn only_member(&self) -> Member {
        Member {
            id: self.node_id,
            raft: Address(self.raftd.listen.to_string()),
            sql: Address(self.sqlited.listen.to_string()),
        }
    }

    /// Checks what serde cannot. An error names the key, which of its occurrences, and the reason.
    fn check(&self) -> Result<(), (&'static str, usize, String)> {
        let mut ids = BTreeSet::new();
        let mut addresses = BTreeSet::new();
        for (position, member) in self.cluster.members.iter().enumerate() {
            if member.id == 0 {
                return Err(("id", position, "a member's id must not be 0".into()));
            }
            if !ids.insert(member.id) {
                return Err(("id", position, format!("the id {} is given to two members", member.id)));
            }
            if !addresses.insert(&member.raft) {
                return Err(("raft", position, format!("the address {} is given twice", member.raft)));
            }
            if !addresses.insert(&member.sql) {
                return Err(("sql", position, format!("the address {} is given twice", member.sql)));
            }
        }
        if !ids.contains(&self.node_id) {
            let known: Vec<String> = ids.iter().map(u64::to_string).collect();
            let reason =
                format!("{} is not a member of the cluster (members: {})", self.node_id, known.join(", "));
            return Err(("node_id", 0, reason));
        }
        if self.cluster.name.is_empty() {
            return Err(("name", 0, "the cluster's name must not be empty".into()));
        }
        self.check_listeners()?;
        tls::check(self)?;
        self.check_numbers()
    }

    /// Two listeners on one address: the one that comes second would fail, and say so less clearly.
    fn check_listeners(&self) -> Result<(), (&'static str, usize, String)> {
        let (raftd, sqlited) = (&self.raftd, &self.sqlited);
        let metrics = [raftd.metrics_listen, sqlited.metrics_listen].into_iter().flatten();
        let mut taken = BTreeSet::from([raftd.listen]);
        for (key, address) in
            iter::once(("listen", sqlited.listen)).chain(metrics.map(|address| ("metrics_listen", address)))
        {
            if !taken.insert(address) {
                return Err((
                    key,
                    0,
                    format!("another listener of this host has the address {address}, too"),
                ));
            }
        }
        Ok(())
    }

    fn check_numbers(&self) -> Result<(), (&'static str, usize, String)> {
        let Cluster { election_timeout_ms: election, heartbeat_interval_ms: heartbeat, .. } = self.cluster;
        if !(10..=60_000).contains(&heartbeat) {
            return Err(("heartbeat_interval_ms", 0, format!("{heartbeat} is not between 10 and 60000")));
        }
        if election < heartbeat * 5 || election > 600_000 {
            let reason = format!(
                "{election} must be at least five heartbeat intervals ({}) and at most 600000",
                heartbeat * 5
            );
            return Err(("election_timeout_ms", 0, reason));
        }
        in_range("min_free_bytes", self.min_free_bytes, 1 << 20, 1 << 50)?;
        in_range("cache_bytes", self.raftd.cache_bytes, 8 << 20, 64 << 30)?;
        in_range("log_tail_entries", self.raftd.log_tail_entries, 1, 1 << 40)?;
        in_range("log_tail_bytes", self.raftd.log_tail_bytes, 1 << 20, 1 << 40)?;
        in_range("readers", self.sqlited.readers as u64, 1, 256)?;
        in_range("max_request_bytes", self.sqlited.max_request_bytes, 1 << 10, 64 << 20)?;
        self.sqlited.limits.check(self.sqlited.max_request_bytes)?;
        in_range("max_result_bytes", self.sqlited.max_result_bytes, 1 << 10, 64 << 20)?;
        in_range("verify_interval_seconds", self.sqlited.verify_interval_seconds, 0, 366 * 86_400)?;
        in_range("snapshot_bytes_per_second", self.sqlited.snapshot_bytes_per_second, 1 << 20, 1 << 40)?;
        in_range("step_budget", self.sqlited.step_budget, 10_000, 1 << 40)
    }

    /// This host's entry among the members.
    pub fn this_member(&self) -> &Member {
        let found = self.cluster.members.iter().find(|member| member.id == self.node_id);
        found.expect("check() refuses a node_id that is not among the members")
    }

    /// Identifies the cluster in every message: a hash of its name and its members' ids.
    /// Never 0, which on the wire means "not yet known".
    pub fn cluster_id(&self) -> u64 {
        let mut hasher = blake3::Hasher::new_derive_key("resqlite cluster id, version 1");
        hasher.update(self.cluster.name.as_bytes());
        let ids: BTreeSet<u64> = self.cluster.members.iter().map(|member| member.id).collect();
        for id in ids {
            hasher.update(&[0]);
            hasher.update(&id.to_be_bytes());
        }
        let mut first_bytes = [0; 8];
        first_bytes.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
        u64::from_be_bytes(first_bytes).max(1)
    }
}

fn in_range(key: &'static str, value: u64, low: u64, high: u64) -> Result<(), (&'static str, usize, String)> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err((key, 0, format!("{value} is not between {low} and {high}")))
}

/// serde_yaml ends its messages with "at line L column C", which we print in front.
fn without_location(message: &str) -> String {
    message.split(" at line ").next().unwrap_or(message).to_owned()
}

/// The line of the `nth` occurrence of `key:`, which may be `section.key`; 1 when the key is not written (a default
/// was wrong).
fn line_of_key(text: &str, key: &str, nth: usize) -> usize {
    if let Some((section, key)) = key.split_once('.') {
        let above = line_of_key(text, section, 0) - 1;
        let rest: Vec<&str> = text.lines().skip(above).collect();
        return above + line_of_key(&rest.join("\n"), key, nth);
    }
    let is_key = |line: &str| {
        let line = line.trim_start().trim_start_matches("- ").trim_start_matches('{').trim_start();
        line.strip_prefix(key).is_some_and(|rest| rest.trim_start().starts_with(':'))
            || line.contains(&format!(" {key}:"))
    };
    let mut lines = text.lines().enumerate().filter(|(_, line)| is_key(line));
    lines.nth(nth).map_or(1, |(number, _)| number + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const THREE: &str = "\
node_id: 2
cluster:
  name: test
  members:
    - { id: 1, raft: \"10.0.0.1:50050\", sql: \"10.0.0.1:50051\" }
    - { id: 2, raft: \"10.0.0.2:50050\", sql: \"10.0.0.2:50051\" }
    - { id: 3, raft: \"10.0.0.3:50050\", sql: \"10.0.0.3:50051\" }
";

    fn error_of(text: &str) -> String {
        Config::parse(text, "f.yaml").unwrap_err().to_string()
    }

    #[test]
    fn a_lone_node_id_is_a_single_node_cluster() {
        let config = Config::parse("node_id: 7", "f.yaml").unwrap();
        assert_eq!(config.this_member().id, 7);
        assert_eq!(config.this_member().sql.as_str(), "127.0.0.1:50051");
    }

    #[test]
    fn the_cluster_id_depends_on_name_and_ids_only() {
        let id = Config::parse(THREE, "f").unwrap().cluster_id();
        assert_eq!(id, Config::parse(&THREE.replace("node_id: 2", "node_id: 3"), "f").unwrap().cluster_id());
        assert_eq!(id, Config::parse(&THREE.replace("10.0.0.1", "10.9.9.9"), "f").unwrap().cluster_id());
        assert_ne!(id, Config::parse(&THREE.replace("test", "prod"), "f").unwrap().cluster_id());
        assert_ne!(id, Config::parse(&THREE.replace("id: 3", "id: 4"), "f").unwrap().cluster_id());
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let message = error_of(&format!("{THREE}raftd:\n  listens: 127.0.0.1:1\n"));
        assert!(message.starts_with("f.yaml:9: raftd"), "{message}");
        assert!(message.contains("unknown field `listens`"), "{message}");
    }

    #[test]
    fn a_duplicate_id_is_named_with_its_line() {
        assert_eq!(
            error_of(&THREE.replace("id: 3", "id: 1")),
            "f.yaml:7: id: the id 1 is given to two members"
        );
    }

    #[test]
    fn a_node_id_outside_the_cluster_is_refused() {
        let message = error_of(&THREE.replace("node_id: 2", "node_id: 9"));
        assert_eq!(message, "f.yaml:1: node_id: 9 is not a member of the cluster (members: 1, 2, 3)");
    }

    #[test]
    fn an_address_that_cannot_be_parsed_is_named_with_its_line() {
        let message = error_of(&THREE.replace("10.0.0.2:50051", "10.0.0.2"));
        assert!(message.starts_with("f.yaml:6: "), "{message}");
        assert!(message.contains("\"10.0.0.2\" is not an address"), "{message}");
        for bad in ["host", "host:", ":1", "host:0", "host:70000", "a b:1", "::1:5"] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
        for good in ["host:1", "10.0.0.1:65535", "[::1]:50050"] {
            assert!(good.parse::<Address>().is_ok(), "{good}");
        }
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        let message = error_of("node_id: 1\ncluster:\n  election_timeout_ms: 200\n");
        assert!(message.starts_with("f.yaml:3: election_timeout_ms: 200 must be at least"), "{message}");
        assert_eq!(
            error_of("node_id: 1\nsqlited:\n  readers: 0\n"),
            "f.yaml:3: readers: 0 is not between 1 and 256"
        );
    }

    #[test]
    fn metrics_are_served_on_loopback_unless_another_address_or_none_is_given() {
        let config = Config::parse("node_id: 1", "f").unwrap();
        assert_eq!(config.sqlited.metrics_listen.unwrap().to_string(), "127.0.0.1:50052");
        assert_eq!(config.raftd.metrics_listen.unwrap().to_string(), "127.0.0.1:50053");
        let config = Config::parse("node_id: 1\nraftd:\n  metrics_listen: null\n", "f").unwrap();
        assert_eq!(config.raftd.metrics_listen, None);
        assert!(error_of("node_id: 1\nraftd:\n  metrics_listen: 50053\n").starts_with("f.yaml:3: "));
    }

    #[test]
    fn an_address_given_to_two_listeners_is_refused() {
        assert_eq!(
            error_of("node_id: 1\nsqlited:\n  metrics_listen: 127.0.0.1:50053\n"),
            "f.yaml:3: metrics_listen: another listener of this host has the address 127.0.0.1:50053, too"
        );
        assert_eq!(
            error_of("node_id: 1\nraftd:\n  metrics_listen: 127.0.0.1:50051\n"),
            "f.yaml:3: metrics_listen: another listener of this host has the address 127.0.0.1:50051, too"
        );
    }

    #[test]
    fn a_file_that_is_not_there_is_one_clear_line() {
        let message = Config::load(Path::new("/nonexistent/resqlite.yaml")).unwrap_err().to_string();
        assert!(
            message.starts_with("/nonexistent/resqlite.yaml: cannot read the configuration: "),
            "{message}"
        );
    }
}
