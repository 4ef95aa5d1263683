//! One request: what it is, who may make it, and whether its session has seen it before.
//!
//! It knows nothing of groups and transactions; what it changes is taken back by whoever rolls those back.

use std::sync::Arc;

use resqlite::api::{LogEntry, LoggedRequest, ReplyClass, StoredReply, logged_request::Body};
use rusqlite::ffi;

use super::{Applied, Work, restore};
use crate::{
    classify::Failure,
    connection::Writer,
    execute::{self, Execution, Remedies, Savepoints, Stop},
    restore::Staging,
    sessions::{Admission, ClientId, Sessions},
    users::{Actor, Users},
    versions::Versions,
};

/// Whether a staged file becomes the database here.
pub(super) fn is_restore(work: &Work) -> bool {
    matches!(work, Work::Request(request) if restore::finish_of(request).is_some())
}

/// Whether every node hashes its content right after this.
pub(super) fn is_marker(work: &Work) -> bool {
    matches!(work, Work::Request(request) if is_marker_body(request))
}

fn is_marker_body(request: &LoggedRequest) -> bool {
    matches!(request.body, Some(Body::Verify(_)))
}

/// What is kept in memory beside the database, and changes with it.
pub(super) struct Memory<'m> {
    pub(super) sessions: &'m mut Sessions,
    pub(super) versions: &'m mut Versions,
    pub(super) users: &'m mut Users,
    pub(super) staging: &'m mut Staging,
}

/// Executes one request, unless its session says that this was done before.
pub(super) fn run_request<'c>(
    writer: &'c Writer,
    Memory { sessions, versions, users, staging }: Memory<'_>,
    savepoints: &mut Savepoints<'c>,
    request: &LoggedRequest,
    entry: &LogEntry,
    remedies: &Remedies,
) -> Result<(Applied, bool), Stop> {
    staging.expire(&writer.connection, entry.timestamp_ms).map_err(Stop::Environment)?;
    with_session(sessions, request, entry, || {
        let actor = Actor::of(request.authority.as_ref());
        let finished = |failure| Ok((execute::reply(entry.index, Vec::new(), failure), false));
        if let Some(Body::Users(change)) = &request.body {
            return finished(users.change(change, actor, entry.timestamp_ms).err());
        }
        // As of this entry: whatever was revoked before it is not there, wherever the request waited.
        let rights = match users.rights(actor) {
            Ok(rights) => rights,
            Err(denied) => return finished(Some(denied)),
        };
        if let Some(conflict) = request.reads.as_ref().and_then(|reads| versions.conflict(reads)) {
            return finished(Some(conflict));
        }
        if let Some(Body::Verify(_) | Body::Report(_)) = request.body {
            return Ok((execute::reply(entry.index, Vec::new(), None), is_marker_body(request)));
        }
        if let Some(Body::Restore(step)) = &request.body {
            if let Err(denied) = restore::check_rights(&rights) {
                return finished(Some(denied));
            }
            let failure = staging.apply(&writer.connection, step, entry.timestamp_ms);
            return finished(failure.map_err(Stop::Environment)?);
        }
        let executed = Execution::run(writer, savepoints, request, &rights, entry, remedies)?;
        executed.wrote.iter().for_each(|facts| versions.wrote(facts, entry.index));
        Ok((executed.reply, executed.ends_group))
    })
}

pub(super) fn run_vacuum(
    writer: &Writer,
    Memory { sessions, versions, users, staging }: Memory<'_>,
    request: &LoggedRequest,
    entry: &LogEntry,
) -> rusqlite::Result<Applied> {
    sessions.reload(&writer.connection)?;
    users.reload(&writer.connection)?;
    *staging = Staging::load(&writer.connection)?;
    let vacuum = || {
        let reply = execute::vacuum(writer, request, entry.index, entry.timestamp_ms)?;
        // It may have given new rowids to the rows of every table that names none of its columns so.
        versions.changed_everything(entry.index);
        Ok((reply, true))
    };
    with_session(sessions, request, entry, vacuum).map(|(applied, _)| applied)
}

/// Asks the session whether to execute, and lets it remember the reply.
pub(super) fn with_session<E>(
    sessions: &mut Sessions,
    request: &LoggedRequest,
    entry: &LogEntry,
    execute: impl FnOnce() -> Result<(StoredReply, bool), E>,
) -> Result<(Applied, bool), E> {
    let index = entry.index;
    let applied = |client_id, sequence, reply| Applied { index, client_id, sequence, reply };
    let refused = |failure| Arc::new(execute::reply(index, Vec::new(), Some(failure)));
    let named = request.id.as_ref().and_then(|id| Some((id, ClientId::try_from(&id.client_id[..]).ok()?)));
    let Some((id, client)) = named.filter(|(id, _)| id.sequence > 0) else {
        let message = "the request's id needs a client_id of 16 bytes and a sequence from 1";
        let failure = Failure::new(ReplyClass::Invalid, ffi::SQLITE_ERROR, 0, message);
        return Ok((applied(ClientId::default(), 0, refused(failure)), false));
    };
    // What the server names it names for everybody, and keeps no replies to.
    let user = if request.server_made_id { "" } else { Actor::of(request.authority.as_ref()).name() };
    let admission = sessions.admit(client, user, id, index, entry.timestamp_ms);
    let (reply, ends_group) = match admission {
        Admission::Execute => {
            let (reply, ends_group) = execute()?;
            sessions.record(client, id.sequence, &reply, request.server_made_id);
            (Arc::new(reply), ends_group)
        }
        Admission::Duplicate(first_reply) => (first_reply, false),
        Admission::Refused(failure) => (refused(*failure), false),
    };
    Ok((applied(client, id.sequence, reply), ends_group))
}
