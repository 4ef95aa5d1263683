//! What a majority of the voters agrees on. Pure functions of the voters, so that membership can change later.

use std::collections::{BTreeMap, BTreeSet};

use crate::types::NodeId;

/// The state of an election.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VoteResult {
    /// A majority grants.
    Won,
    /// A majority can no longer grant.
    Lost,
    /// Neither yet.
    Pending,
}

/// How many voters make a majority.
fn majority(voters: &BTreeSet<NodeId>) -> usize {
    voters.len() / 2 + 1
}

/// Counts the votes; only those of voters count.
pub(crate) fn count_votes(voters: &BTreeSet<NodeId>, votes: &BTreeMap<NodeId, bool>) -> VoteResult {
    let with = |answer| voters.iter().filter(|voter| votes.get(voter) == Some(&answer)).count();
    if with(true) >= majority(voters) {
        VoteResult::Won
    } else if voters.len() - with(false) < majority(voters) {
        VoteResult::Lost
    } else {
        VoteResult::Pending
    }
}

/// The highest value that a majority has reached.
pub(crate) fn reached(voters: &BTreeSet<NodeId>, value: impl Fn(NodeId) -> u64) -> u64 {
    let mut values: Vec<u64> = voters.iter().map(|voter| value(*voter)).collect();
    values.sort_unstable_by(|a, b| b.cmp(a));
    values[majority(voters) - 1]
}

/// Whether those for which it is true are a majority.
pub(crate) fn holds(voters: &BTreeSet<NodeId>, is_true: impl Fn(NodeId) -> bool) -> bool {
    voters.iter().filter(|voter| is_true(**voter)).count() >= majority(voters)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_majority_is_more_than_half() {
        let reached_of = |values: &[u64]| {
            let voters = (0..values.len() as u64).collect();
            reached(&voters, |voter| values[voter as usize])
        };
        assert_eq!(reached_of(&[7]), 7);
        assert_eq!(reached_of(&[7, 3]), 3);
        assert_eq!(reached_of(&[7, 3, 5]), 5);
        assert_eq!(reached_of(&[7, 3, 5, 4]), 4);
        assert_eq!(reached_of(&[9, 1, 8, 2, 3]), 3);
    }

    #[test]
    fn strangers_do_not_vote() {
        let voters = BTreeSet::from([1, 2, 3]);
        let votes = BTreeMap::from([(1, true), (8, true), (9, true)]);
        assert_eq!(count_votes(&voters, &votes), VoteResult::Pending);
    }

    #[test]
    fn an_election_is_lost_once_it_cannot_be_won() {
        let voters = BTreeSet::from([1, 2, 3, 4]);
        let mut votes = BTreeMap::from([(1, true), (2, false)]);
        assert_eq!(count_votes(&voters, &votes), VoteResult::Pending);
        votes.insert(3, false);
        assert_eq!(count_votes(&voters, &votes), VoteResult::Lost);
    }
}
