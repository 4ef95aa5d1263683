//! The users, their rights and their tokens: part of the replicated state, changed by log entries only.
//!
//! The map in memory decides; each group writes the users that it touched, one row each, in the same
//! transaction as everything else. Everything here depends on the log's entries alone. No password comes
//! here, only its finished hash, and no token, only its hash. Who somebody is was found out elsewhere.

mod directory;
mod rights;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use prost::Message;
use resqlite::api::{
    self, Authority, LoggedPassword, LoggedToken, LoggedUser, ReplyClass, RightsChange, UserChange,
    authority::Who, user_change::Change,
};
use rusqlite::{Connection, OptionalExtension, ffi};

use crate::{classify::Failure, connection::LazyStatement};

pub use directory::{Directory, Published};
pub use rights::{MODULES_ANYBODY_MAY_CALL, Rights, Where};

/// How many users there may be.
pub const MAX_USERS: usize = 10_000;
/// How many tokens of one user are good at the same time; the oldest gives way.
pub const MAX_TOKENS: usize = 16;
/// How long a user's name may be.
pub const MAX_NAME_BYTES: usize = 64;
/// The longest life of a token.
pub const MAX_TOKEN_LIFETIME_MS: u64 = 30 * 24 * 3_600_000;

/// The BLAKE3 hash of a token.
pub type TokenHash = [u8; 32];

/// One user.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct User {
    /// As it was given; names are compared byte by byte.
    pub name: String,
    /// In the PHC string format; empty: no password is right.
    pub password_hash: String,
    /// What the user may do.
    pub rights: Arc<Rights>,
    /// The oldest first: their hashes, and until when they are good, in log time.
    pub tokens: Vec<(TokenHash, u64)>,
}

/// A [`User`] as it is stored.
#[derive(Clone, PartialEq, Message)]
struct StoredUser {
    #[prost(string, tag = "1")]
    password_hash: String,
    #[prost(message, optional, tag = "2")]
    rights: Option<api::Rights>,
    #[prost(bytes = "vec", repeated, tag = "3")]
    tokens: Vec<Vec<u8>>,
    #[prost(uint64, repeated, tag = "4")]
    expire_at_ms: Vec<u64>,
}

/// On whose behalf an entry is executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Actor<'e> {
    /// Nobody was asked who they are.
    Anonymous,
    /// Root of a host, or a server on its own account.
    Operator,
    /// A user, by name.
    User(&'e str),
}

impl<'e> Actor<'e> {
    /// Of an entry.
    pub fn of(authority: Option<&'e Authority>) -> Self {
        match authority.and_then(|authority| authority.who.as_ref()) {
            None => Self::Anonymous,
            Some(Who::Operator(_)) => Self::Operator,
            Some(Who::User(name)) => Self::User(name),
        }
    }

    /// The user's name; empty for who has none.
    pub fn name(self) -> &'e str {
        match self {
            Self::Anonymous | Self::Operator => "",
            Self::User(name) => name,
        }
    }
}

/// All users.
#[derive(Debug, Default)]
pub struct Users {
    required: bool,
    users: BTreeMap<String, Arc<User>>,
    /// What differs from the stored rows.
    dirty: BTreeSet<String>,
    required_dirty: bool,
    /// Something has changed since [`Self::publish`].
    unpublished: bool,
}

impl Users {
    /// Creates the tables in a new database.
    pub const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS _resqlite_users(\
        name TEXT PRIMARY KEY NOT NULL, state BLOB NOT NULL) WITHOUT ROWID; \
        CREATE TABLE IF NOT EXISTS _resqlite_authentication(\
        id INTEGER PRIMARY KEY CHECK (id = 0), required INTEGER NOT NULL); \
        INSERT OR IGNORE INTO _resqlite_authentication VALUES (0, 0)";
    /// Writes a user's row: name and state.
    pub const PUT: &str = "INSERT INTO _resqlite_users(name, state) VALUES (?1, ?2)
        ON CONFLICT DO UPDATE SET state = excluded.state";
    /// Deletes a user's row.
    pub const DELETE: &str = "DELETE FROM _resqlite_users WHERE name = ?1";
    /// Writes whether authentication is required.
    pub const REQUIRE: &str = "UPDATE _resqlite_authentication SET required = ?1";

    /// Reads all users from the database.
    pub fn load(connection: &Connection) -> rusqlite::Result<Self> {
        let mut users = Self { required: stored_required(connection)?, ..Self::default() };
        let mut statement = connection.prepare("SELECT name, state FROM _resqlite_users")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let (name, state): (String, Vec<u8>) = (row.get(0)?, row.get(1)?);
            users.users.insert(name.clone(), Arc::new(decode(name, &state)?));
        }
        users.unpublished = true;
        Ok(users)
    }

    /// What an entry's author may do; or why nothing at all.
    pub fn rights(&self, actor: Actor<'_>) -> Result<Arc<Rights>, Failure> {
        match actor {
            Actor::Anonymous if self.required => {
                Err(denied("authentication is required by now: send a user's credentials"))
            }
            Actor::Anonymous | Actor::Operator => Ok(Rights::everything()),
            Actor::User(name) => match self.users.get(name) {
                Some(user) => Ok(Arc::clone(&user.rights)),
                None => Err(denied(format!("there is no user {name} any more"))),
            },
        }
    }

    /// Makes a change on behalf of `actor`, or says why it cannot be made; then nothing has changed.
    pub fn change(
        &mut self,
        change: &UserChange,
        actor: Actor<'_>,
        timestamp_ms: u64,
    ) -> Result<(), Failure> {
        let Some(change) = &change.change else { return Err(invalid("the change of users is empty")) };
        let own = match change {
            Change::Password(password) => actor == Actor::User(&password.name),
            Change::Token(token) => actor == Actor::User(&token.user),
            _ => false,
        };
        if !(self.rights(actor)?.is_admin() || own) {
            return Err(denied(format!(
                "user {} is no administrator: only one may change users, and everybody their own password",
                actor.name()
            )));
        }
        match change {
            Change::Add(user) => self.add(user),
            Change::Password(password) => self.set_password(password),
            Change::Grant(grant) => self.change_rights(grant, Rights::grant),
            Change::Revoke(revoke) => self.change_rights(revoke, Rights::revoke),
            Change::Remove(name) => self.remove(name),
            Change::RequireAuthentication(required) => self.require(*required),
            Change::Token(token) => self.add_token(token, timestamp_ms),
        }
    }

    fn add(&mut self, new: &LoggedUser) -> Result<(), Failure> {
        check_name(&new.name)?;
        if self.users.contains_key(&new.name) {
            return Err(failed(format!("there is a user {} already", new.name)));
        }
        if self.users.len() >= MAX_USERS {
            return Err(limit(format!("there are {MAX_USERS} users already, the most that there may be")));
        }
        let rights = Rights::default().grant(&parse(new.rights.as_ref())?).map_err(limit)?;
        self.put(User {
            name: new.name.clone(),
            password_hash: new.password_hash.clone(),
            rights: Arc::new(rights),
            tokens: Vec::new(),
        });
        Ok(())
    }

    fn set_password(&mut self, new: &LoggedPassword) -> Result<(), Failure> {
        let user = self.find(&new.name)?;
        let user = User { password_hash: new.password_hash.clone(), tokens: Vec::new(), ..(*user).clone() };
        self.keep_an_administrator(&user.name, Some(&user))?;
        self.put(user);
        Ok(())
    }

    fn change_rights(
        &mut self,
        change: &RightsChange,
        how: fn(&Rights, &Rights) -> Result<Rights, String>,
    ) -> Result<(), Failure> {
        let user = self.find(&change.name)?;
        let rights = how(&user.rights, &parse(change.rights.as_ref())?).map_err(limit)?;
        let user = User { rights: Arc::new(rights), ..(*user).clone() };
        self.keep_an_administrator(&user.name, Some(&user))?;
        self.put(user);
        Ok(())
    }

    fn remove(&mut self, name: &str) -> Result<(), Failure> {
        self.find(name)?;
        self.keep_an_administrator(name, None)?;
        self.users.remove(name);
        self.dirty.insert(name.to_owned());
        self.unpublished = true;
        Ok(())
    }

    fn require(&mut self, required: bool) -> Result<(), Failure> {
        if required && !self.users.values().any(|user| is_way_in(user)) {
            return Err(failed(
                "no administrator has a password yet, so nobody could get in: first `resqlite user add NAME --role admin`",
            ));
        }
        self.required = required;
        self.required_dirty = true;
        self.unpublished = true;
        Ok(())
    }

    fn add_token(&mut self, new: &LoggedToken, timestamp_ms: u64) -> Result<(), Failure> {
        let mut user = (*self.find(&new.user)?).clone();
        let hash = TokenHash::try_from(&new.hash[..]).map_err(|_| invalid("a token's hash has 32 bytes"))?;
        user.tokens.retain(|(_, expires_at_ms)| *expires_at_ms > timestamp_ms);
        if user.tokens.len() >= MAX_TOKENS {
            user.tokens.remove(0);
        }
        user.tokens.push((hash, timestamp_ms.saturating_add(new.lifetime_ms.min(MAX_TOKEN_LIFETIME_MS))));
        self.put(user);
        Ok(())
    }

    fn find(&self, name: &str) -> Result<Arc<User>, Failure> {
        self.users.get(name).cloned().ok_or_else(|| failed(format!("there is no user {name:?}")))
    }

    fn put(&mut self, user: User) {
        self.dirty.insert(user.name.clone());
        self.users.insert(user.name.clone(), Arc::new(user));
        self.unpublished = true;
    }

    /// While authentication is required, somebody must be able to change the users.
    fn keep_an_administrator(&self, name: &str, becomes: Option<&User>) -> Result<(), Failure> {
        let others = self.users.values().filter(|user| user.name != name).map(|user| &**user);
        if !self.required || others.chain(becomes).any(is_way_in) {
            return Ok(());
        }
        Err(failed(format!(
            "{name} is the last administrator with a password: make another one first, or turn authentication off"
        )))
    }

    /// Lets everybody see what is committed, if that has changed.
    pub fn publish(&mut self, directory: &Directory) {
        if std::mem::take(&mut self.unpublished) {
            directory.publish(Published::new(self.required, self.users.clone()));
        }
    }

    /// Whether there is anything to save.
    pub fn is_dirty(&self) -> bool {
        self.required_dirty || !self.dirty.is_empty()
    }

    /// Writes what was touched since [`Self::committed`], with [`Self::PUT`], [`Self::DELETE`] and [`Self::REQUIRE`].
    pub(crate) fn save(
        &self,
        put: &mut LazyStatement<'_>,
        delete: &mut LazyStatement<'_>,
        require: &mut LazyStatement<'_>,
    ) -> rusqlite::Result<()> {
        for name in &self.dirty {
            match self.users.get(name) {
                Some(user) => put.get()?.execute((name, encode(user)))?,
                None => delete.get()?.execute((name,))?,
            };
        }
        if self.required_dirty {
            require.get()?.execute((self.required,))?;
        }
        Ok(())
    }

    /// What was saved is committed: only now may the way back be forgotten.
    pub fn committed(&mut self) {
        self.dirty.clear();
        self.required_dirty = false;
    }

    /// Goes back to what the database holds. After an error it has to be called again.
    pub fn reload(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        self.required = stored_required(connection)?;
        let mut statement = connection.prepare("SELECT state FROM _resqlite_users WHERE name = ?1")?;
        for name in self.dirty.clone() {
            let state: Option<Vec<u8>> = statement.query_row((&name,), |row| row.get(0)).optional()?;
            match state {
                Some(state) => drop(self.users.insert(name.clone(), Arc::new(decode(name, &state)?))),
                None => drop(self.users.remove(&name)),
            }
        }
        self.dirty.clear();
        self.required_dirty = false;
        Ok(())
    }
}

/// Whether a name may be given to a user: it stands in logs, in command lines and in certificates.
pub fn check_name(name: &str) -> Result<(), Failure> {
    let fits = (1..=MAX_NAME_BYTES).contains(&name.len());
    if fits && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-@".contains(&byte)) {
        return Ok(());
    }
    Err(invalid(format!(
        "{name:?} cannot be a user's name: 1 to {MAX_NAME_BYTES} of a to z, A to Z, 0 to 9, and . _ - @"
    )))
}

fn is_way_in(user: &User) -> bool {
    user.rights.is_admin() && !user.password_hash.is_empty()
}

fn parse(rights: Option<&api::Rights>) -> Result<Rights, Failure> {
    rights.map_or_else(|| Ok(Rights::default()), |rights| Rights::parse(rights).map_err(invalid))
}

fn stored_required(connection: &Connection) -> rusqlite::Result<bool> {
    connection.query_row("SELECT required FROM _resqlite_authentication", [], |row| row.get(0))
}

fn encode(user: &User) -> Vec<u8> {
    StoredUser {
        password_hash: user.password_hash.clone(),
        rights: Some(user.rights.to_api()),
        tokens: user.tokens.iter().map(|(hash, _)| hash.to_vec()).collect(),
        expire_at_ms: user.tokens.iter().map(|(_, expires_at_ms)| *expires_at_ms).collect(),
    }
    .encode_to_vec()
}

fn decode(name: String, state: &[u8]) -> rusqlite::Result<User> {
    let corrupt = |what: String| {
        let code = ffi::Error::new(ffi::SQLITE_CORRUPT);
        rusqlite::Error::SqliteFailure(code, Some(format!("the stored user {name} cannot be read: {what}")))
    };
    let stored = StoredUser::decode(state).map_err(|error| corrupt(error.to_string()))?;
    let rights = Rights::parse(&stored.rights.unwrap_or_default()).map_err(&corrupt)?;
    let tokens = stored.tokens.iter().zip(stored.expire_at_ms).map(|(hash, expires_at_ms)| {
        let hash =
            TokenHash::try_from(&hash[..]).map_err(|_| corrupt("a token's hash is too short".into()))?;
        Ok((hash, expires_at_ms))
    });
    let tokens = tokens.collect::<rusqlite::Result<_>>()?;
    Ok(User { rights: Arc::new(rights), tokens, password_hash: stored.password_hash, name })
}

/// The refusal of what somebody may not do.
pub fn denied(message: impl Into<String>) -> Failure {
    Failure::new(ReplyClass::Denied, ffi::SQLITE_AUTH, 0, message)
}

fn failed(message: impl Into<String>) -> Failure {
    Failure::new(ReplyClass::Failed, ffi::SQLITE_ERROR, 0, message)
}

fn invalid(message: impl Into<String>) -> Failure {
    Failure::new(ReplyClass::Invalid, ffi::SQLITE_ERROR, 0, message)
}

fn limit(message: impl Into<String>) -> Failure {
    Failure::new(ReplyClass::Limit, ffi::SQLITE_TOOBIG, 0, message)
}
