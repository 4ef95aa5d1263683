//! Whether a state machine's position belongs to the log that it wants to follow.
//!
//! What a state machine has applied is committed, wherever it was executed. So a log that ends before it, or holds what
//! was never committed in its place, begins anew after it: that is how a snapshot is installed. Pure, so that the
//! simulation decides by the same rules as the daemon.

use raft::{Index, NodeId, Position, Term};

/// What is to be done about a state machine that says where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The log holds that entry: the state machine follows from there.
    InLog,
    /// The log begins after it: what it would need next is gone.
    Discarded,
    /// The log is to begin anew after it. If the node ignores that, [`without_install`] decides.
    Install,
    /// The log holds another entry there.
    Conflict,
}

/// Looks for the last applied entry in a log that begins after `base` and holds `term` at its index. `was_taken`: it is
/// the end of the snapshot that this node was sent last. Such a snapshot that ends within the log says at least what is
/// committed: the leader sends nothing else, and waits to hear that it is there.
pub fn place(applied: Position, base: Index, term: Option<Term>, was_taken: bool) -> Place {
    if applied.index < base {
        Place::Discarded
    } else if was_taken || term.is_none() {
        Place::Install
    } else if term == Some(applied.term) {
        Place::InLog
    } else {
        Place::Conflict
    }
}

/// What is to be done if the log does not begin anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Otherwise {
    /// The log holds that entry all the same.
    Follow,
    /// This node leads with a log that ends before what was committed.
    LogLost,
    /// What is committed there is not known yet: ask again.
    Wait,
    /// Committed is something else.
    Foreign,
}

/// Decides where nothing was installed: on a leader, below the commit index, or because there was a conflict.
pub fn without_install(
    applied: Position,
    term: Option<Term>,
    commit_index: Index,
    leader: Option<NodeId>,
    own: NodeId,
) -> Otherwise {
    if term == Some(applied.term) {
        Otherwise::Follow
    } else if term.is_none() && leader == Some(own) {
        Otherwise::LogLost
    } else if applied.index > commit_index {
        Otherwise::Wait
    } else {
        Otherwise::Foreign
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const APPLIED: Position = Position { index: 5, term: 2, timestamp_ms: 0 };

    #[test]
    fn what_the_log_holds_is_followed() {
        assert_eq!(place(APPLIED, 3, Some(2), false), Place::InLog);
        assert_eq!(place(APPLIED, 5, Some(2), false), Place::InLog, "the base is committed, too");
    }

    #[test]
    fn what_the_log_has_discarded_cannot_be_followed() {
        assert_eq!(place(APPLIED, 6, None, false), Place::Discarded);
        assert_eq!(place(APPLIED, 6, None, true), Place::Discarded);
    }

    #[test]
    fn a_log_that_ends_before_it_begins_anew() {
        assert_eq!(place(APPLIED, 3, None, false), Place::Install);
    }

    #[test]
    fn a_snapshot_that_was_sent_replaces_a_conflicting_log_and_confirms_an_equal_one() {
        assert_eq!(place(APPLIED, 3, Some(1), false), Place::Conflict);
        assert_eq!(place(APPLIED, 3, Some(1), true), Place::Install);
        assert_eq!(place(APPLIED, 3, Some(2), true), Place::Install);
    }

    #[test]
    fn without_an_install_only_the_committed_entry_itself_is_followed() {
        assert_eq!(without_install(APPLIED, Some(2), 5, Some(1), 1), Otherwise::Follow);
        assert_eq!(without_install(APPLIED, None, 4, Some(1), 1), Otherwise::LogLost);
        assert_eq!(without_install(APPLIED, None, 4, Some(2), 1), Otherwise::Wait);
        assert_eq!(without_install(APPLIED, Some(1), 4, Some(2), 1), Otherwise::Wait);
        assert_eq!(without_install(APPLIED, Some(1), 5, Some(2), 1), Otherwise::Foreign);
    }
}
