//! The keys about TLS, and where plain text is refused.

use std::{net::SocketAddr, path::PathBuf};

use serde::Deserialize;

use super::Config;
use crate::tls::names::is_label;

/// `raftd.tls`: the files for the connections between peers, which are always mutual.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct PeerTlsFiles {
    /// The authorities that sign the peers' certificates.
    pub ca: PathBuf,
    /// This node's certificate, which names it: `node-<id>.<cluster>.resqlite`.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// `sqlited.tls`: the files for the connections of clients.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct SqlTlsFiles {
    /// This server's certificate, which names the host as clients know it.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The authorities that sign the clients' certificates. With it, every client must have one.
    #[serde(default)]
    pub client_ca: Option<PathBuf>,
}

/// Refuses what would be in the open without having been asked for.
pub(super) fn check(config: &Config) -> Result<(), (&'static str, usize, String)> {
    let (raftd, sqlited) = (&config.raftd, &config.sqlited);
    if raftd.tls.is_some() && !is_label(&config.cluster.name) {
        let reason = format!(
            "{:?} cannot be part of a DNS name, as it must with raftd.tls: use a-z, 0-9 and hyphens",
            config.cluster.name
        );
        return Err(("name", 0, reason));
    }
    if raftd.tls.is_none() && !raftd.allow_plaintext_on_network {
        on_loopback("raftd", "raftd.listen", raftd.listen)?;
    }
    if sqlited.tls.is_none() && !sqlited.allow_plaintext_on_network {
        on_loopback("sqlited", "sqlited.listen", sqlited.listen)?;
    }
    Ok(())
}

fn on_loopback(
    daemon: &str,
    key: &'static str,
    listen: SocketAddr,
) -> Result<(), (&'static str, usize, String)> {
    if listen.ip().is_loopback() {
        return Ok(());
    }
    let reason = format!(
        "{daemon} would speak plain text on {listen}, which is not a loopback address: set {daemon}.tls (`resqlite cert` \
         makes certificates), or say {daemon}.allow_plaintext_on_network: true"
    );
    Err((key, 0, reason))
}

#[cfg(test)]
mod tests {
    use super::Config;

    fn error_of(text: &str) -> String {
        Config::parse(text, "f.yaml").unwrap_err().to_string()
    }

    #[test]
    fn plain_text_beyond_loopback_is_refused_unless_the_config_says_so() {
        let raftd = "node_id: 1\nraftd:\n  listen: 10.0.0.1:50050\n";
        let message = error_of(raftd);
        assert!(
            message.starts_with("f.yaml:3: raftd.listen: raftd would speak plain text on 10.0.0.1:50050"),
            "{message}"
        );
        assert!(message.ends_with("or say raftd.allow_plaintext_on_network: true"), "{message}");
        let sqlited = "node_id: 1\nraftd: {listen: \"127.0.0.1:1\"}\nsqlited:\n  listen: 0.0.0.0:50051\n";
        let message = error_of(sqlited);
        assert!(message.starts_with("f.yaml:4: sqlited.listen: sqlited would speak"), "{message}");
        let message = error_of("node_id: 1\nsqlited:\n  listen: \"[::]:50051\"\n");
        assert!(
            message.starts_with("f.yaml:3: sqlited.listen: sqlited would speak plain text on [::]:50051"),
            "{message}"
        );

        for good in [
            format!("{raftd}  allow_plaintext_on_network: true\n"),
            format!("{raftd}  tls: {{ca: a, certificate: b, key: c}}\n"),
            "node_id: 1\nraftd: {listen: \"[::1]:50050\"}\nsqlited: {listen: \"127.0.0.2:1\"}\n".into(),
        ] {
            Config::parse(&good, "f.yaml").unwrap();
        }
    }

    #[test]
    fn a_cluster_name_that_no_certificate_can_bear_is_refused_with_tls_only() {
        let text = "node_id: 1\ncluster:\n  name: My Cluster\n";
        Config::parse(text, "f.yaml").unwrap();
        let message = error_of(&format!("{text}raftd:\n  tls: {{ca: a, certificate: b, key: c}}\n"));
        assert!(
            message.starts_with("f.yaml:3: name: \"My Cluster\" cannot be part of a DNS name"),
            "{message}"
        );
    }
}
