//! What a certificate says of its owner.
//!
//! A peer's certificate names the node in a DNS name of the form
//! `node-<id>.<cluster>.resqlite`. That name is resolved nowhere: it is an identity, in the
//! one field that every tool can set and every TLS library compares.
//! A client's certificate names a user in its common name, as PostgreSQL and etcd have it.

use tokio_rustls::rustls::pki_types::CertificateDer;
use x509_parser::{extensions::GeneralName, parse_x509_certificate};

/// The end of every node's name. No public suffix, so nothing else is called so.
const SUFFIX: &str = ".resqlite";
/// The longest label of a DNS name (RFC 1035, section 2.3.4).
const MAX_LABEL_BYTES: usize = 63;

/// How long before its end a certificate is worth a warning, at most.
const WARN_BEFORE_SECONDS: i64 = 30 * 24 * 3600;

/// A node of a cluster, as a peer's certificate names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeName {
    /// The cluster's name.
    pub cluster: String,
    /// The node's id.
    pub id: u64,
}

impl NodeName {
    /// `node-<id>.<cluster>.resqlite`.
    pub fn dns_name(&self) -> String {
        format!("node-{}.{}{SUFFIX}", self.id, self.cluster)
    }

    /// The inverse of [`dns_name`](Self::dns_name); `None` for any other name.
    pub fn parse(dns_name: &str) -> Option<Self> {
        let (id, cluster) = dns_name.strip_suffix(SUFFIX)?.strip_prefix("node-")?.split_once('.')?;
        let name = Self { cluster: cluster.to_owned(), id: id.parse().ok()? };
        (is_label(cluster) && name.dns_name() == dns_name).then_some(name)
    }
}

/// Whether a cluster's name can be part of a DNS name; in lower case, because DNS names do not tell cases apart.
pub fn is_label(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    !name.is_empty()
        && name.len() <= MAX_LABEL_BYTES
        && name.bytes().all(allowed)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

/// What is read of a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// The user, if it is a client's certificate.
    pub common_name: Option<String>,
    /// The nodes; one, if it is a peer's certificate.
    pub nodes: Vec<NodeName>,
    /// From when on it is valid, in seconds since 1970.
    pub not_before: i64,
    /// Until when it is valid, in seconds since 1970.
    pub not_after: i64,
}

impl Subject {
    /// Reads a certificate. Whether anybody trusts it is not asked here.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, String> {
        let unreadable = |error: &dyn std::fmt::Display| format!("not an X.509 certificate: {error}");
        let (_, parsed) = parse_x509_certificate(certificate).map_err(|error| unreadable(&error))?;
        let names = parsed.subject_alternative_name().map_err(|error| unreadable(&error))?;
        let nodes = names.iter().flat_map(|names| &names.value.general_names).filter_map(|name| match name {
            GeneralName::DNSName(name) => NodeName::parse(name),
            _ => None,
        });
        let common_name = parsed.subject().iter_common_name().find_map(|name| name.as_str().ok());
        Ok(Self {
            common_name: common_name.filter(|name| !name.is_empty()).map(str::to_owned),
            nodes: nodes.collect(),
            not_before: parsed.validity().not_before.timestamp(),
            not_after: parsed.validity().not_after.timestamp(),
        })
    }

    /// What to say when the end of its validity is near: within 30 days, or within the last third
    /// of a shorter life.
    pub fn expiry_warning(&self, now_seconds: i64) -> Option<String> {
        let life = self.not_after.saturating_sub(self.not_before);
        let left = self.not_after.saturating_sub(now_seconds);
        if left > WARN_BEFORE_SECONDS.min(life / 3) {
            return None;
        }
        Some(match left {
            ..=0 => "has expired: replace it, nobody accepts it any more".into(),
            1..3_600 => format!("expires in {} minutes: replace it", left / 60),
            3_600..172_800 => format!("expires in {} hours: replace it", left / 3_600),
            _ => format!("expires in {} days: replace it", left / 86_400),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_name_is_read_back_and_nothing_else_is_one() {
        let name = NodeName { cluster: "a-1".into(), id: 12 };
        assert_eq!(name.dns_name(), "node-12.a-1.resqlite");
        assert_eq!(NodeName::parse(&name.dns_name()), Some(name));
        for other in [
            "*.a.resqlite",
            "node-*.a.resqlite",
            "node-01.a.resqlite",
            "node-+1.a.resqlite",
            "node-1.resqlite",
            "node-1.a.b.resqlite",
            "node-1.A.resqlite",
            "node-1.a.resqlite.example.org",
            "db1.example.org",
            "",
        ] {
            assert_eq!(NodeName::parse(other), None, "{other}");
        }
    }

    #[test]
    fn a_certificate_is_warned_of_in_its_last_days_only() {
        let day = 86_400;
        let subject =
            |days| Subject { common_name: None, nodes: vec![], not_before: 0, not_after: days * day };
        assert_eq!(subject(365).expiry_warning(334 * day), None);
        assert_eq!(subject(365).expiry_warning(336 * day).unwrap(), "expires in 29 days: replace it");
        assert_eq!(subject(1).expiry_warning(day / 2), None, "two thirds of a day's certificate are no news");
        assert_eq!(subject(1).expiry_warning(day * 3 / 4).unwrap(), "expires in 6 hours: replace it");
        assert_eq!(subject(1).expiry_warning(day - 90).unwrap(), "expires in 1 minutes: replace it");
        assert!(subject(1).expiry_warning(day).unwrap().starts_with("has expired"));
    }
}
