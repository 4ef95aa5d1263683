//! Ids of writes, so that each is applied once however often it is sent.
//!
//! A client names itself by 16 random bytes and counts its writes. It also says
//! below which count it has all replies, so that servers may forget those.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;

use crate::api::RequestId;

/// The ids of one client.
#[derive(Debug)]
pub(super) struct Ids {
    client_id: Bytes,
    under_way: Mutex<UnderWay>,
}

#[derive(Debug)]
struct UnderWay {
    next_sequence: u64,
    sequences: BTreeSet<u64>,
}

/// The id of one write while it is under way; dropping it ends that, with a reply or without:
/// nobody will send the id again.
#[derive(Debug)]
pub(super) struct Ticket {
    ids: Arc<Ids>,
    sequence: u64,
    /// The same for every attempt.
    pub id: RequestId,
}

impl Ids {
    pub fn new(client_id: [u8; 16]) -> Self {
        let under_way = UnderWay { next_sequence: 1, sequences: BTreeSet::new() };
        Self { client_id: Bytes::copy_from_slice(&client_id), under_way: Mutex::new(under_way) }
    }

    /// A new id for a write that is made when the client has seen the log up to `made_at_index`.
    pub fn ticket(self: &Arc<Self>, made_at_index: u64) -> Ticket {
        let mut under_way = self.lock();
        let sequence = under_way.next_sequence;
        under_way.next_sequence += 1;
        under_way.sequences.insert(sequence);
        let acknowledged_below = *under_way.sequences.first().unwrap_or(&sequence);
        let id = RequestId { client_id: self.client_id.clone(), sequence, acknowledged_below, made_at_index };
        drop(under_way);
        Ticket { ids: self.clone(), sequence, id }
    }

    fn lock(&self) -> MutexGuard<'_, UnderWay> {
        // Nothing that holds the lock can panic half-way through a change.
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.ids.lock().sequences.remove(&self.sequence);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watermark_never_passes_a_write_that_is_under_way() {
        let ids = Arc::new(Ids::new([7; 16]));
        let first = ids.ticket(5);
        let second = ids.ticket(6);
        assert_eq!((first.id.sequence, first.id.acknowledged_below, first.id.made_at_index), (1, 1, 5));
        assert_eq!((second.id.sequence, second.id.acknowledged_below), (2, 1));
        drop(second);
        assert_eq!(ids.ticket(6).id.acknowledged_below, 1);
        drop(first);
        let last = ids.ticket(6);
        assert_eq!((last.id.sequence, last.id.acknowledged_below), (4, 4));
    }
}
