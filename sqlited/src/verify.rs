//! Whether the nodes hold the same: each hashes its whole content as of a marker in the log.
//!
//! ```text
//! marker in the log ─▶ every node hashes a view ─▶ report in the log ─▶ every node compares (verdict)
//!        ▲                                                                        │
//!   schedule, `resqlite verify`                       the node that differs from most members: diverged
//! ```
//!
//! The thread that applies opens a view right after it has committed the marker, and goes on; another thread
//! hashes that view. So no write waits, and every node's hash is about the same moment of the log. What is known of
//! the last markers is kept in memory only: a restart forgets it, and the next marker makes up for that.

mod content;
mod mark;
mod upkeep;
mod verdict;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    thread,
};

use blake3::Hash;
use resqlite::api::{ContentReport, TableHash};
use tokio::{sync::watch, time::Instant};

pub use self::{
    content::{Interrupted, content_hashes},
    mark::{FILE_SUFFIX, Mark},
    upkeep::Upkeep,
    verdict::{Verdict, verdict},
};
use crate::{
    connection::{self, Reader},
    database::DatabaseFile,
};

/// So many markers are remembered, those under way included.
const KEPT: usize = 8;
/// So many views may be hashed at the same time.
const AT_ONCE: usize = 2;

/// What became of one marker at this node.
#[derive(Clone, Debug, PartialEq)]
pub enum Verification {
    /// Being hashed.
    UnderWay,
    /// A hash for each table and one for the schema, by name.
    Done(Arc<[TableHash]>),
    /// There will be none, for this reason.
    Failed(String),
}

/// What all nodes came to as of one marker, by their ids.
pub type Reports = BTreeMap<u64, Hash>;

/// What is known of the last markers. Clones share it.
#[derive(Clone, Debug)]
pub struct Verifications {
    database: DatabaseFile,
    node_id: u64,
    members: Arc<BTreeSet<u64>>,
    known: watch::Sender<Known>,
}

#[derive(Debug)]
struct Known {
    own: BTreeMap<u64, Verification>,
    reports: BTreeMap<u64, Reports>,
    /// When the last marker was applied, or else when this began.
    last_marker: Instant,
}

impl Verifications {
    /// Of this database, at this node, one of these members.
    pub fn new(database: DatabaseFile, node_id: u64, members: impl IntoIterator<Item = u64>) -> Self {
        let known = Known { own: BTreeMap::new(), reports: BTreeMap::new(), last_marker: Instant::now() };
        let members = Arc::new(members.into_iter().collect());
        Self { database, node_id, members, known: watch::Sender::new(known) }
    }

    /// Hashes what is committed now, which is everything up to the entry at `index` and nothing after it.
    pub fn marker(&self, index: u64) {
        let under_way =
            |known: &Known| known.own.values().filter(|result| **result == Verification::UnderWay).count();
        let busy = under_way(&self.known.borrow()) >= AT_ONCE;
        self.known.send_modify(|known| known.last_marker = Instant::now());
        if busy {
            let why = format!("{AT_ONCE} verifications are under way at this node: wait for them");
            return self.publish(index, Verification::Failed(why));
        }
        self.publish(index, Verification::UnderWay);
        let started = open_view(&self.database).map_err(|error| error.to_string()).and_then(|view| {
            let (results, thread) = (self.clone(), thread::Builder::new().name("verify".into()));
            let work = move || {
                let hashed = content_hashes(view.connection());
                let failed = |error: Interrupted| Verification::Failed(error.to_string());
                let result = hashed.map_or_else(failed, |hashes| Verification::Done(hashes.into()));
                // Before the view goes, so before another database can take this one's place.
                results.publish(index, result);
            };
            thread.spawn(work).map(drop).map_err(|error| error.to_string())
        });
        if let Err(why) = started {
            self.publish(index, Verification::Failed(why));
        }
    }

    /// Takes in what a node says in the log that its content came to. What cannot be one is left out.
    pub fn report(&self, report: &ContentReport) {
        let Ok(hash) = Hash::from_slice(&report.hash) else { return };
        if self.members.contains(&report.node_id) {
            self.add_report(report.marker_index, report.node_id, hash);
        }
    }

    /// Forgets everything: another database has taken the place of the one that was hashed.
    pub fn forget(&self) {
        self.known.send_modify(|known| {
            known.own.clear();
            known.reports.clear();
        });
    }

    /// The result of this marker, once it is known; None if nothing is known of the marker.
    pub async fn result(&self, index: u64) -> Option<Verification> {
        let mut known = self.known.subscribe();
        let found = known.wait_for(|known| known.own.get(&index) != Some(&Verification::UnderWay)).await;
        // We hold a sender, so waiting cannot fail for want of one.
        found.ok()?.own.get(&index).cloned()
    }

    fn publish(&self, index: u64, result: Verification) {
        if let Verification::Done(tables) = &result {
            self.add_report(index, self.node_id, content::sum(tables));
        }
        self.known.send_modify(|known| {
            known.own.insert(index, result);
            while known.own.len() > KEPT {
                known.own.pop_first();
            }
        });
    }

    fn add_report(&self, index: u64, node: u64, hash: Hash) {
        self.known.send_modify(|known| {
            known.reports.entry(index).or_default().insert(node, hash);
            while known.reports.len() > KEPT {
                known.reports.pop_first();
            }
        });
    }
}

/// A connection that sees what is committed now. While it lives, the database cannot be replaced by a snapshot,
/// which is then tried again.
fn open_view(database: &DatabaseFile) -> rusqlite::Result<Reader> {
    let reader = connection::open_reader(database)?;
    // A transaction's view is that of its first read.
    reader.connection().execute_batch("BEGIN; SELECT count(*) FROM sqlite_schema")?;
    Ok(reader)
}
