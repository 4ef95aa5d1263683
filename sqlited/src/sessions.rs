//! Exactly once: which requests of which clients were applied, and what came of them.
//!
//! The map in memory decides; each group writes the sessions that it touched, one row each, in the
//! same transaction as everything else, so that a restart and a snapshot bring back the same map.
//! Everything here is part of the state machine: it depends on the log's entries alone, never on a
//! node's clock, and its constants are the same on every node.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    sync::Arc,
};

use bytes::Bytes;
use prost::Message;
use resqlite::api::{ReplyClass, RequestId, StoredReply};
use rusqlite::{Connection, ffi};

use crate::{classify::Failure, connection::LazyStatement};

/// A session may be forgotten once this many later entries are in the log, and not before.
pub const WINDOW_ENTRIES: u64 = 100_000;
/// A session is forgotten once, besides, this much log time has passed since its last request.
pub const WINDOW_MS: u64 = 3_600_000;
/// How many sessions are kept. Not fewer than [`WINDOW_ENTRIES`]: when it is reached, the one that has been
/// quiet for longest has been so for that many entries, and gives way without waiting for its time.
pub const MAX_SESSIONS: usize = 100_000;
/// How many replies that the client has not acknowledged are kept for one session; beyond that the oldest go, and only
/// that the request was applied is remembered.
pub const MAX_REPLIES: usize = 1_024;
/// How many applied requests are remembered for one session; a client that has not acknowledged as many is refused.
pub const MAX_MARKERS: usize = 65_536;
/// How many bytes of replies one session may hold; beyond that the oldest go. Far below what a row may measure.
pub const MAX_SESSION_BYTES: usize = 4 << 20;
/// How many bytes of replies all sessions may hold together; beyond that those of the sessions that have been quiet
/// for longest go.
pub const MAX_TOTAL_BYTES: usize = 64 << 20;

/// A client's name: 16 bytes.
pub type ClientId = [u8; 16];

/// What one client has had applied.
#[derive(Clone, Debug, Default, PartialEq)]
struct Session {
    /// The client has the replies of all sequences below.
    floor: u64,
    /// Applied sequences, from the floor on; `None`: the reply was not kept.
    applied: BTreeMap<u64, Option<Bytes>>,
    /// Of the replies in `applied`.
    replies: usize,
    bytes: usize,
    /// No reply is kept below this sequence.
    kept_from: u64,
    /// The entry that began the session: what was applied for the client before, and forgotten, lies before it.
    begun_index: u64,
    last_index: u64,
    last_timestamp_ms: u64,
    /// The user whose it is; empty while nobody said who they are.
    owner: String,
}

/// A [`Session`] as it is stored.
#[derive(Clone, PartialEq, Message)]
struct StoredSession {
    #[prost(uint64, tag = "1")]
    floor: u64,
    #[prost(uint64, tag = "2")]
    last_index: u64,
    #[prost(uint64, tag = "3")]
    last_timestamp_ms: u64,
    /// Applied sequences without a reply.
    #[prost(uint64, repeated, tag = "4")]
    markers: Vec<u64>,
    /// Applied sequences with a reply, and the replies.
    #[prost(uint64, repeated, tag = "5")]
    sequences: Vec<u64>,
    #[prost(bytes = "bytes", repeated, tag = "6")]
    replies: Vec<Bytes>,
    #[prost(uint64, tag = "7")]
    begun_index: u64,
    #[prost(string, tag = "8")]
    owner: String,
}

impl Session {
    /// Keeps of a reply only that the request was applied. Returns its size.
    fn drop_reply(&mut self, sequence: u64) -> usize {
        let Some(reply) = self.applied.get_mut(&sequence).and_then(Option::take) else { return 0 };
        self.replies -= 1;
        self.bytes -= reply.len();
        reply.len()
    }

    /// Drops the oldest replies beyond the bounds. Returns how many bytes that gave back.
    fn shrink(&mut self, max_replies: usize, max_bytes: usize) -> usize {
        let mut freed_bytes = 0;
        while self.replies > max_replies || self.bytes > max_bytes {
            let oldest = self.applied.range(self.kept_from..).find(|(_, reply)| reply.is_some());
            let Some((&oldest, _)) = oldest else { break };
            freed_bytes += self.drop_reply(oldest);
            self.kept_from = oldest + 1;
        }
        freed_bytes
    }
}

/// What is to be done with a request.
#[derive(Debug, PartialEq)]
pub enum Admission {
    /// It was not applied before: execute it.
    Execute,
    /// It was applied before: this was the reply.
    Duplicate(Arc<StoredReply>),
    /// It is neither executed nor remembered.
    Refused(Box<Failure>),
}

/// All sessions.
#[derive(Debug, Default)]
pub struct Sessions {
    sessions: BTreeMap<ClientId, Session>,
    /// By the index of their last request, which one entry alone can have.
    by_use: BTreeMap<u64, ClientId>,
    bytes: usize,
    /// What differs from the stored rows.
    dirty: BTreeSet<ClientId>,
}

impl Sessions {
    /// Creates the table in a new database.
    pub const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS _resqlite_sessions(\
        client_id BLOB PRIMARY KEY NOT NULL, state BLOB NOT NULL) WITHOUT ROWID";

    /// How many clients are remembered.
    pub fn count(&self) -> usize {
        self.sessions.len()
    }

    /// Reads all sessions from the database.
    pub fn load(connection: &Connection) -> rusqlite::Result<Self> {
        let mut sessions = Self::default();
        let mut statement = connection.prepare("SELECT client_id, state FROM _resqlite_sessions")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let state: Vec<u8> = row.get(1)?;
            sessions.put(row.get(0)?, decode(&state)?);
        }
        Ok(sessions)
    }

    /// Decides about the request of the entry at `index`, and notes what it acknowledges. `user` is empty for
    /// who has no name.
    ///
    /// A session belongs to the first user who uses it: what it remembers is told to nobody else. One that was
    /// used without a name goes over with its requests, so that one that is repeated with a name is known.
    pub fn admit(
        &mut self,
        client: ClientId,
        user: &str,
        id: &RequestId,
        index: u64,
        timestamp_ms: u64,
    ) -> Admission {
        self.expire(index, timestamp_ms);
        if let Some(session) = self.sessions.get(&client)
            && !session.owner.is_empty()
            && session.owner != user
        {
            let message = "this client_id is another user's: choose 16 random bytes for each client";
            return refused(ReplyClass::Denied, message);
        }
        if !self.sessions.contains_key(&client) {
            if id.made_at_index.saturating_add(WINDOW_ENTRIES) <= index {
                return expired("the request is older than the window of remembered requests");
            }
            self.make_room();
        }
        self.use_session(client, user, id, index, timestamp_ms);
        let session = &self.sessions[&client];
        if id.sequence < session.floor {
            return expired("the client has acknowledged the reply to this request");
        }
        match session.applied.get(&id.sequence) {
            Some(Some(reply)) => return duplicate(reply),
            Some(None) => return expired("the request was applied before; its reply was not kept"),
            None => {}
        }
        // It may have been applied in an earlier session of this client, which was forgotten since.
        if id.made_at_index.saturating_add(WINDOW_ENTRIES) <= session.begun_index {
            return expired("the request is older than what is remembered of this client");
        }
        if session.applied.len() >= MAX_MARKERS {
            let message = "too many requests are remembered: acknowledge the replies that were received";
            return refused(ReplyClass::Limit, message);
        }
        Admission::Execute
    }

    /// Remembers what came of an admitted request: the reply, as far as there is room, and in any case that it was
    /// applied.
    pub fn record(&mut self, client: ClientId, sequence: u64, reply: &StoredReply, server_made: bool) {
        let Some(session) = self.sessions.get_mut(&client) else { return };
        self.dirty.insert(client);
        if server_made {
            session.applied.insert(sequence, None);
            return;
        }
        let reply = Bytes::from(reply.encode_to_vec());
        session.replies += 1;
        session.bytes += reply.len();
        self.bytes += reply.len();
        session.applied.insert(sequence, Some(reply));
        session.kept_from = session.kept_from.min(sequence);
        self.bytes -= session.shrink(MAX_REPLIES, MAX_SESSION_BYTES);
        self.shrink_quietest();
    }

    /// Drops replies of the sessions that have been quiet for longest until the total is within its bound. A client
    /// that left without acknowledging must not stand in the way of others.
    fn shrink_quietest(&mut self) {
        if self.bytes <= MAX_TOTAL_BYTES {
            return;
        }
        for client in self.by_use.values() {
            let Some(session) = self.sessions.get_mut(client) else { continue };
            if session.bytes > 0 {
                self.bytes -= session.shrink(0, 0);
                self.dirty.insert(*client);
            }
            if self.bytes <= MAX_TOTAL_BYTES {
                return;
            }
        }
    }

    /// Writes what was touched since [`Self::committed`]. `put` takes client id and state, `delete` a client id.
    pub(crate) fn save(
        &self,
        put: &mut LazyStatement<'_>,
        delete: &mut LazyStatement<'_>,
    ) -> rusqlite::Result<()> {
        for client in &self.dirty {
            match self.sessions.get(client) {
                Some(session) => put.get()?.execute((&client[..], encode(session)))?,
                None => delete.get()?.execute((&client[..],))?,
            };
        }
        Ok(())
    }

    /// What was saved is committed: only now may the way back be forgotten.
    pub fn committed(&mut self) {
        self.dirty.clear();
    }

    /// Goes back to what the database holds. After an error it has to be called again.
    pub fn reload(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        let mut statement =
            connection.prepare("SELECT state FROM _resqlite_sessions WHERE client_id = ?1")?;
        for client in self.dirty.clone() {
            self.take(&client);
            let mut rows = statement.query((&client[..],))?;
            if let Some(row) = rows.next()? {
                let state: Vec<u8> = row.get(0)?;
                self.put(client, decode(&state)?);
            }
        }
        self.dirty.clear();
        Ok(())
    }

    /// Forgets the sessions whose window has passed. The log's time never goes backward, so those are the
    /// ones that were used longest ago.
    fn expire(&mut self, index: u64, timestamp_ms: u64) {
        while let Some((&last_index, &client)) = self.by_use.first_key_value() {
            let quiet_ms = timestamp_ms.saturating_sub(self.sessions[&client].last_timestamp_ms);
            if index.saturating_sub(last_index) < WINDOW_ENTRIES || quiet_ms < WINDOW_MS {
                return;
            }
            self.forget(client);
        }
    }

    /// Makes room for one more session. What gives way is out of the window of entries already (see
    /// [`MAX_SESSIONS`]), so that a repeated request of it is refused and not applied again.
    fn make_room(&mut self) {
        while self.sessions.len() >= MAX_SESSIONS
            && let Some((_, &client)) = self.by_use.first_key_value()
        {
            self.forget(client);
        }
    }

    fn forget(&mut self, client: ClientId) {
        self.take(&client);
        self.dirty.insert(client);
    }

    /// Notes the use of a session, new or known, and drops what the request acknowledges.
    fn use_session(&mut self, client: ClientId, user: &str, id: &RequestId, index: u64, timestamp_ms: u64) {
        let session = match self.sessions.entry(client) {
            Entry::Occupied(known) => {
                let session = known.into_mut();
                self.by_use.remove(&session.last_index);
                session
            }
            Entry::Vacant(place) => place.insert(Session { begun_index: index, ..Session::default() }),
        };
        session.last_index = index;
        session.last_timestamp_ms = timestamp_ms;
        if session.owner != user {
            user.clone_into(&mut session.owner);
        }
        // A request cannot acknowledge itself.
        let floor = id.acknowledged_below.min(id.sequence);
        if floor > session.floor {
            session.floor = floor;
            let kept = session.applied.split_off(&floor);
            for reply in std::mem::replace(&mut session.applied, kept).into_values().flatten() {
                session.replies -= 1;
                session.bytes -= reply.len();
                self.bytes -= reply.len();
            }
        }
        self.by_use.insert(index, client);
        self.dirty.insert(client);
    }

    fn put(&mut self, client: ClientId, session: Session) {
        self.bytes += session.bytes;
        self.by_use.insert(session.last_index, client);
        self.sessions.insert(client, session);
    }

    fn take(&mut self, client: &ClientId) {
        if let Some(session) = self.sessions.remove(client) {
            self.bytes -= session.bytes;
            self.by_use.remove(&session.last_index);
        }
    }
}

fn encode(session: &Session) -> Vec<u8> {
    let mut stored = StoredSession {
        floor: session.floor,
        last_index: session.last_index,
        last_timestamp_ms: session.last_timestamp_ms,
        begun_index: session.begun_index,
        owner: session.owner.clone(),
        ..StoredSession::default()
    };
    for (&sequence, reply) in &session.applied {
        match reply {
            Some(reply) => {
                stored.sequences.push(sequence);
                stored.replies.push(reply.clone());
            }
            None => stored.markers.push(sequence),
        }
    }
    stored.encode_to_vec()
}

fn decode(state: &[u8]) -> rusqlite::Result<Session> {
    let stored = StoredSession::decode(state).map_err(|error| {
        let corrupt = ffi::Error::new(ffi::SQLITE_CORRUPT);
        rusqlite::Error::SqliteFailure(corrupt, Some(format!("a stored session cannot be read: {error}")))
    })?;
    let markers = stored.markers.into_iter().map(|sequence| (sequence, None));
    let bytes = stored.replies.iter().map(Bytes::len).sum();
    let replies = stored.replies.len();
    let with_reply = stored.sequences.into_iter().zip(stored.replies.into_iter().map(Some));
    Ok(Session {
        floor: stored.floor,
        applied: markers.chain(with_reply).collect(),
        replies,
        bytes,
        kept_from: 0,
        begun_index: stored.begun_index,
        last_index: stored.last_index,
        last_timestamp_ms: stored.last_timestamp_ms,
        owner: stored.owner,
    })
}

fn duplicate(reply: &Bytes) -> Admission {
    match StoredReply::decode(reply.clone()) {
        Ok(reply) => Admission::Duplicate(Arc::new(reply)),
        // It was encoded by `record`, or read whole from a row.
        Err(_) => expired("the request was applied before; its reply cannot be read"),
    }
}

fn expired(message: &str) -> Admission {
    refused(ReplyClass::Expired, message)
}

fn refused(class: ReplyClass, message: &str) -> Admission {
    Admission::Refused(Box::new(Failure::new(class, ffi::SQLITE_ABORT, 0, message)))
}
