//! The optimistic transactions that began at this node: a snapshot for each, and a token for its client.
//!
//! Nothing is locked. What a transaction has read goes into the log with its writes, and whoever executes
//! them compares ([`crate::versions`]). A commit ends the transaction here, before its outcome is known:
//! a client that asks again, with the same id, gets the outcome from the log.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use resqlite::api::{ReadSet, RequestId};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, MissedTickBehavior, interval, timeout_at},
};
use tonic::{Code, Status};

use crate::{
    auth::{Caller, Who},
    reads::{Held, Readers, Turn},
};

/// How often what has expired is looked for, so that its snapshot is given up even if nobody asks for it.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// All of this node's.
#[derive(Debug)]
pub struct Transactions {
    node_id: u64,
    readers: Arc<Readers>,
    hold: Duration,
    most: usize,
    room: Arc<Semaphore>,
    open: Mutex<BTreeMap<u64, Open>>,
}

#[derive(Debug)]
struct Open {
    held: Arc<Held>,
    owner: Who,
    _room: OwnedSemaphorePermit,
}

/// A transaction that has begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Begun {
    /// What the client names it by.
    pub token: String,
    /// The log index that its snapshot sees.
    pub log_index: u64,
    /// How long that is held.
    pub expires_in: Duration,
}

/// What a token says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Token {
    node_id: u64,
    /// Random, so that no other life of the node gives the same one.
    id: u64,
}

impl Token {
    fn parse(text: &str) -> Result<Self, Status> {
        let malformed =
            || Status::invalid_argument("this is not a transaction's token: send what Begin gave");
        let (node_id, id) = text.split_once('-').ok_or_else(malformed)?;
        let node_id = node_id.parse().map_err(|_| malformed())?;
        let id = u64::from_str_radix(id, 16).map_err(|_| malformed())?;
        Ok(Self { node_id, id })
    }

    fn text(self) -> String {
        format!("{}-{:016x}", self.node_id, self.id)
    }
}

impl Transactions {
    /// Holds the snapshots of at most `most` transactions, each for so long.
    pub fn new(node_id: u64, readers: Arc<Readers>, hold: Duration, most: usize) -> Self {
        let room = Arc::new(Semaphore::new(most));
        Self { node_id, readers, hold, most, room, open: Mutex::default() }
    }

    /// How many are open.
    pub fn open(&self) -> usize {
        self.lock().len()
    }

    /// Takes a snapshot of what is applied now, for this caller alone.
    pub async fn begin(&self, caller: &Caller) -> Result<Begun, Status> {
        let room = Arc::clone(&self.room).try_acquire_owned().map_err(|_| {
            Status::resource_exhausted(format!(
                "{} transactions are open at this node already: end some, or begin at another node",
                self.most
            ))
        })?;
        let held = self.readers.hold(Instant::now() + self.hold).await?;
        let id = getrandom::u64().map_err(|error| Status::internal(format!("no entropy: {error}")))?;
        let token = Token { node_id: self.node_id, id };
        let log_index = held.log_index();
        self.lock().insert(id, Open { held, owner: caller.who.clone(), _room: room });
        Ok(Begun { token: token.text(), log_index, expires_in: self.hold })
    }

    /// The transaction's snapshot, and the right to read it.
    pub async fn read(
        &self,
        caller: &Caller,
        token: &str,
        deadline: Instant,
    ) -> Result<(Arc<Held>, Turn), Status> {
        let token = Token::parse(token)?;
        let held = self.find(caller, token)?;
        let turn = turn(&held, deadline).await?;
        Ok((held, turn))
    }

    /// Ends the transaction here and tells what its writes depend on.
    ///
    /// Where it is not open (any more), a request with an id of its client's still goes to the log: it may
    /// be one that was proposed before. If not, the log answers with the reason that is given here.
    pub async fn commit(
        &self,
        caller: &Caller,
        token: &str,
        id: Option<&RequestId>,
        deadline: Instant,
    ) -> Result<ReadSet, Status> {
        let token = Token::parse(token)?;
        let held = match self.find(caller, token) {
            Ok(held) => held,
            Err(status) if id.is_some() && status.code() != Code::PermissionDenied => {
                return Ok(ReadSet { lost: status.message().to_owned(), ..ReadSet::default() });
            }
            Err(status) => return Err(status),
        };
        let _turn = turn(&held, deadline).await?;
        self.lock().remove(&token.id);
        Ok(held.read_set())
    }

    /// Ends the transaction; one that is not open any more has ended already.
    pub fn rollback(&self, caller: &Caller, token: &str) -> Result<(), Status> {
        let token = Token::parse(token)?;
        match self.find(caller, token) {
            Err(status) if status.code() != Code::Aborted => return Err(status),
            Ok(_) | Err(_) => drop(self.lock().remove(&token.id)),
        }
        Ok(())
    }

    /// Gives up what has expired. Runs until dropped.
    pub async fn expire(&self) -> Infallible {
        let mut looks = interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let now = looks.tick().await.into_std();
            self.lock().retain(|_, open| open.held.until() > now);
        }
    }

    fn find(&self, caller: &Caller, token: Token) -> Result<Arc<Held>, Status> {
        if token.node_id != self.node_id {
            return Err(elsewhere(token.node_id));
        }
        let open = self.lock();
        let open = open.get(&token.id);
        if open.is_some_and(|open| open.owner != caller.who) {
            return Err(Status::permission_denied(
                "the transaction is another user's: begin one of your own",
            ));
        }
        let held = open.map(|open| &open.held);
        let held = held.filter(|held| held.until() > Instant::now().into_std());
        held.cloned().ok_or_else(|| {
            Status::aborted("the transaction is not open any more: its snapshot has expired, or it has ended; begin again")
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn turn(held: &Held, deadline: Instant) -> Result<Turn, Status> {
    let until = deadline.min(Instant::from_std(held.until()));
    timeout_at(until, held.turn()).await.map_err(|_| {
        Status::failed_precondition(
            "another query of the transaction is still under way: take its rows to the end, or cancel it, first",
        )
    })
}

fn elsewhere(node_id: u64) -> Status {
    Status::failed_precondition(format!(
        "the transaction began at node {node_id}, which alone has its snapshot: send it there"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_what_begin_gave_and_nothing_else() {
        let token = Token { node_id: 3, id: 0xfe };
        assert_eq!(Token::parse(&token.text()).unwrap(), token);
        for wrong in ["", "3", "x-1", "3-", "3-xyz", "-1", "3-1ffffffffffffffff"] {
            let status = Token::parse(wrong).unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument, "{wrong:?}");
        }
    }
}
