//! The calls about users: log in, change, list. Makes what is random (salts, tokens) and has the log do the rest.
//!
//! It says in the audit log who changed what; a password is in no line of it and in no entry.

use std::sync::Arc;

use resqlite::api::{
    ChangeUsersRequest, ListUsersResponse, LoggedPassword, LoggedToken, LoggedUser, LoginResponse, User,
    UserChange, change_users_request::Change, logged_request::Body, user_change::Change as Logged,
};
use tokio::time::Instant;
use tonic::Status;

use crate::{
    auth::{Authenticator, Caller, Who, new_token, token_hash},
    errors::reply_status,
    users::{Directory, MAX_TOKEN_LIFETIME_MS, check_name},
    write_path::{WriteId, WritePath},
};

/// How long a token is good unless its request says otherwise.
const TOKEN_LIFETIME_MS: u64 = 12 * 3_600_000;

/// Answers the calls about users.
#[derive(Debug)]
pub struct Accounts {
    /// Where changes are proposed.
    pub writes: Arc<WritePath>,
    /// The users as this node knows them.
    pub directory: Directory,
    /// Makes the hashes of passwords.
    pub authenticator: Arc<Authenticator>,
}

impl Accounts {
    /// A new token for the user who has just proved who they are.
    pub async fn login(
        &self,
        caller: &Caller,
        lifetime_ms: u64,
        deadline: Instant,
    ) -> Result<LoginResponse, Status> {
        let Who::User(name) = &caller.who else {
            return Err(Status::unauthenticated("a token is for a user: send a name and its password"));
        };
        let expires_in_ms = match lifetime_ms {
            0 => TOKEN_LIFETIME_MS,
            asked if asked <= MAX_TOKEN_LIFETIME_MS => asked,
            _ => {
                return Err(Status::invalid_argument(format!(
                    "a token lives {MAX_TOKEN_LIFETIME_MS} ms at most"
                )));
            }
        };
        let token = new_token().map_err(|error| Status::internal(format!("no entropy: {error}")))?;
        let hash = token_hash(&token).to_vec().into();
        let logged = LoggedToken { user: name.to_string(), hash, lifetime_ms: expires_in_ms };
        self.propose(caller, WriteId::ServerMade, Logged::Token(logged), deadline).await?;
        tracing::info!(target: "audit", %caller, expires_in_ms, "was given a token");
        Ok(LoginResponse { token, expires_in_ms })
    }

    /// Makes a change; returns its log index.
    pub async fn change(
        &self,
        caller: &Caller,
        request: ChangeUsersRequest,
        deadline: Instant,
    ) -> Result<u64, Status> {
        let Some(change) = request.change else {
            return Err(Status::invalid_argument("the change of users is empty"));
        };
        let what = describe(&change);
        let outcome = self.change_checked(caller, request.id.map(client_made), change, deadline).await;
        match &outcome {
            Ok(log_index) => tracing::info!(target: "audit", %caller, what, log_index, "users changed"),
            Err(status) => {
                let code = status.code();
                tracing::warn!(target: "audit", %caller, what, ?code, reason = status.message(), "users not changed");
            }
        }
        outcome
    }

    async fn change_checked(
        &self,
        caller: &Caller,
        id: Option<WriteId>,
        change: Change,
        deadline: Instant,
    ) -> Result<u64, Status> {
        // The log decides, by the rights as of the entry; but nobody makes this node hash passwords for nothing.
        let own =
            matches!((&change, &caller.who), (Change::Password(new), Who::User(name)) if *new.name == **name);
        if !own && !caller.rights(&self.directory)?.is_admin() {
            return Err(Status::permission_denied(format!(
                "{} is no administrator: only one may change users, and everybody their own password",
                caller.who
            )));
        }
        let logged = match change {
            Change::Add(user) => {
                check_name(&user.name).map_err(|failure| Status::invalid_argument(failure.error.message))?;
                let password_hash = self.hash(user.password).await?;
                Logged::Add(LoggedUser { name: user.name, password_hash, rights: user.rights })
            }
            Change::Password(new) => {
                let password_hash = self.hash(new.password).await?;
                Logged::Password(LoggedPassword { name: new.name, password_hash })
            }
            Change::Grant(grant) => Logged::Grant(grant),
            Change::Revoke(revoke) => Logged::Revoke(revoke),
            Change::Remove(name) => Logged::Remove(name),
            Change::RequireAuthentication(required) => Logged::RequireAuthentication(required),
        };
        self.propose(caller, id.unwrap_or(WriteId::ServerMade), logged, deadline).await
    }

    /// Of no password there is no hash.
    async fn hash(&self, password: String) -> Result<String, Status> {
        if password.is_empty() { Ok(String::new()) } else { self.authenticator.hash(password).await }
    }

    async fn propose(
        &self,
        caller: &Caller,
        id: WriteId,
        change: Logged,
        deadline: Instant,
    ) -> Result<u64, Status> {
        let body = Body::Users(UserChange { change: Some(change) });
        let reply = self.writes.write(caller, id, true, None, body, deadline).await?;
        match reply_status(&reply, |number| number) {
            Some(status) => Err(status),
            None => Ok(reply.log_index),
        }
    }

    /// All users, as this node knows them.
    pub fn list(&self) -> ListUsersResponse {
        let shown = |user: &Arc<crate::users::User>| User {
            name: user.name.clone(),
            has_password: !user.password_hash.is_empty(),
            rights: Some(user.rights.to_api()),
            tokens: user.tokens.len() as u32,
        };
        ListUsersResponse {
            users: self.directory.current().users().map(shown).collect(),
            authentication_required: self.directory.is_required(),
        }
    }
}

fn client_made(id: resqlite::api::RequestId) -> WriteId {
    WriteId::ClientMade { id, part: 0 }
}

/// A change in words, without its secrets.
fn describe(change: &Change) -> String {
    match change {
        Change::Add(user) => {
            format!("add {:?} with {:?}", user.name, user.rights.clone().unwrap_or_default())
        }
        Change::Password(new) if new.password.is_empty() => format!("take the password of {:?}", new.name),
        Change::Password(new) => format!("set the password of {:?}", new.name),
        Change::Grant(grant) => {
            format!("grant {:?} {:?}", grant.name, grant.rights.clone().unwrap_or_default())
        }
        Change::Revoke(revoke) => {
            format!("revoke of {:?} {:?}", revoke.name, revoke.rights.clone().unwrap_or_default())
        }
        Change::Remove(name) => format!("remove {name:?}"),
        Change::RequireAuthentication(true) => "require authentication".into(),
        Change::RequireAuthentication(false) => "require no authentication".into(),
    }
}

#[cfg(test)]
mod tests {
    use resqlite::api::{AddUser, SetPassword};

    use super::*;

    #[test]
    fn no_password_gets_into_the_words_for_the_audit() {
        let password = "correct horse".to_owned();
        let add = AddUser { name: "alice".into(), password: password.clone(), rights: None };
        let set = SetPassword { name: "alice".into(), password };
        for change in [Change::Add(add), Change::Password(set)] {
            let words = describe(&change);
            assert!(words.contains("alice") && !words.contains("horse"), "{words}");
        }
    }
}
