//! Who makes a call, as the layer found out. It knows nothing of how.

use std::{fmt, net::IpAddr, sync::Arc};

use resqlite::api::{Authority, Operator, authority};
use tonic::{Status, codegen::http::Extensions};

use crate::users::{Directory, Rights};

/// Who makes a call, and from where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Who it is.
    pub who: Who,
    /// `None`: through the local socket, or unknown.
    pub from: Option<IpAddr>,
}

/// Who somebody is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    /// They have not said so.
    Anonymous,
    /// Root of this host, or the daemon's own user, through the local socket.
    Operator,
    /// A user who has proved it.
    User(Arc<str>),
}

impl Caller {
    /// Of a request that came through the layer. Without one it would be nobody, who may do nothing while
    /// authentication is required.
    pub fn of(extensions: &Extensions) -> Self {
        extensions.get().cloned().unwrap_or(Self { who: Who::Anonymous, from: None })
    }

    /// The server on its own account.
    pub fn server() -> Self {
        Self { who: Who::Operator, from: None }
    }

    /// What they may do, by what is committed at this node now.
    pub fn rights(&self, directory: &Directory) -> Result<Arc<Rights>, Status> {
        match &self.who {
            Who::Operator => Ok(Rights::everything()),
            Who::Anonymous if directory.is_required() => {
                Err(Status::unauthenticated("authentication is required: send a user's credentials"))
            }
            Who::Anonymous => Ok(Rights::everything()),
            Who::User(name) => match directory.current().user(name) {
                Some(user) => Ok(Arc::clone(&user.rights)),
                None => Err(Status::unauthenticated(format!("there is no user {name} any more"))),
            },
        }
    }

    /// As the log has it.
    pub fn authority(&self) -> Option<Authority> {
        let who = match &self.who {
            Who::Anonymous => return None,
            Who::Operator => authority::Who::Operator(Operator {}),
            Who::User(name) => authority::Who::User(name.to_string()),
        };
        Some(Authority { who: Some(who) })
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anonymous => f.write_str("somebody unnamed"),
            Self::Operator => f.write_str("the operator of this host"),
            Self::User(name) => write!(f, "user {name}"),
        }
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.from {
            Some(from) => write!(f, "{} at {from}", self.who),
            None => self.who.fmt(f),
        }
    }
}
