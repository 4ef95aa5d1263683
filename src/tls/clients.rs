//! TLS between clients and sqlited, both sides of it.
//!
//! The server shows a certificate for the host that clients connect to. If it has a client
//! CA, it wants one of them in return, which names a user; a peer's is not taken for one.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio_rustls::rustls::{ClientConfig, ServerConfig, server::WebPkiClientVerifier};

use super::{
    TlsError, client_builder, files,
    files::Identity,
    finish_client, finish_server,
    names::Subject,
    provider,
    reload::Load,
    server_builder,
    verify::{Callers, ClientVerifier},
};
use crate::config::SqlTlsFiles;

/// sqlited's TLS.
#[derive(Debug)]
pub struct SqlTls {
    /// For its clients.
    pub server: Arc<ServerConfig>,
    certificate: (PathBuf, Subject),
}

impl Load for SqlTls {
    type Source = SqlTlsFiles;

    fn files(source: &SqlTlsFiles) -> Vec<PathBuf> {
        let SqlTlsFiles { certificate, key, client_ca } = source;
        [certificate, key].into_iter().chain(client_ca).cloned().collect()
    }

    fn load(source: &SqlTlsFiles) -> Result<Self, TlsError> {
        let SqlTlsFiles { certificate, key, client_ca } = source;
        let identity = Identity::read(certificate, key)?;
        let builder = match client_ca {
            None => server_builder().with_no_client_auth(),
            Some(file) => {
                let chain =
                    WebPkiClientVerifier::builder_with_provider(files::authorities(file)?, provider())
                        .build()
                        .map_err(|error| TlsError::malformed(file, error))?;
                server_builder()
                    .with_client_cert_verifier(Arc::new(ClientVerifier { chain, callers: Callers::Users }))
            }
        };
        let server = builder
            .with_single_cert(identity.chain, identity.key)
            .map_err(|error| TlsError::malformed(key, format!("{}: {error}", certificate.display())))?;
        Ok(Self { server: finish_server(server), certificate: (identity.file, identity.subject) })
    }

    fn certificate(&self) -> Option<(&PathBuf, &Subject)> {
        Some((&self.certificate.0, &self.certificate.1))
    }
}

/// A client's TLS: whom it trusts, and who it is.
#[derive(Debug)]
pub struct ClientTls {
    /// For its connections.
    pub client: Arc<ClientConfig>,
    certificate: Option<(PathBuf, Subject)>,
}

/// The files that make a client's TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientTlsFiles {
    /// The authorities that may have signed a server's certificate.
    pub ca: PathBuf,
    /// The client's own certificate and its key, for servers that want one.
    pub identity: Option<(PathBuf, PathBuf)>,
}

impl ClientTlsFiles {
    /// Trusts servers that this authority has signed.
    pub fn new(ca: impl AsRef<Path>) -> Self {
        Self { ca: ca.as_ref().to_owned(), identity: None }
    }

    /// Shows this certificate to servers.
    pub fn identity(mut self, certificate: impl AsRef<Path>, key: impl AsRef<Path>) -> Self {
        self.identity = Some((certificate.as_ref().to_owned(), key.as_ref().to_owned()));
        self
    }
}

impl Load for ClientTls {
    type Source = ClientTlsFiles;

    fn files(source: &ClientTlsFiles) -> Vec<PathBuf> {
        let own = source.identity.iter().flat_map(|(certificate, key)| [certificate, key]);
        [&source.ca].into_iter().chain(own).cloned().collect()
    }

    fn load(source: &ClientTlsFiles) -> Result<Self, TlsError> {
        let builder = client_builder().with_root_certificates(files::authorities(&source.ca)?);
        let Some((certificate, key)) = &source.identity else {
            return Ok(Self { client: finish_client(builder.with_no_client_auth()), certificate: None });
        };
        let identity = Identity::read(certificate, key)?;
        let client = builder
            .with_client_auth_cert(identity.chain, identity.key)
            .map_err(|error| TlsError::malformed(key, format!("{}: {error}", certificate.display())))?;
        Ok(Self { client: finish_client(client), certificate: Some((identity.file, identity.subject)) })
    }

    fn certificate(&self) -> Option<(&PathBuf, &Subject)> {
        self.certificate.as_ref().map(|(file, subject)| (file, subject))
    }
}
