//! Who may use the socket: asked of the kernel, which knows (SO_PEERCRED, unix(7)).
//!
//! The file's permissions say the same; but they are changed with one careless chmod, and
//! whoever can attach reads the whole log and writes to it.

use std::{collections::BTreeSet, fs, io};

use tokio::net::{UnixListener, UnixStream};
use tokio_stream::{Stream, StreamExt, wrappers::UnixListenerStream};

/// The package's sqlited; let in where it exists, unless the configuration names others.
const PACKAGED_USER: &str = "resqlite-sql";
const ROOT: u32 = 0;

/// A user that this host does not have.
#[derive(Debug, thiserror::Error)]
#[error("there is no user {0:?} in /etc/passwd; a numeric id will do as well")]
pub struct UnknownUser(String);

/// The ids of users who may use the socket.
#[derive(Clone, Debug)]
pub struct Admitted(BTreeSet<u32>);

impl Admitted {
    /// Root, this daemon's own user, and those that the configuration names; or the package's, if it names none.
    pub fn new(configured: &[String]) -> Result<Self, UnknownUser> {
        let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
        Self::among(&users, configured, rustix::process::geteuid().as_raw())
    }

    fn among(users: &str, configured: &[String], own: u32) -> Result<Self, UnknownUser> {
        let mut ids = BTreeSet::from([ROOT, own]);
        if configured.is_empty() {
            ids.extend(id_of(users, PACKAGED_USER));
        }
        for user in configured {
            let id = user.parse().ok().or_else(|| id_of(users, user));
            ids.insert(id.ok_or_else(|| UnknownUser(user.clone()))?);
        }
        Ok(Self(ids))
    }

    fn admits(&self, stream: &UnixStream) -> bool {
        match stream.peer_cred() {
            Ok(caller) if self.0.contains(&caller.uid()) => true,
            Ok(caller) => {
                tracing::warn!(
                    uid = caller.uid(),
                    pid = caller.pid(),
                    "a user who may not use the socket was refused; raftd.socket_users names those who may"
                );
                false
            }
            Err(error) => {
                tracing::warn!(%error, "a caller without credentials was refused");
                false
            }
        }
    }
}

/// A user's id in the format of passwd(5).
fn id_of(users: &str, name: &str) -> Option<u32> {
    let mut fields = users
        .lines()
        .map(|line| line.split(':'))
        .find_map(|mut fields| (fields.next() == Some(name)).then_some(fields))?;
    fields.nth(1)?.parse().ok()
}

/// The connections of those who are admitted.
pub fn admitted(listener: UnixListener, admitted: Admitted) -> impl Stream<Item = io::Result<UnixStream>> {
    UnixListenerStream::new(listener).filter(move |accepted| match accepted {
        Ok(stream) => admitted.admits(stream),
        Err(_) => true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const USERS: &str =
        "root:x:0:0:root:/root:/bin/sh\nresqlite-sql:x:998:997::/:/bin/false\nalice:x:1000:1000::/:\n";

    fn ids(configured: &[&str]) -> Vec<u32> {
        let configured: Vec<String> = configured.iter().map(|user| (*user).into()).collect();
        Admitted::among(USERS, &configured, 5).unwrap().0.into_iter().collect()
    }

    #[test]
    fn root_and_the_own_user_are_admitted_and_whom_the_configuration_names() {
        assert_eq!(ids(&[]), [0, 5, 998]);
        assert_eq!(ids(&["alice"]), [0, 5, 1000]);
        assert_eq!(ids(&["alice", "77"]), [0, 5, 77, 1000]);
        let error = Admitted::among(USERS, &["bob".into()], 5).unwrap_err();
        assert!(error.to_string().starts_with("there is no user \"bob\""));
    }

    #[tokio::test]
    async fn the_kernel_says_who_calls() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let own = rustix::process::geteuid().as_raw();
        assert!(Admitted(BTreeSet::from([own])).admits(&ours));
        assert!(!Admitted(BTreeSet::from([own + 1])).admits(&ours));
    }
}
