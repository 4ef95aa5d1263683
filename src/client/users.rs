//! Users: who a client says it is, and the calls that change who may do what.

use std::{fmt, fs, path::PathBuf, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::Interceptor,
};

use super::{Client, endpoints::Connection, error::Error};
use crate::api::{ChangeUsersRequest, ListUsersRequest, ListUsersResponse, LoginRequest};
pub use crate::api::{Rights, Role, User, change_users_request::Change};

/// Who a client says it is, with the proof. Nothing of it is ever shown.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// A name and its password.
    Password {
        /// The user's name.
        user: String,
        /// The password.
        password: String,
    },
    /// A name, and a file whose first line is its password.
    PasswordFile {
        /// The user's name.
        user: String,
        /// The file.
        file: PathBuf,
    },
    /// A token, as [`Client::login`] gives it.
    Token(String),
    /// A file whose first line is a token.
    TokenFile(PathBuf),
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(…)")
    }
}

/// Puts the proof into every call.
#[derive(Clone, Debug, Default)]
pub(super) struct Sign(Option<MetadataValue<Ascii>>);

impl Sign {
    pub fn new(credentials: Option<&Credentials>) -> Result<Self, Error> {
        let Some(credentials) = credentials else { return Ok(Self::default()) };
        let header = match credentials {
            Credentials::Password { user, password } => basic(user, password),
            Credentials::PasswordFile { user, file } => basic(user, &first_line(file)?),
            Credentials::Token(token) => format!("Bearer {token}"),
            Credentials::TokenFile(file) => format!("Bearer {}", first_line(file)?),
        };
        let mut value: MetadataValue<Ascii> = header
            .parse()
            .map_err(|_| Error::Invalid("the token is not one: it holds odd characters".into()))?;
        // Kept out of HTTP/2's table of headers and of every log.
        value.set_sensitive(true);
        Ok(Self(Some(value)))
    }
}

impl Interceptor for Sign {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

fn first_line(file: &PathBuf) -> Result<String, Error> {
    let text = fs::read_to_string(file)
        .map_err(|error| Error::Invalid(format!("cannot read {}: {error}", file.display())))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

impl Client {
    /// A bearer token for this client's user; `None`: it lives for 12 hours. Needs a password or a certificate.
    pub async fn login(&self, lifetime: Option<Duration>) -> Result<String, Error> {
        let lifetime_ms = lifetime.map_or(0, |lifetime| (lifetime.as_millis() as u64).max(1));
        // A second token does no harm, so an attempt whose outcome is unknown is simply made again.
        let call = |mut connection: Connection, _| async move {
            connection.login(LoginRequest { lifetime_ms }).await
        };
        Ok(self.attempts(false).call(call).await?.into_inner().token)
    }

    /// Changes the users, their rights, or whether authentication is required.
    pub async fn change_users(&self, change: Change) -> Result<(), Error> {
        let ticket = self.ticket().await?;
        let request = ChangeUsersRequest { id: Some(ticket.id.clone()), change: Some(change) };
        let call = |mut connection: Connection, _| {
            let request = request.clone();
            async move { connection.change_users(request).await }
        };
        let index = self.attempts(true).call(call).await?.into_inner().log_index;
        self.saw(index);
        Ok(())
    }

    /// All users and what they may do.
    pub async fn list_users(&self) -> Result<ListUsersResponse, Error> {
        let call =
            |mut connection: Connection, _| async move { connection.list_users(ListUsersRequest {}).await };
        Ok(self.attempts(false).call(call).await?.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_shown_to_nobody() {
        let credentials = Credentials::Password { user: "alice".into(), password: "correct horse".into() };
        let sign = Sign::new(Some(&credentials)).unwrap();
        for shown in [format!("{credentials:?}"), format!("{sign:?}")] {
            assert!(!shown.contains("horse") && !shown.contains("YWxpY2U"), "{shown}");
        }
        assert_eq!(sign.0.unwrap().to_str().unwrap(), "Basic YWxpY2U6Y29ycmVjdCBob3JzZQ==");
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let missing = Credentials::TokenFile("/nonexistent/token".into());
        let error = Sign::new(Some(&missing)).unwrap_err().to_string();
        assert!(error.starts_with("cannot read /nonexistent/token: "), "{error}");
    }
}
