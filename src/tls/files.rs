//! Certificates and private keys in PEM files. Knows nothing of what they are for.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio_rustls::rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject},
};

use super::{TlsError, names::Subject};

/// What a program shows of itself: a certificate, those that lead to its CA, and its key.
#[derive(Debug)]
pub struct Identity {
    /// Where the certificate came from.
    pub file: PathBuf,
    /// The certificate first.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its private key.
    pub key: PrivateKeyDer<'static>,
    /// What the certificate says.
    pub subject: Subject,
}

impl Identity {
    /// Reads both files. Whether they belong together, rustls says when it is given them.
    pub fn read(certificate: &Path, key: &Path) -> Result<Self, TlsError> {
        let chain = certificates(certificate)?;
        let subject = Subject::of(&chain[0]).map_err(|reason| TlsError::malformed(certificate, reason))?;
        Ok(Self { file: certificate.to_owned(), chain, key: private_key(key)?, subject })
    }
}

/// The certificates of a file, one at least.
pub fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = read(file)?;
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let all = all.map_err(|error| TlsError::malformed(file, in_words(&error)))?;
    match all.is_empty() {
        true => Err(TlsError::malformed(file, "there is no certificate in it (PEM)")),
        false => Ok(all),
    }
}

/// The authorities of a file, one at least.
pub fn authorities(file: &Path) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(file)? {
        let added = roots.add(certificate);
        added.map_err(|error| TlsError::malformed(file, format!("not the certificate of a CA: {error}")))?;
    }
    Ok(Arc::new(roots))
}

/// The private key of a file that not everybody may read.
pub fn private_key(file: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let text = read(file)?;
    let unreadable = |reason| TlsError::Unreadable { file: file.to_owned(), reason };
    let mode = fs::metadata(file).map_err(unreadable)?.mode() & 0o7777;
    if mode & 0o007 != 0 {
        return Err(TlsError::Exposed { file: file.to_owned(), mode });
    }
    PrivateKeyDer::from_pem_slice(&text).map_err(|error| TlsError::malformed(file, in_words(&error)))
}

fn read(file: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(file).map_err(|reason| TlsError::Unreadable { file: file.to_owned(), reason })
}

fn in_words(error: &pem::Error) -> String {
    match error {
        pem::Error::NoItemsFound => "there is no private key in it (PEM)".into(),
        error => format!("not PEM: {error}"),
    }
}
