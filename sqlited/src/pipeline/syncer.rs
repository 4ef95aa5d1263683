//! Makes durable what was applied, off the path of replies.
//!
//! Raftd may discard its log only up to what the database holds durably. A
//! sync for every group would compete with the log's own syncs for the disk,
//! so there is one now and then. The applying thread says after each group
//! how far it is; the syncing thread is woken only once that is far enough,
//! because a wake-up for each group costs as much as a small write itself.

use std::{
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use prometheus::Histogram;
use tokio::sync::watch;

use super::Progress;
use crate::{
    apply::Durability,
    limits::{DURABLE_EVERY, DURABLE_EVERY_ENTRIES},
};

/// The applying thread's end. Dropping it ends the syncing thread, after a last sync.
pub(super) struct ToSync(Arc<Shared>);

/// The syncing thread.
pub(super) struct Syncer {
    wal: Durability,
    shared: Arc<Shared>,
    publish: watch::Sender<Progress>,
    latency: Histogram,
}

struct Shared {
    news: Mutex<News>,
    far_enough: Condvar,
}

/// Only the newest matters, so that nothing ever queues up here.
struct News {
    applied_index: u64,
    /// The syncing thread sleeps until this is applied.
    wake_at: u64,
    /// The database was replaced; its predecessor's files must not be synced any more.
    replaced: Option<Durability>,
    ended: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, News> {
        // Nothing under the lock can panic half-way.
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ToSync {
    /// Everything up to this index is applied.
    pub(super) fn applied(&self, index: u64) {
        let mut news = self.0.lock();
        news.applied_index = index;
        if index >= news.wake_at {
            self.0.far_enough.notify_one();
        }
    }

    /// The database was replaced by one at this index.
    pub(super) fn replaced(&self, wal: Durability, index: u64) {
        let mut news = self.0.lock();
        news.replaced = Some(wal);
        news.applied_index = index;
        self.0.far_enough.notify_one();
    }
}

impl Drop for ToSync {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.far_enough.notify_one();
    }
}

impl Syncer {
    /// A syncing thread's state for a database at `applied_index`, of which nothing is known to be durable yet.
    pub(super) fn new(
        wal: Durability,
        applied_index: u64,
        publish: watch::Sender<Progress>,
        latency: Histogram,
    ) -> (Self, ToSync) {
        let news = News { applied_index, wake_at: applied_index + 1, replaced: None, ended: false };
        let shared = Arc::new(Shared { news: Mutex::new(news), far_enough: Condvar::new() });
        (Self { wal, shared: Arc::clone(&shared), publish, latency }, ToSync(shared))
    }

    /// Runs until the applying thread has ended. After an error no later sync of the file could be trusted.
    pub(super) fn run(mut self) -> io::Result<()> {
        let mut durable_index = 0;
        while let Some(seen) = self.next(durable_index) {
            let timer = self.latency.start_timer();
            durable_index = self.wal.sync()?;
            timer.observe_duration();
            self.publish.send_replace(Progress { applied_index: seen.max(durable_index), durable_index });
        }
        Ok(())
    }

    /// Waits until there is something to sync, and then for enough of it or long enough. None: that was all.
    fn next(&mut self, durable_index: u64) -> Option<u64> {
        let first = self.wait_until_applied(durable_index + 1, None);
        if first.replaced.is_none() && first.applied_index <= durable_index {
            return None;
        }
        drop(first);
        let mut news = self
            .wait_until_applied(durable_index + DURABLE_EVERY_ENTRIES, Some(Instant::now() + DURABLE_EVERY));
        let (replaced, applied_index) = (news.replaced.take(), news.applied_index);
        drop(news);
        if let Some(wal) = replaced {
            self.wal = wal;
        }
        Some(applied_index)
    }

    /// Waits until `index` is applied, the database was replaced, the applying thread has ended, or the deadline.
    fn wait_until_applied(&self, index: u64, deadline: Option<Instant>) -> MutexGuard<'_, News> {
        let mut news = self.shared.lock();
        news.wake_at = index;
        let is_due = |news: &News| news.applied_index >= index || news.replaced.is_some() || news.ended;
        while !is_due(&news) {
            let left = deadline.map_or(Duration::MAX, |at| at.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                break;
            }
            let waited = self.shared.far_enough.wait_timeout(news, left);
            news = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        news
    }
}
