//! TLS: who may speak to whom, and the certificates that say so.
//!
//! Two separate worlds, each with its own files:
//!
//! - *peers*, raftd to raftd, always mutual: a certificate names one node of one cluster
//!   ([`names`]), and whoever is at the other end must be the node it claims to be;
//! - *clients*, to sqlited: the server's certificate names its host, and with a client CA
//!   each client has a certificate that names a user.
//!
//! Certificates are read from files and read again when those change ([`reload`]); a
//! connection that stands is never touched by that. TLS 1.3 only, without resumption: a
//! resumed session would be let in by a check that was made long ago.
//! Nothing here knows what travels over a connection.

pub mod admission;
pub mod clients;
pub mod connect;
pub mod files;
pub mod incoming;
pub mod names;
pub mod peers;
pub mod reload;
mod verify;

use std::{io, path::PathBuf, sync::Arc};

use tokio_rustls::rustls::{
    self, ClientConfig, ServerConfig,
    crypto::{CryptoProvider, ring},
    version::TLS13,
};

pub use tokio_rustls::rustls::pki_types::ServerName;

pub use self::{
    admission::{Admission, ConnectionLimits, ConnectionMetrics, UnderWay},
    clients::{ClientTls, SqlTls},
    connect::Dial,
    incoming::{Caller, Incoming},
    peers::PeerTls,
    reload::Reloading,
};

/// What gRPC speaks (RFC 9113, section 3.2).
const ALPN: &[u8] = b"h2";

/// Why certificates and keys cannot be used. Every message names the file.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// It cannot be read.
    #[error("{}: cannot be read: {reason}", file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// The operating system's words.
        reason: io::Error,
    },
    /// Others than its owner and its group may read a private key.
    #[error("{}: everybody on this host may use this private key (mode {mode:04o}): chmod o= {}", file.display(), file.display())]
    Exposed {
        /// The file.
        file: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// It is not what it should be.
    #[error("{}: {reason}", file.display())]
    Malformed {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl TlsError {
    fn malformed(file: impl Into<PathBuf>, reason: impl ToString) -> Self {
        Self::Malformed { file: file.into(), reason: reason.to_string() }
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn server_builder() -> rustls::ConfigBuilder<ServerConfig, rustls::WantsVerifier> {
    let builder = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13]);
    builder.expect("ring has cipher suites for TLS 1.3")
}

fn client_builder() -> rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier> {
    let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13]);
    builder.expect("ring has cipher suites for TLS 1.3")
}

/// What all our servers have in common.
fn finish_server(mut config: ServerConfig) -> Arc<ServerConfig> {
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    Arc::new(config)
}

/// What all our clients have in common.
fn finish_client(mut config: ClientConfig) -> Arc<ClientConfig> {
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Arc::new(config)
}
