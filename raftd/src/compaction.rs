//! What of the log may be discarded, and when.
//!
//! Never more than the state machine beside us holds durably; and of that, a
//! tail stays for followers that lag, bounded in entries and in bytes. While a
//! snapshot is on its way to a peer, what the peer will need after it stays, and
//! for a while afterwards what it has yet to fetch: a busy cluster's tail may be
//! shorter than what was written meanwhile, and the peer would need a snapshot again.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use raft::{Entry, Index, NodeId};

/// Entries are counted in steps of about so many bytes: exact enough for a tail of many of them.
const STEP_BYTES: u64 = 1 << 20;

/// How long a peer that has got a snapshot may take to fetch what was written meanwhile.
const CATCH_UP_PATIENCE: Duration = Duration::from_secs(120);

/// Decides on compaction; carries out nothing.
#[derive(Debug)]
pub struct Compaction {
    tail_entries: u64,
    tail_bytes: u64,
    durable_index: Index,
    holds: BTreeMap<NodeId, Hold>,
    /// Up to which index how many bytes were added in this process's life, oldest first.
    steps: VecDeque<(Index, u64)>,
    added_bytes: u64,
}

/// What a peer still needs.
#[derive(Debug)]
struct Hold {
    /// Everything after this.
    after: Index,
    /// None while its snapshot is on its way.
    until: Option<Instant>,
}

impl Compaction {
    /// Keeps at most so many entries and bytes that the state machine no longer needs.
    pub fn new(tail_entries: u64, tail_bytes: u64) -> Self {
        Self {
            tail_entries,
            tail_bytes,
            durable_index: 0,
            holds: BTreeMap::new(),
            steps: VecDeque::new(),
            added_bytes: 0,
        }
    }

    /// Notes the sizes of entries as they are appended.
    pub fn entries_added(&mut self, entries: &[Entry]) {
        let Some(last) = entries.last() else { return };
        self.added_bytes += entries.iter().map(|entry| entry.size_bytes() as u64).sum::<u64>();
        match self.steps.back_mut() {
            Some((index, bytes)) if self.added_bytes - *bytes < STEP_BYTES => *index = last.index,
            _ => self.steps.push_back((last.index, self.added_bytes)),
        }
    }

    /// The state machine holds everything up to here durably.
    pub fn state_machine_is_durable(&mut self, index: Index) {
        self.durable_index = self.durable_index.max(index);
    }

    /// A peer is being brought a snapshot, which will not be older than what is durable now.
    pub fn hold(&mut self, peer: NodeId) {
        self.holds.insert(peer, Hold { after: self.durable_index, until: None });
    }

    /// The transfer to a peer has failed.
    pub fn release(&mut self, peer: NodeId) {
        self.holds.remove(&peer);
    }

    /// A peer has a snapshot up to this index, and fetches what follows from the log.
    pub fn hold_after_snapshot(&mut self, peer: NodeId, index: Index, now: Instant) {
        self.holds.insert(peer, Hold { after: index, until: Some(now + CATCH_UP_PATIENCE) });
    }

    /// Whether somebody is to be asked where the peers are.
    pub fn is_holding(&self) -> bool {
        !self.holds.is_empty()
    }

    /// A peer's log equals ours up to here. Once that is within the tail, or the peer has gone silent, it is a
    /// follower like any other.
    pub fn peer_is_at(&mut self, peer: NodeId, index: Index, active: bool) {
        let Some(hold) = self.holds.get_mut(&peer).filter(|hold| hold.until.is_some()) else { return };
        hold.after = hold.after.max(index);
        if !active || index + self.tail_entries >= self.durable_index {
            self.holds.remove(&peer);
        }
    }

    /// Ends the holds whose time has passed: a peer that has gone, or is too slow, must not fill our disk.
    pub fn expire_holds(&mut self, now: Instant) {
        self.holds.retain(|_, hold| hold.until.is_none_or(|until| now < until));
    }

    /// The index to compact to, once it is worth the work.
    pub fn due(&mut self, base: Index) -> Option<Index> {
        let by_entries = self.durable_index.saturating_sub(self.tail_entries);
        let to = by_entries.max(self.beyond_tail_bytes()).min(self.durable_index);
        let to = self.holds.values().fold(to, |to, hold| to.min(hold.after));
        while self.steps.front().is_some_and(|(index, _)| *index <= to) {
            self.steps.pop_front();
        }
        // In steps of a tenth of the tail, so that discarding is batched like everything else.
        let worth_it =
            to >= base + (self.tail_entries / 10).clamp(1, 10_000) || (to > base && by_entries < to);
        worth_it.then_some(to)
    }

    /// The last index before the tail, by its bytes.
    fn beyond_tail_bytes(&self) -> Index {
        let beyond = |(_, bytes): &&(Index, u64)| self.added_bytes - bytes >= self.tail_bytes;
        self.steps.iter().take_while(beyond).last().map_or(0, |(index, _)| *index)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use raft::EntryKind;

    use super::*;

    fn entry(index: Index, payload_bytes: usize) -> Entry {
        let payload = Bytes::from(vec![0; payload_bytes]);
        Entry { index, term: 1, kind: EntryKind::Payload, timestamp_ms: 0, payload }
    }

    #[test]
    fn nothing_is_discarded_that_the_state_machine_does_not_hold_durably() {
        let mut compaction = Compaction::new(10, 1 << 30);
        assert_eq!(compaction.due(0), None);
        compaction.state_machine_is_durable(10);
        assert_eq!(compaction.due(0), None, "all of it is tail");
        compaction.state_machine_is_durable(50);
        assert_eq!(compaction.due(0), Some(40));
        assert_eq!(compaction.due(40), None);
    }

    #[test]
    fn a_late_report_changes_nothing() {
        let mut compaction = Compaction::new(10, 1 << 30);
        compaction.state_machine_is_durable(50);
        compaction.state_machine_is_durable(20);
        assert_eq!(compaction.due(0), Some(40));
    }

    #[test]
    fn large_entries_shorten_the_tail() {
        let mut compaction = Compaction::new(1_000, 4 << 20);
        for index in 1..=20 {
            compaction.entries_added(&[entry(index, 1 << 20)]);
        }
        compaction.state_machine_is_durable(20);
        let to = compaction.due(0).expect("twenty megabytes are more than four");
        assert!((14..=16).contains(&to), "{to}");
        compaction.state_machine_is_durable(20);
        assert_eq!(compaction.due(to), None);
    }

    #[test]
    fn bytes_alone_never_reach_past_what_is_durable() {
        let mut compaction = Compaction::new(1_000, 1 << 20);
        for index in 1..=20 {
            compaction.entries_added(&[entry(index, 1 << 20)]);
        }
        compaction.state_machine_is_durable(3);
        assert_eq!(compaction.due(0), Some(3));
    }

    #[test]
    fn what_a_peer_needs_after_its_snapshot_stays() {
        let mut compaction = Compaction::new(10, 1 << 30);
        compaction.state_machine_is_durable(100);
        compaction.hold(2);
        compaction.state_machine_is_durable(500);
        assert_eq!(compaction.due(0), Some(100));
        assert_eq!(compaction.due(100), None);
        compaction.release(2);
        assert_eq!(compaction.due(100), Some(490));
    }

    #[test]
    fn what_a_peer_has_yet_to_fetch_after_its_snapshot_stays_for_a_while() {
        let mut compaction = Compaction::new(10, 1 << 30);
        let now = Instant::now();
        compaction.state_machine_is_durable(500);
        compaction.hold(2);
        compaction.hold_after_snapshot(2, 120, now);
        assert_eq!(compaction.due(0), Some(120));
        compaction.peer_is_at(2, 300, true);
        assert_eq!(compaction.due(120), Some(300));
        compaction.peer_is_at(2, 250, true);
        assert_eq!(compaction.due(300), None, "a late report moves nothing back");
        compaction.peer_is_at(2, 490, true);
        assert!(!compaction.is_holding(), "it is within the tail");
        assert_eq!(compaction.due(300), Some(490));

        compaction.hold_after_snapshot(2, 495, now);
        compaction.state_machine_is_durable(2_000);
        assert_eq!(compaction.due(490), Some(495));
        compaction.expire_holds(now + CATCH_UP_PATIENCE);
        assert_eq!(compaction.due(490), Some(1_990), "a peer that never comes must not fill the disk");

        compaction.hold_after_snapshot(2, 1_995, now);
        compaction.state_machine_is_durable(9_000);
        compaction.peer_is_at(2, 1_995, false);
        assert_eq!(compaction.due(1_990), Some(8_990), "nor must one that has gone again");
    }
}
