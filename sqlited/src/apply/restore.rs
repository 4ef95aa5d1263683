//! The entry that makes a staged file the database.
//!
//! It runs alone in its group, and its transaction is the copying of the file's pages: the file was given the
//! server's own tables before, with this entry as the applied index. So the users are what they were: a restore
//! neither brings nor takes any.

use resqlite::api::{
    LogEntry, LoggedRequest, RestoreFinish, RestoreStep, logged_request::Body, restore_step::Step,
};

use super::{Applied, Applier, ApplyError, environment, request::with_session, tables::OwnStatements};
use crate::{
    classify::Failure,
    execute,
    restore::{Candidate, Trial},
    users::{Actor, Rights, denied},
};

/// The last step of a restore, if the request is one.
pub(super) fn finish_of(request: &LoggedRequest) -> Option<(&RestoreStep, &RestoreFinish)> {
    match &request.body {
        Some(Body::Restore(step)) => match &step.step {
            Some(Step::Finish(finish)) => Some((step, finish)),
            _ => None,
        },
        _ => None,
    }
}

/// Whether one with these rights may take a step of a restore: it replaces what everybody has.
pub(super) fn check_rights(rights: &Rights) -> Result<(), Failure> {
    if rights.is_admin() { Ok(()) } else { Err(denied("only an administrator may restore")) }
}

impl Applier {
    /// Makes the staged file the database, or finds that it cannot be one.
    pub(super) fn finish_restore(
        &mut self,
        entry: &LogEntry,
        request: &LoggedRequest,
        (step, finish): (&RestoreStep, &RestoreFinish),
    ) -> Result<Applied, ApplyError> {
        let done = self.try_to_restore(entry, request, (step, finish));
        if done.is_err() || self.in_disorder {
            self.recover(entry.index)?;
        }
        done.map_err(|error| environment(entry.index, &error))
    }

    fn try_to_restore(
        &mut self,
        entry: &LogEntry,
        request: &LoggedRequest,
        (step, finish): (&RestoreStep, &RestoreFinish),
    ) -> rusqlite::Result<Applied> {
        let Self { writer, staging, file, sessions, users, .. } = self;
        // As of this entry, as any other request's: the file may have been sent before a revocation.
        let rights = users.rights(Actor::of(request.authority.as_ref()));
        let permitted = rights.and_then(|rights| check_rights(&rights));
        let is_permitted = permitted.is_ok();
        let mut candidate = None;
        let (applied, _) = with_session(sessions, request, entry, || {
            let trial = permitted.map_err(Trial::Refused).and_then(|()| {
                Candidate::make(&writer.connection, staging, file.path(), &step.upload_id, finish)
            });
            let refusal = match trial {
                Ok(made) => {
                    candidate = Some(made);
                    None
                }
                Err(Trial::Refused(failure)) => Some(failure),
                Err(Trial::Environment(error)) => return Err(error),
            };
            Ok((execute::reply(entry.index, Vec::new(), refusal), true))
        })?;
        match candidate {
            Some(candidate) => self.become_candidate(candidate, entry)?,
            None => {
                // What somebody else has staged is not theirs to remove, either.
                self.record_without_restoring(entry, is_permitted.then_some(step))?;
            }
        }
        Ok(applied)
    }

    fn become_candidate(&mut self, candidate: Candidate, entry: &LogEntry) -> rusqlite::Result<()> {
        self.versions.changed_everything(entry.index);
        self.save_entry(candidate.connection(), entry)?;
        candidate.replace(&mut self.writer.connection)?;
        self.note_committed(entry);
        // The schema, what is prepared and what is staged are those of the old content.
        self.in_disorder = true;
        Ok(())
    }

    /// It was refused, or it is a repetition: an entry like any other.
    fn record_without_restoring(
        &mut self,
        entry: &LogEntry,
        ended: Option<&RestoreStep>,
    ) -> rusqlite::Result<()> {
        let transaction = self.writer.connection.unchecked_transaction()?;
        // Whoever asks again has to send the file again.
        if ended.is_some_and(|step| self.staging.is_under_way(&step.upload_id)) {
            self.staging.clear(&transaction)?;
        }
        self.save_entry(&transaction, entry)?;
        transaction.commit()?;
        self.note_committed(entry);
        Ok(())
    }

    fn save_entry(&self, connection: &rusqlite::Connection, entry: &LogEntry) -> rusqlite::Result<()> {
        let mut own = OwnStatements::on(connection);
        self.sessions.save(&mut own.put_session, &mut own.delete_session)?;
        self.versions.save(&mut own.put_version, &mut own.delete_version)?;
        own.save_position(self.position.cluster_id, entry)
    }
}
