//! Who waits for which proposal, from the socket to the commit.
//!
//! A batch handed to the core first has only its id; once the leader has put
//! it into its log it has indexes and a term; and when a commit passes those
//! indexes the terms tell whether it was this batch that was committed, or
//! another leader's entries in its place. Every proposal gets one answer.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Instant,
};

use prometheus::Histogram;
use raft::{Index, Term};
use resqlite::api::{
    ProposalOutcome, ProposalRefusal, ProposalUnknown, ProposeResponse, proposal_outcome::Outcome,
};
use tokio::sync::mpsc;

/// Where the answers to one Propose stream go. Bounded by what that stream has
/// outstanding: see `service::MAX_OUTSTANDING_PROPOSALS`.
pub type ReplySender = mpsc::UnboundedSender<ProposeResponse>;

/// The proposals of one stream that travel in one batch, in their order in it.
#[derive(Debug)]
pub struct Waiter {
    ids: Vec<u64>,
    replies: ReplySender,
}

impl Waiter {
    /// Waits for proposals with these ids, chosen by the proposer.
    pub fn new(ids: Vec<u64>, replies: ReplySender) -> Self {
        Self { ids, replies }
    }

    /// Gives all of them the same answer.
    pub fn answer_all(self, outcome: Outcome) {
        let outcomes = self.ids.iter().map(|&id| ProposalOutcome { id, outcome: Some(outcome) }).collect();
        self.send(outcomes);
    }

    fn answer_committed(self, first_index: Index) {
        let committed = |(id, index)| ProposalOutcome { id, outcome: Some(Outcome::CommittedIndex(index)) };
        let outcomes = self.ids.iter().copied().zip(first_index..).map(committed).collect();
        self.send(outcomes);
    }

    fn send(&self, outcomes: Vec<ProposalOutcome>) {
        // A proposer that is gone learns of its entries from the log.
        let _ = self.replies.send(ProposeResponse { outcomes });
    }
}

/// Refuses proposals that have certainly not been appended anywhere.
pub fn refused(refusal: ProposalRefusal) -> Outcome {
    Outcome::Refused(refusal.into())
}

/// A batch that is in some leader's log.
#[derive(Debug)]
struct Placed {
    since: Instant,
    first_index: Index,
    last_index: Index,
    term: Term,
    waiters: Vec<Waiter>,
}

/// All batches that have not been answered. Bounded by what the core admits.
#[derive(Debug)]
pub struct Proposals {
    last_batch_id: u64,
    unplaced: BTreeMap<u64, (Instant, Vec<Waiter>)>,
    placed: VecDeque<Placed>,
    /// Notes how long a batch takes from its registration to its commit.
    commit: Histogram,
}

impl Proposals {
    /// None yet; `commit` notes how long each batch takes to be committed.
    pub fn new(commit: Histogram) -> Self {
        Self { last_batch_id: 0, unplaced: BTreeMap::new(), placed: VecDeque::new(), commit }
    }

    /// Registers a batch and returns its id for the core.
    pub fn register(&mut self, waiters: Vec<Waiter>) -> u64 {
        self.last_batch_id += 1;
        self.unplaced.insert(self.last_batch_id, (Instant::now(), waiters));
        self.last_batch_id
    }

    /// The batch is in the leader's log from `first_index` on.
    pub fn placed(&mut self, batch_id: u64, first_index: Index, term: Term) {
        let Some((since, waiters)) = self.unplaced.remove(&batch_id) else { return };
        let length: usize = waiters.iter().map(|waiter| waiter.ids.len()).sum();
        let last_index = first_index + length as u64 - 1;
        self.placed.push_back(Placed { since, first_index, last_index, term, waiters });
    }

    /// The batch gets this answer: it was refused, or nobody knows.
    pub fn answer(&mut self, batch_id: u64, outcome: Outcome) {
        for waiter in self.unplaced.remove(&batch_id).into_iter().flat_map(|(_, waiters)| waiters) {
            waiter.answer_all(outcome);
        }
    }

    /// Answers every batch that the commit index has passed.
    ///
    /// `term_at` tells the term of a committed entry, or None when the log no
    /// longer holds it: then the outcome is unknown to us.
    pub fn committed<E>(
        &mut self,
        commit_index: Index,
        mut term_at: impl FnMut(Index) -> Result<Option<Term>, E>,
    ) -> Result<(), E> {
        // A batch is answered as a whole when its last entry is passed. Batches
        // are placed in log order within a term, but a new leader's may come
        // to lie before an old one's, so all are looked at: they are few.
        let mut still_waiting = VecDeque::with_capacity(self.placed.len());
        let commit_term = term_at(commit_index)?.unwrap_or(0);
        for batch in self.placed.drain(..) {
            if batch.first_index > commit_index && commit_term > batch.term {
                // A later leader has committed before the batch's place: it overwrites what it does not hold, and
                // need not write anything more for a long time. The proposer may try again under the same id.
                answer_each(batch, Outcome::Unknown(ProposalUnknown {}));
                continue;
            }
            if batch.last_index > commit_index {
                still_waiting.push_back(batch);
                continue;
            }
            // Equal term and index mean an equal entry (Log Matching, Raft
            // section 5.3), and one leader's batch is contiguous, so if its
            // last entry was committed then all of it was.
            match term_at(batch.last_index)? {
                Some(term) if term == batch.term => {
                    self.commit.observe(batch.since.elapsed().as_secs_f64());
                    answer_placed(batch);
                }
                Some(_) => answer_overwritten(batch, &mut term_at)?,
                None => answer_each(batch, Outcome::Unknown(ProposalUnknown {})),
            }
        }
        self.placed = still_waiting;
        Ok(())
    }

    /// Nobody waits for this batch.
    pub fn forget(&mut self, batch_id: u64) {
        self.unplaced.remove(&batch_id);
    }

    /// Nobody will learn more: the node stops.
    pub fn abandon(&mut self) {
        let unplaced = std::mem::take(&mut self.unplaced);
        for waiter in unplaced.into_values().flat_map(|(_, waiters)| waiters) {
            waiter.answer_all(Outcome::Unknown(ProposalUnknown {}));
        }
        for batch in self.placed.drain(..) {
            answer_each(batch, Outcome::Unknown(ProposalUnknown {}));
        }
    }
}

fn answer_placed(batch: Placed) {
    let mut index = batch.first_index;
    for waiter in batch.waiters {
        let length = waiter.ids.len() as u64;
        waiter.answer_committed(index);
        index += length;
    }
}

/// The end of the batch was replaced by another leader's entries; a beginning of it may stand.
fn answer_overwritten<E>(
    batch: Placed,
    term_at: &mut impl FnMut(Index) -> Result<Option<Term>, E>,
) -> Result<(), E> {
    let mut index = batch.first_index;
    for waiter in batch.waiters {
        let mut outcomes = Vec::with_capacity(waiter.ids.len());
        for &id in &waiter.ids {
            let outcome = match term_at(index)? {
                Some(term) if term == batch.term => Outcome::CommittedIndex(index),
                Some(_) => refused(ProposalRefusal::Overwritten),
                None => Outcome::Unknown(ProposalUnknown {}),
            };
            outcomes.push(ProposalOutcome { id, outcome: Some(outcome) });
            index += 1;
        }
        waiter.send(outcomes);
    }
    Ok(())
}

fn answer_each(batch: Placed, outcome: Outcome) {
    for waiter in batch.waiters {
        waiter.answer_all(outcome);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proposals() -> Proposals {
        Proposals::new(crate::metrics::Metrics::new().commit)
    }

    fn waiting(proposals: &mut Proposals, ids: &[u64]) -> (u64, mpsc::UnboundedReceiver<ProposeResponse>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (proposals.register(vec![Waiter::new(ids.to_vec(), sender)]), receiver)
    }

    fn outcomes(receiver: &mut mpsc::UnboundedReceiver<ProposeResponse>) -> Vec<(u64, Outcome)> {
        let response = receiver.try_recv().expect("an answer is due");
        response.outcomes.into_iter().map(|outcome| (outcome.id, outcome.outcome.unwrap())).collect()
    }

    fn committed(proposals: &mut Proposals, commit_index: Index, term_at: impl Fn(Index) -> Option<Term>) {
        proposals.committed::<()>(commit_index, |index| Ok(term_at(index))).unwrap();
    }

    #[test]
    fn a_batch_is_answered_with_its_indexes_once_all_of_it_is_committed() {
        let mut proposals = proposals();
        let (batch, mut receiver) = waiting(&mut proposals, &[7, 8]);
        proposals.placed(batch, 10, 3);
        committed(&mut proposals, 10, |_| Some(3));
        assert!(receiver.try_recv().is_err(), "half a batch is not an answer");
        committed(&mut proposals, 11, |_| Some(3));
        let expected = vec![(7, Outcome::CommittedIndex(10)), (8, Outcome::CommittedIndex(11))];
        assert_eq!(outcomes(&mut receiver), expected);
    }

    #[test]
    fn an_entry_of_another_term_in_its_place_means_overwritten() {
        let mut proposals = proposals();
        let (batch, mut receiver) = waiting(&mut proposals, &[1, 2]);
        proposals.placed(batch, 10, 3);
        committed(&mut proposals, 12, |index| Some(if index == 10 { 3 } else { 4 }));
        let expected = vec![(1, Outcome::CommittedIndex(10)), (2, refused(ProposalRefusal::Overwritten))];
        assert_eq!(outcomes(&mut receiver), expected);
    }

    #[test]
    fn what_the_log_no_longer_holds_is_unknown_and_never_called_lost() {
        let mut proposals = proposals();
        let (batch, mut receiver) = waiting(&mut proposals, &[1]);
        proposals.placed(batch, 10, 3);
        committed(&mut proposals, 500, |_| None);
        assert_eq!(outcomes(&mut receiver), vec![(1, Outcome::Unknown(ProposalUnknown {}))]);
    }

    #[test]
    fn a_batch_behind_a_later_leaders_commit_does_not_wait_for_its_index() {
        let mut proposals = proposals();
        let (batch, mut receiver) = waiting(&mut proposals, &[1]);
        proposals.placed(batch, 92, 3);
        committed(&mut proposals, 91, |_| Some(3));
        assert!(receiver.try_recv().is_err(), "its own leader commits one after the other");
        committed(&mut proposals, 91, |_| Some(4));
        assert_eq!(outcomes(&mut receiver), vec![(1, Outcome::Unknown(ProposalUnknown {}))]);
    }

    #[test]
    fn a_refused_batch_is_answered_once() {
        let mut proposals = proposals();
        let (batch, mut receiver) = waiting(&mut proposals, &[1]);
        proposals.answer(batch, refused(ProposalRefusal::NoLeader));
        proposals.answer(batch, refused(ProposalRefusal::Overloaded));
        proposals.placed(batch, 5, 1);
        committed(&mut proposals, 9, |_| Some(1));
        assert_eq!(outcomes(&mut receiver), vec![(1, refused(ProposalRefusal::NoLeader))]);
        assert!(receiver.try_recv().is_err());
    }

    #[test]
    fn stopping_leaves_nobody_waiting() {
        let mut proposals = proposals();
        let (_, mut unplaced) = waiting(&mut proposals, &[1]);
        let (batch, mut placed) = waiting(&mut proposals, &[2]);
        proposals.placed(batch, 5, 1);
        proposals.abandon();
        assert_eq!(outcomes(&mut unplaced), vec![(1, Outcome::Unknown(ProposalUnknown {}))]);
        assert_eq!(outcomes(&mut placed), vec![(2, Outcome::Unknown(ProposalUnknown {}))]);
    }
}
