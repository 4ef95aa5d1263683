//! Who waits on this node for the reply to which request.
//!
//! A reply is known once the request's entry was applied *here*, whoever
//! proposed it and however often; so it is found by the request's id, not by
//! the proposal. It knows nothing of proposing, applying or gRPC.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Arc, Mutex, PoisonError},
};

use resqlite::api::StoredReply;
use tokio::sync::oneshot;

/// A request's identity: client id and sequence.
pub type Key = ([u8; 16], u64);

/// All who wait; bounded.
#[derive(Debug)]
pub struct Waiters {
    table: Mutex<Table>,
    capacity: usize,
}

#[derive(Debug, Default)]
struct Table {
    by_key: HashMap<Key, Vec<oneshot::Sender<Arc<StoredReply>>>>,
    waiting: usize,
}

/// As many wait as may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} writes are waiting for their replies already; try again later")]
pub struct TooManyWaiters(pub usize);

/// One who waits. Dropped, it waits no longer.
#[derive(Debug)]
pub struct Waiter {
    waiters: Arc<Waiters>,
    key: Key,
    receiver: oneshot::Receiver<Arc<StoredReply>>,
}

impl Waiters {
    /// Nobody waits; at most `capacity` ever will at the same time.
    pub fn new(capacity: usize) -> Arc<Self> {
        Arc::new(Self { table: Mutex::default(), capacity })
    }

    /// Begins to wait. To miss nothing, begin before proposing.
    pub fn register(self: &Arc<Self>, key: Key) -> Result<Waiter, TooManyWaiters> {
        let mut table = self.lock();
        if table.waiting >= self.capacity {
            return Err(TooManyWaiters(self.capacity));
        }
        let (sender, receiver) = oneshot::channel();
        table.by_key.entry(key).or_default().push(sender);
        table.waiting += 1;
        drop(table);
        Ok(Waiter { waiters: Arc::clone(self), key, receiver })
    }

    /// Gives the reply to all who wait for it; usually nobody on this node does.
    pub fn complete(&self, key: Key, reply: &Arc<StoredReply>) {
        let mut table = self.lock();
        let Some(senders) = table.by_key.remove(&key) else { return };
        table.waiting -= senders.len();
        drop(table);
        for sender in senders {
            // One that has just gone away needs no reply.
            let _ = sender.send(Arc::clone(reply));
        }
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.lock().waiting
    }

    fn forget_closed(&self, key: Key) {
        let mut table = self.lock();
        let Entry::Occupied(mut entry) = table.by_key.entry(key) else { return };
        let before = entry.get().len();
        entry.get_mut().retain(|sender| !sender.is_closed());
        let left = entry.get().len();
        if left == 0 {
            entry.remove();
        }
        table.waiting -= before - left;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Table> {
        // No code that can panic runs under this lock.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiter {
    /// Waits for the reply. It may be dropped and called again until it has returned one.
    pub async fn reply(&mut self) -> Arc<StoredReply> {
        match (&mut self.receiver).await {
            Ok(reply) => reply,
            // The sender lives in the table that we hold, and only leaves it with a reply or when we are dropped.
            Err(_) => std::future::pending().await,
        }
    }

    /// The reply, if it has come.
    pub fn try_reply(&mut self) -> Option<Arc<StoredReply>> {
        self.receiver.try_recv().ok()
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.receiver.close();
        self.waiters.forget_closed(self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Key = ([7; 16], 1);

    fn reply(index: u64) -> Arc<StoredReply> {
        Arc::new(StoredReply { log_index: index, ..StoredReply::default() })
    }

    #[tokio::test]
    async fn everybody_who_waits_for_an_id_gets_its_reply_and_nobody_else() {
        let waiters = Waiters::new(10);
        let mut first = waiters.register(KEY).unwrap();
        let mut second = waiters.register(KEY).unwrap();
        let mut other = waiters.register(([7; 16], 2)).unwrap();
        waiters.complete(KEY, &reply(5));
        assert_eq!(first.reply().await.log_index, 5);
        assert_eq!(second.reply().await.log_index, 5);
        assert!(other.try_reply().is_none());
        assert_eq!(waiters.waiting(), 1);
    }

    #[test]
    fn one_who_leaves_leaves_nothing_behind() {
        let waiters = Waiters::new(10);
        let stays = waiters.register(KEY).unwrap();
        drop(waiters.register(KEY).unwrap());
        assert_eq!(waiters.waiting(), 1);
        drop(stays);
        assert_eq!(waiters.waiting(), 0);
        assert!(waiters.lock().by_key.is_empty());
        waiters.complete(KEY, &reply(1));
    }

    #[test]
    fn a_waiter_dropped_after_its_reply_takes_nobody_elses_place() {
        let waiters = Waiters::new(10);
        let done = waiters.register(KEY).unwrap();
        waiters.complete(KEY, &reply(1));
        let again = waiters.register(KEY).unwrap();
        drop(done);
        assert_eq!(waiters.waiting(), 1);
        drop(again);
        assert_eq!(waiters.waiting(), 0);
    }

    #[test]
    fn no_more_may_wait_than_the_capacity() {
        let waiters = Waiters::new(1);
        let only = waiters.register(KEY).unwrap();
        assert_eq!(waiters.register(KEY).unwrap_err(), TooManyWaiters(1));
        drop(only);
        waiters.register(KEY).unwrap();
    }
}
