//! Which term an index has, without reading its entry.
//!
//! Terms never decrease along the log (Raft paper, section 5.3), so a log is a few runs of equal terms, one
//! for each leader. This is what lets a leader find where a follower's log diverges without reading the disk.

use std::collections::VecDeque;

use raft::{Index, Term};

/// The runs of equal terms in the log above its base; one small pair for each leader in it.
#[derive(Clone, Debug, Default)]
pub(super) struct TermRuns {
    /// The first index of each run and its term, ascending. The first run may begin at or below the base.
    runs: VecDeque<(Index, Term)>,
}

impl TermRuns {
    /// Adds the entry after the last one.
    pub(super) fn push(&mut self, index: Index, term: Term) {
        if self.runs.back().is_none_or(|(_, last)| *last != term) {
            self.runs.push_back((index, term));
        }
    }

    /// Forgets the entries from this index on.
    pub(super) fn truncate(&mut self, from: Index) {
        while self.runs.back().is_some_and(|(first, _)| *first >= from) {
            self.runs.pop_back();
        }
    }

    /// Forgets the entries up to this index.
    pub(super) fn discard(&mut self, to: Index) {
        while self.runs.get(1).is_some_and(|(first, _)| *first <= to + 1) {
            self.runs.pop_front();
        }
    }

    /// Forgets every entry.
    pub(super) fn clear(&mut self) {
        self.runs.clear();
    }

    /// The term of an entry that the caller knows to be in the log.
    pub(super) fn term_at(&self, index: Index) -> Option<Term> {
        let after = self.runs.partition_point(|(first, _)| *first <= index);
        Some(self.runs.get(after.checked_sub(1)?)?.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_follow_the_log_through_truncation_and_compaction() {
        let mut runs = TermRuns::default();
        for (index, term) in [(1, 1), (2, 1), (3, 4), (4, 4), (5, 6)] {
            runs.push(index, term);
        }
        let terms = |runs: &TermRuns| (1..=5).map(|index| runs.term_at(index).unwrap()).collect::<Vec<_>>();
        assert_eq!(terms(&runs), [1, 1, 4, 4, 6]);
        runs.truncate(4);
        runs.push(4, 7);
        assert_eq!((runs.term_at(3), runs.term_at(4)), (Some(4), Some(7)));
        runs.discard(3);
        assert_eq!((runs.term_at(3), runs.term_at(4), runs.runs.len()), (None, Some(7), 1));
    }

    #[test]
    fn a_run_goes_on_after_everything_before_was_discarded() {
        let mut runs = TermRuns::default();
        runs.push(1, 3);
        runs.discard(1);
        runs.push(2, 3);
        assert_eq!(runs.term_at(2), Some(3));
    }
}
