//! What we ask of a certificate beyond what its CA vouches for: whom it names.
//!
//! Chains, times, key usages and signatures are left to rustls, whose verifiers are wrapped here.

use std::{collections::BTreeSet, sync::Arc};

use tokio_rustls::rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};

use super::names::{NodeName, Subject};

/// Two traits of rustls ask for these methods, word for word; both verifiers leave them to their `chain`.
macro_rules! signatures_as_rustls_checks_them {
    () => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            self.chain.verify_tls12_signature(message, certificate, signature)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            self.chain.verify_tls13_signature(message, certificate, signature)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.chain.supported_verify_schemes()
        }
    };
}

/// Why a certificate that its CA vouches for is refused all the same.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refused(String);

fn refused(reason: String) -> Error {
    CertificateError::Other(OtherError(Arc::new(Refused(reason)))).into()
}

/// The nodes of a cluster.
#[derive(Clone, Debug)]
pub(super) struct Members {
    pub cluster: String,
    pub ids: BTreeSet<u64>,
}

impl Members {
    /// The node of this cluster that a certificate names.
    fn node(&self, certificate: &CertificateDer<'_>) -> Result<u64, Error> {
        let subject = Subject::of(certificate).map_err(refused)?;
        match subject.nodes.as_slice() {
            [] => Err(refused("the certificate names no node: it is not a peer's".into())),
            [name] if name.cluster == self.cluster && self.ids.contains(&name.id) => Ok(name.id),
            [name] => Err(refused(format!("{} is not a member of this cluster", name.dns_name()))),
            _ => Err(refused("the certificate names more than one node".into())),
        }
    }
}

/// Who may call.
#[derive(Clone, Debug)]
pub(super) enum Callers {
    /// The nodes of a cluster, and nobody else.
    Peers(Members),
    /// Anybody but a node.
    Users,
}

impl Callers {
    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        match self {
            Self::Peers(members) => members.node(certificate).map(drop),
            Self::Users => match Subject::of(certificate).map_err(refused)?.nodes.first() {
                None => Ok(()),
                Some(node) => Err(refused(format!("{} is a peer, not a client", node.dns_name()))),
            },
        }
    }
}

/// Looks at those who call.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    pub chain: Arc<dyn ClientCertVerifier>,
    pub callers: Callers,
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(certificate, intermediates, now)?;
        self.callers.check(certificate)?;
        Ok(verified)
    }

    signatures_as_rustls_checks_them!();
}

/// Looks at the node that was called, by the name of the node that was meant.
#[derive(Debug)]
pub(super) struct NodeVerifier {
    pub chain: Arc<WebPkiServerVerifier>,
    pub members: Members,
}

impl ServerCertVerifier for NodeVerifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        meant: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        // Whom the certificate names is asked first: "it is node 3" says more than "not valid for this name".
        let id = self.members.node(certificate)?;
        let name = NodeName { cluster: self.members.cluster.clone(), id }.dns_name();
        if meant.to_str() != name {
            return Err(refused(format!("this is {name}, not {}", meant.to_str())));
        }
        self.chain.verify_server_cert(certificate, intermediates, meant, ocsp_response, now)
    }

    signatures_as_rustls_checks_them!();
}
