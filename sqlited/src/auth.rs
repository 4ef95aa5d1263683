//! Who is asking: a layer around every RPC that finds out, before anything else looks at the request.
//!
//! It takes a bearer token, or a name with its password; refuses who may not make the call at all; and
//! hands on who it is. What a statement may touch is decided elsewhere, by [`crate::users`], on the rights that hold
//! when it runs. Nothing here knows SQL, and no password or token is ever logged.

mod backoff;
mod caller;
mod layer;
mod passwords;
mod rpcs;

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use resqlite::{api::ReadOptions, tls::Caller as Connection};
use tokio::time::Instant;
use tonic::{
    Code, Status,
    codegen::http::{Extensions, HeaderMap, header::AUTHORIZATION},
};

use crate::{
    consistency::ReadGate,
    users::{Directory, Rights, TokenHash, User},
};

use backoff::Backoff;
pub use caller::{Caller, Who};
pub use layer::AuthLayer;
use passwords::Passwords;
pub use rpcs::{Needs, needs};

/// How long a refusal may wait for the news that it would not be right any more.
const NEWS_WITHIN: Duration = Duration::from_secs(2);
/// A longer header is not worth looking at.
const MAX_CREDENTIALS_BYTES: usize = 4 << 10;

/// What somebody shows to prove who they are.
#[derive(Debug)]
enum Credentials {
    Nothing,
    /// The name in a certificate that the handshake has checked.
    Certificate(String),
    Token(TokenHash),
    Password {
        name: String,
        password: String,
    },
}

/// Finds out who is asking.
#[derive(Debug)]
pub struct Authenticator {
    directory: Directory,
    gate: ReadGate,
    passwords: Passwords,
    backoff: Mutex<Backoff>,
}

impl Authenticator {
    /// Over the users of this directory. Fails only when the operating system has no entropy.
    pub fn new(directory: Directory, gate: ReadGate) -> Result<Self, getrandom::Error> {
        Ok(Self { directory, gate, passwords: Passwords::new()?, backoff: Mutex::default() })
    }

    /// A password's hash, to be kept in place of it.
    pub async fn hash(&self, password: String) -> Result<String, Status> {
        self.passwords.hash(password).await
    }

    /// Who makes this call, if they may make it at all.
    async fn admit(
        &self,
        path: &str,
        headers: &HeaderMap,
        extensions: &Extensions,
        local: bool,
    ) -> Result<Caller, Status> {
        let Some(needs) = needs(path) else {
            return Err(Status::unimplemented(format!("there is no call {path}")));
        };
        let connection = extensions.get::<Connection>();
        let from = connection.map(|connection| connection.address.ip().to_canonical());
        if local {
            return Ok(Caller { who: Who::Operator, from: None });
        }
        if needs == Needs::Nothing {
            return Ok(Caller { who: Who::Anonymous, from });
        }
        let credentials = match credentials(headers)? {
            Credentials::Nothing => match connection.and_then(Connection::user) {
                Some(name) => Credentials::Certificate(name.to_owned()),
                None => Credentials::Nothing,
            },
            shown => shown,
        };
        let proven_anew = matches!(credentials, Credentials::Password { .. } | Credentials::Certificate(_));
        let who = self.identify(credentials, from.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED))).await?;
        let caller = Caller { who, from };
        let rights = caller.rights(&self.directory)?;
        self.check(path, needs, &caller, &rights, proven_anew)?;
        Ok(caller)
    }

    fn check(
        &self,
        path: &str,
        needs: Needs,
        caller: &Caller,
        rights: &Rights,
        proven_anew: bool,
    ) -> Result<(), Status> {
        let refusal = match needs {
            Needs::Nothing | Needs::User => return Ok(()),
            Needs::Proof if proven_anew => return Ok(()),
            Needs::Proof => "a token is given for a name and its password: send both".to_owned(),
            Needs::Admin if rights.is_admin() => {
                tracing::info!(target: "audit", %caller, call = path, "admitted as administrator");
                return Ok(());
            }
            Needs::Backup if rights.may_backup() => {
                tracing::info!(target: "audit", %caller, call = path, "admitted to a backup");
                return Ok(());
            }
            Needs::Admin => format!("{} may not do that: it takes the role admin", caller.who),
            Needs::Backup => format!("{} may not do that: it takes the role backup", caller.who),
        };
        tracing::warn!(target: "audit", %caller, call = path, "refused");
        Err(Status::permission_denied(refusal))
    }

    async fn identify(&self, credentials: Credentials, from: IpAddr) -> Result<Who, Status> {
        match credentials {
            Credentials::Nothing if self.directory.is_required() => Err(self.nobody()),
            Credentials::Nothing => Ok(Who::Anonymous),
            Credentials::Certificate(name) => self.by_certificate(name, from).await,
            Credentials::Token(hash) => self.by_token(&hash, from).await,
            Credentials::Password { name, password } => self.by_password(name, password, from).await,
        }
    }

    fn nobody(&self) -> Status {
        if self.directory.current().users().next().is_none() {
            return Status::unauthenticated(
                "authentication is required, and there is no user yet: as root of a host, make the first with \
                 `resqlite user add NAME --role admin --endpoints unix:<data_dir of sqlited>/admin.sock`",
            );
        }
        Status::unauthenticated(
            "authentication is required: send a name and its password, or a token (resqlite: --user with \
             --password-file, or --token-file)",
        )
    }

    /// A certificate is worth what the user of its name may do; a name that is no user's is worth nothing.
    async fn by_certificate(&self, name: String, from: IpAddr) -> Result<Who, Status> {
        let is_user = || self.directory.current().user(&name).is_some();
        if !is_user() && self.directory.is_required() {
            self.pause(from, None)?;
            self.news().await;
        }
        if is_user() {
            return Ok(Who::User(name.into()));
        }
        if !self.directory.is_required() {
            return Ok(Who::Anonymous);
        }
        self.backoff().failed(from, None, Instant::now());
        tracing::warn!(target: "audit", user = ?name, %from, "login failed: the certificate names no user");
        Err(Status::unauthenticated(format!("the certificate names {name:?}, and there is no such user")))
    }

    async fn by_token(&self, hash: &TokenHash, from: IpAddr) -> Result<Who, Status> {
        let find = || {
            let users = self.directory.current();
            users.user_of_token(hash, now_ms()).map(|user| Who::User(user.name.as_str().into()))
        };
        if let Some(who) = find() {
            return Ok(who);
        }
        self.pause(from, None)?;
        // It may have been given by a node that is ahead of this one.
        self.news().await;
        if let Some(who) = find() {
            return Ok(who);
        }
        // Of many that came at once, those that were too many are told so.
        self.pause(from, None)?;
        self.backoff().failed(from, None, Instant::now());
        tracing::warn!(target: "audit", %from, "login failed: unknown or expired token");
        Err(Status::unauthenticated("the token is not known, or has expired: log in again"))
    }

    async fn by_password(&self, name: String, password: String, from: IpAddr) -> Result<Who, Status> {
        let find = || self.directory.current().user(&name).cloned();
        let user = find();
        if user.as_ref().is_some_and(|user| self.passwords.is_known(user, &password)) {
            return Ok(Who::User(name.into()));
        }
        self.pause(from, Some(&name))?;
        let _waiting = self.waiting(from)?;
        let mut right = {
            let turn = self.passwords.turn().await?;
            // While it waited, the same password may have been found right, or others by the same hand wrong.
            if user.as_ref().is_some_and(|user| self.passwords.is_known(user, &password)) {
                return Ok(Who::User(name.into()));
            }
            self.pause(from, Some(&name))?;
            self.passwords.is_right(&turn, user.as_deref(), &password).await?
        };
        if !right {
            // The password may have been set at a node that is ahead of this one. Nobody learns from the time that
            // this takes whether there is such a user: it is asked either way.
            self.news().await;
            let news = find().filter(|now| hash_of(user.as_deref()) != hash_of(Some(now)));
            if let Some(now) = news {
                let turn = self.passwords.turn().await?;
                right = self.passwords.is_right(&turn, Some(&now), &password).await?;
            }
        }
        if right {
            self.backoff().succeeded(from, &name);
            return Ok(Who::User(name.into()));
        }
        self.pause(from, Some(&name))?;
        self.backoff().failed(from, Some(&name), Instant::now());
        tracing::warn!(target: "audit", user = ?name, %from, "login failed: wrong name or password");
        Err(Status::unauthenticated("wrong name or password"))
    }

    /// Catches up with the cluster, if there is one to be had.
    async fn news(&self) {
        // Without a leader it is this node's own knowledge that decides.
        let _ = self.gate.pass(&ReadOptions::default(), Instant::now() + NEWS_WITHIN).await;
    }

    fn pause(&self, from: IpAddr, name: Option<&str>) -> Result<(), Status> {
        let Some(pause) = self.backoff().pause(from, name, Instant::now()) else { return Ok(()) };
        Err(Status::resource_exhausted(format!(
            "too many wrong passwords or tokens: try again in {} s",
            pause.as_secs() + 1
        )))
    }

    fn waiting(&self, from: IpAddr) -> Result<impl Drop + '_, Status> {
        if !self.backoff().enter(from) {
            return Err(Status::resource_exhausted(
                "too many passwords from this address wait to be checked: try again later, or use a token",
            ));
        }
        Ok(Waiting { backoff: &self.backoff, from })
    }

    fn backoff(&self) -> MutexGuard<'_, Backoff> {
        self.backoff.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One password of an address that waits to be checked.
struct Waiting<'a> {
    backoff: &'a Mutex<Backoff>,
    from: IpAddr,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.backoff.lock().unwrap_or_else(PoisonError::into_inner).leave(self.from);
    }
}

fn hash_of(user: Option<&User>) -> &str {
    user.map_or("", |user| &user.password_hash)
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// What is shown in the header, in the forms of RFC 6750 and RFC 7617.
fn credentials(headers: &HeaderMap) -> Result<Credentials, Status> {
    let Some(header) = headers.get(AUTHORIZATION) else { return Ok(Credentials::Nothing) };
    let malformed = || {
        let reason =
            "the authorization metadata is neither `Bearer <token>` nor `Basic <base64 of name:password>`";
        Status::new(Code::Unauthenticated, reason)
    };
    let header = header.to_str().ok().filter(|header| header.len() <= MAX_CREDENTIALS_BYTES);
    let (scheme, shown) = header.and_then(|header| header.split_once(' ')).ok_or_else(malformed)?;
    if scheme.eq_ignore_ascii_case("bearer") {
        return Ok(Credentials::Token(token_hash(shown.trim())));
    }
    if !scheme.eq_ignore_ascii_case("basic") {
        return Err(malformed());
    }
    let decoded = STANDARD.decode(shown.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    let decoded = decoded.ok_or_else(malformed)?;
    let (name, password) = decoded.split_once(':').ok_or_else(malformed)?;
    Ok(Credentials::Password { name: name.to_owned(), password: password.to_owned() })
}

/// What is kept of a token.
pub fn token_hash(token: &str) -> TokenHash {
    *blake3::hash(token.as_bytes()).as_bytes()
}

/// A new token: 32 random bytes, with a beginning by which scanners for leaked secrets know it.
pub fn new_token() -> Result<String, getrandom::Error> {
    let mut random = [0; 32];
    getrandom::fill(&mut random)?;
    Ok(format!("rsq_{}", blake3::Hash::from_bytes(random).to_hex()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(header: &str) -> Result<Credentials, Code> {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, header.parse().unwrap());
        credentials(&headers).map_err(|status| status.code())
    }

    #[test]
    fn credentials_come_as_a_token_or_as_name_and_password_and_in_no_other_form() {
        assert!(matches!(shown("Bearer x"), Ok(Credentials::Token(hash)) if hash == token_hash("x")));
        // A password may hold a colon, a name may not.
        let basic = format!("basic {}", STANDARD.encode("alice:se:cret"));
        assert!(matches!(shown(&basic), Ok(Credentials::Password { name, password })
            if name == "alice" && password == "se:cret"));
        let long = format!("Bearer {}", "x".repeat(MAX_CREDENTIALS_BYTES));
        for wrong in ["", "alice:secret", "Digest x", "Basic !", "Basic YWxpY2U=", &long] {
            assert_eq!(shown(wrong).unwrap_err(), Code::Unauthenticated, "{wrong:?}");
        }
        assert!(matches!(credentials(&HeaderMap::new()), Ok(Credentials::Nothing)));
    }

    #[test]
    fn tokens_are_long_random_and_kept_as_a_hash() {
        let (one, other) = (new_token().unwrap(), new_token().unwrap());
        assert_eq!(one.len(), 68);
        assert_ne!(one, other);
        assert_ne!(token_hash(&one), token_hash(&other));
    }
}
