//! TLS between raftds: both sides show a certificate, and both are looked at.
//!
//! A peer is let in only if its certificate names one node, and that node is a member of
//! this cluster; one that is called must be the very node that was meant.

use std::{path::PathBuf, sync::Arc};

use tokio_rustls::rustls::{
    ClientConfig, Error, ServerConfig, client::WebPkiServerVerifier, server::WebPkiClientVerifier,
};

use super::{
    TlsError, client_builder, files,
    files::Identity,
    finish_client, finish_server,
    names::{NodeName, Subject},
    provider,
    reload::Load,
    server_builder,
    verify::{Callers, ClientVerifier, Members, NodeVerifier},
};
use crate::config::{Config, PeerTlsFiles};

/// Both halves of a raftd's TLS.
#[derive(Debug)]
pub struct PeerTls {
    /// For those who call.
    pub server: Arc<ServerConfig>,
    /// For calling others.
    pub client: Arc<ClientConfig>,
    certificate: (PathBuf, Subject),
}

/// What [`PeerTls`] is made of.
#[derive(Clone, Debug)]
pub struct PeerSource {
    files: PeerTlsFiles,
    own_id: u64,
    members: Members,
}

impl PeerSource {
    /// As configured; `None` if peers speak plain text.
    pub fn of(config: &Config) -> Option<Self> {
        let files = config.raftd.tls.clone()?;
        let ids = config.cluster.members.iter().map(|member| member.id).collect();
        let members = Members { cluster: config.cluster.name.clone(), ids };
        Some(Self { files, own_id: config.node_id, members })
    }
}

impl Load for PeerTls {
    type Source = PeerSource;

    fn files(source: &PeerSource) -> Vec<PathBuf> {
        let PeerTlsFiles { ca, certificate, key } = &source.files;
        vec![ca.clone(), certificate.clone(), key.clone()]
    }

    fn load(source: &PeerSource) -> Result<Self, TlsError> {
        let PeerSource { files: PeerTlsFiles { ca, certificate, key }, own_id, members } = source;
        let roots = files::authorities(ca)?;
        let identity = Identity::read(certificate, key)?;
        let own = NodeName { cluster: members.cluster.clone(), id: *own_id };
        if identity.subject.nodes != std::slice::from_ref(&own) {
            let reason = format!("this certificate must name {} and no other node", own.dns_name());
            return Err(TlsError::malformed(certificate, reason));
        }
        let unusable = |error: &dyn std::fmt::Display| TlsError::malformed(ca, error.to_string());
        let chain = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider())
            .build()
            .map_err(|error| unusable(&error))?;
        let callers = ClientVerifier { chain, callers: Callers::Peers(members.clone()) };
        let chain = WebPkiServerVerifier::builder_with_provider(roots, provider())
            .build()
            .map_err(|error| unusable(&error))?;
        let called = NodeVerifier { chain, members: members.clone() };
        let mismatch = |error: Error| TlsError::malformed(key, format!("{}: {error}", certificate.display()));
        let server = server_builder()
            .with_client_cert_verifier(Arc::new(callers))
            .with_single_cert(identity.chain.clone(), identity.key.clone_key())
            .map_err(mismatch)?;
        let client = client_builder()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(called))
            .with_client_auth_cert(identity.chain, identity.key)
            .map_err(mismatch)?;
        Ok(Self {
            server: finish_server(server),
            client: finish_client(client),
            certificate: (identity.file, identity.subject),
        })
    }

    fn certificate(&self) -> Option<(&PathBuf, &Subject)> {
        Some((&self.certificate.0, &self.certificate.1))
    }
}
