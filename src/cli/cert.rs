//! `resqlite cert`: a certificate authority for a cluster, and what it signs.
//!
//! Made so that a first cluster needs nothing else; whoever has an authority already may use
//! that. Nothing is ever overwritten, and private keys belong to their maker alone.

use std::{
    fs,
    io::{self, Write},
    net::IpAddr,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::ExitCode,
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose as Purpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};
use time::{Duration, OffsetDateTime};

use super::fail;
use crate::tls::{
    files,
    names::{NodeName, Subject, is_label},
};

/// Clocks differ: what is made now shall be valid on a host that is a little behind.
const CLOCK_SKEW: Duration = Duration::hours(1);
/// What X.520 allows a common name (ub-common-name).
const MAX_NAME_CHARS: usize = 64;

const CA_CERTIFICATE: &str = "ca.crt";
const CA_KEY: &str = "ca.key";

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Make a certificate authority: ca.crt for everybody, ca.key for whoever signs
    Init {
        /// Where to write; a directory of its own, for the key is the cluster's most precious secret
        #[arg(long, value_name = "DIR", default_value = "ca")]
        out: PathBuf,
        /// What to call it
        #[arg(long, default_value = "ReSqlite CA", value_parser = user_name)]
        name: String,
        /// For how long it is valid
        #[arg(long, default_value_t = 3650, value_parser = clap::value_parser!(u16).range(1..=36500))]
        days: u16,
    },
    /// Make a node's certificates: peer.crt for its raftd, sql.crt for its sqlited, and their keys
    Node {
        #[command(flatten)]
        common: Common,
        /// The cluster's name, as in the configuration
        #[arg(long, value_name = "NAME", default_value = "resqlite", value_parser = cluster_name)]
        cluster: String,
        /// The node's id
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        id: u64,
        /// A host name or an IP address at which clients reach it; repeat it for each
        #[arg(long = "host", value_name = "HOST", required = true, value_parser = host_name)]
        hosts: Vec<String>,
    },
    /// Make a client's certificate: NAME.crt and NAME.key
    Client {
        #[command(flatten)]
        common: Common,
        /// The user that it names
        #[arg(long, value_parser = file_name)]
        name: String,
    },
}

#[derive(Debug, clap::Args)]
pub struct Common {
    /// The directory that `resqlite cert init` wrote
    #[arg(long, value_name = "DIR", default_value = "ca")]
    ca_dir: PathBuf,
    /// Where to write; existing files are refused
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// For how long it is valid, but not longer than the authority
    #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u16).range(1..=3650))]
    days: u16,
}

/// Why nothing was made.
#[derive(Debug, thiserror::Error)]
enum CertError {
    #[error("{} exists; nothing is overwritten: choose another --out, or move it away", .0.display())]
    Exists(PathBuf),
    #[error("cannot write {}: {reason}", file.display())]
    Write { file: PathBuf, reason: io::Error },
    #[error("{0}: `resqlite cert init` makes an authority")]
    Authority(#[from] crate::tls::TlsError),
    #[error("{}: {reason}", file.display())]
    NotAuthority { file: PathBuf, reason: String },
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
}

/// Runs the command.
pub fn run(command: Command) -> ExitCode {
    let made = match command {
        Command::Init { out, name, days } => init(&out, &name, days),
        Command::Node { common, cluster, id, hosts } => node(&common, NodeName { cluster, id }, hosts),
        Command::Client { common, name } => client(&common, &name),
    };
    match made {
        Ok(files) => {
            let listed: Vec<String> = files.iter().map(|file| file.display().to_string()).collect();
            match writeln!(io::stdout(), "{}", listed.join("\n")) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(&error.to_string()),
            }
        }
        Err(error) => fail(&error.to_string()),
    }
}

fn init(out: &Path, name: &str, days: u16) -> Result<Vec<PathBuf>, CertError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = params(name, &[], OffsetDateTime::now_utc() + Duration::days(days.into()))?;
    // It signs certificates of hosts and users, not of other authorities.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = params.self_signed(&key)?;
    write(
        out,
        [(CA_CERTIFICATE.into(), certificate.pem(), 0o644), (CA_KEY.into(), key.serialize_pem(), 0o600)],
    )
}

fn node(common: &Common, name: NodeName, hosts: Vec<String>) -> Result<Vec<PathBuf>, CertError> {
    let authority = Authority::open(&common.ca_dir)?;
    let common_name = format!("node-{}", name.id);
    // Two keys, so that sqlited, which serves strangers, does not hold the one that opens the raft port.
    let both = [Purpose::ServerAuth, Purpose::ClientAuth];
    let peer = authority.sign(common.days, &common_name, &[name.dns_name()], &both)?;
    let sql = authority.sign(common.days, &common_name, &hosts, &[Purpose::ServerAuth])?;
    write(&common.out, pair("peer", peer).into_iter().chain(pair("sql", sql)))
}

fn client(common: &Common, name: &str) -> Result<Vec<PathBuf>, CertError> {
    let authority = Authority::open(&common.ca_dir)?;
    let signed = authority.sign(common.days, name, &[], &[Purpose::ClientAuth])?;
    write(&common.out, pair(name, signed))
}

/// A certificate and its key, in PEM.
type Signed = (String, String);

fn pair(name: &str, (certificate, key): Signed) -> [(String, String, u32); 2] {
    [(format!("{name}.crt"), certificate, 0o644), (format!("{name}.key"), key, 0o600)]
}

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    not_after: OffsetDateTime,
}

impl Authority {
    fn open(directory: &Path) -> Result<Self, CertError> {
        let (file, key_file) = (directory.join(CA_CERTIFICATE), directory.join(CA_KEY));
        let unusable = |reason: String| CertError::NotAuthority { file: file.clone(), reason };
        let certificate = files::certificates(&file)?.swap_remove(0);
        let subject = Subject::of(&certificate).map_err(unusable)?;
        let not_after = OffsetDateTime::from_unix_timestamp(subject.not_after)
            .map_err(|error| unusable(error.to_string()))?;
        if not_after <= OffsetDateTime::now_utc() {
            return Err(unusable("this authority has expired".into()));
        }
        let key = KeyPair::try_from(&files::private_key(&key_file)?)?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key)?;
        Ok(Self { issuer, not_after })
    }

    fn sign(
        &self,
        days: u16,
        name: &str,
        hosts: &[String],
        purposes: &[Purpose],
    ) -> Result<Signed, CertError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let until = OffsetDateTime::now_utc() + Duration::days(days.into());
        let mut params = params(name, hosts, until.min(self.not_after))?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = purposes.to_vec();
        params.use_authority_key_identifier_extension = true;
        Ok((params.signed_by(&key, &self.issuer)?.pem(), key.serialize_pem()))
    }
}

fn params(
    name: &str,
    hosts: &[String],
    not_after: OffsetDateTime,
) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(hosts)?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = OffsetDateTime::now_utc() - CLOCK_SKEW;
    params.not_after = not_after;
    Ok(params)
}

/// Writes all of the files or, if one of them exists, none.
fn write(
    directory: &Path,
    files: impl IntoIterator<Item = (String, String, u32)>,
) -> Result<Vec<PathBuf>, CertError> {
    let files: Vec<_> =
        files.into_iter().map(|(name, text, mode)| (directory.join(name), text, mode)).collect();
    if let Some((file, ..)) = files.iter().find(|(file, ..)| file.symlink_metadata().is_ok()) {
        return Err(CertError::Exists(file.clone()));
    }
    let failed = |file: &Path| {
        let file = file.to_owned();
        move |reason| CertError::Write { file, reason }
    };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed(directory))?;
    for (file, text, mode) in &files {
        let created = fs::OpenOptions::new().write(true).create_new(true).mode(*mode).open(file);
        let mut created = created.map_err(failed(file))?;
        created.write_all(text.as_bytes()).and_then(|()| created.sync_all()).map_err(failed(file))?;
    }
    Ok(files.into_iter().map(|(file, ..)| file).collect())
}

fn cluster_name(text: &str) -> Result<String, String> {
    match is_label(text) {
        true => Ok(text.to_owned()),
        false => Err("it must be part of a DNS name: a-z, 0-9 and hyphens".into()),
    }
}

fn host_name(text: &str) -> Result<String, String> {
    if text.parse::<IpAddr>().is_ok() {
        return Ok(text.to_owned());
    }
    let name = crate::tls::ServerName::try_from(text).map_err(|_| "not a host name or an IP address")?;
    match NodeName::parse(&name.to_str()) {
        None => Ok(text.to_owned()),
        Some(_) => Err("that is a node's name, which only its raftd may bear".into()),
    }
}

fn user_name(text: &str) -> Result<String, String> {
    match text.chars().count() {
        1..=MAX_NAME_CHARS if !text.chars().any(char::is_control) => Ok(text.to_owned()),
        _ => Err(format!("1 to {MAX_NAME_CHARS} printable characters, please")),
    }
}

/// A user's name that two files are called after.
fn file_name(text: &str) -> Result<String, String> {
    if text.contains('/') || text.starts_with('.') {
        return Err("files are called after it: no / in it, and no . at its start".into());
    }
    user_name(text)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn common(directory: &Path, days: u16) -> Common {
        Common { ca_dir: directory.join("ca"), out: directory.join("out"), days }
    }

    fn subject(file: &Path) -> Subject {
        Subject::of(&files::certificates(file).unwrap()[0]).unwrap()
    }

    #[test]
    fn keys_are_private_and_nothing_is_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        init(&at.join("ca"), "test", 1).unwrap();
        let error = init(&at.join("ca"), "test", 1).unwrap_err().to_string();
        assert!(error.contains("ca.crt exists; nothing is overwritten"), "{error}");

        let name = NodeName { cluster: "test".into(), id: 2 };
        let made = node(&common(at, 365), name.clone(), vec!["db2".into(), "10.0.0.2".into()]).unwrap();
        let names: Vec<_> = made.iter().map(|file| file.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["peer.crt", "peer.key", "sql.crt", "sql.key"]);
        for file in made.iter().chain([&at.join("ca/ca.key")]) {
            let mode = fs::metadata(file).unwrap().permissions().mode() & 0o777;
            let expected = if file.extension().unwrap() == "key" { 0o600 } else { 0o644 };
            assert_eq!(mode, expected, "{}", file.display());
        }
        assert_eq!(subject(&made[0]).nodes, std::slice::from_ref(&name));
        assert_eq!(subject(&made[2]).nodes, []);
        // With one of the files there, none of the others is touched.
        fs::remove_file(&made[0]).unwrap();
        assert!(node(&common(at, 365), name, vec!["db2".into()]).is_err());
        assert!(!made[0].exists());
    }

    #[test]
    fn nothing_outlives_its_authority() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        init(&at.join("ca"), "test", 10).unwrap();
        let made = client(&common(at, 365), "alice").unwrap();
        let alice = subject(&made[0]);
        assert_eq!(alice.not_after, subject(&at.join("ca/ca.crt")).not_after);
        assert_eq!(alice.common_name.as_deref(), Some("alice"));
    }

    #[test]
    fn a_directory_without_an_authority_is_told_what_makes_one() {
        let directory = tempfile::tempdir().unwrap();
        let error = client(&common(directory.path(), 1), "alice").unwrap_err().to_string();
        assert!(error.contains("ca/ca.crt: cannot be read"), "{error}");
        assert!(error.ends_with("`resqlite cert init` makes an authority"), "{error}");
    }

    #[test]
    fn names_that_cannot_be_borne_are_refused() {
        assert!(cluster_name("My Cluster").is_err());
        assert!(host_name("db 1").is_err());
        assert!(host_name("node-1.test.resqlite").is_err());
        assert!(host_name("db1.example.org").is_ok() && host_name("::1").is_ok());
        assert!(file_name("a/b").is_err() && file_name("..").is_err() && file_name("").is_err());
        assert!(file_name("alice@example.org").is_ok());
    }
}
