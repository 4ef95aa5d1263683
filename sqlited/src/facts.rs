//! What is known of this node's own state: how far it has applied, whether it
//! can, whether it may be trusted, and how fresh its data is known to be.
//! Everybody may look, few change it.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use resqlite::disk::Room;
use tokio::{sync::watch, time::Instant};

/// Shared knowledge. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Facts {
    applied: watch::Sender<u64>,
    health: watch::Sender<Health>,
    room: watch::Sender<Room>,
    fresh_as_of: Arc<Mutex<Option<Instant>>>,
    behind: Arc<AtomicBool>,
}

/// What is wrong, each with what to do about it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Nothing can be applied.
    pub stuck: Option<String>,
    /// The content is not its peers'. Only another content changes that.
    pub diverged: Option<String>,
    /// Something that a person must look at, while the node serves on.
    pub alarm: Option<String>,
}

impl Health {
    /// Why requests cannot be executed here, or None.
    pub fn unhealthy(&self) -> Option<&String> {
        self.diverged.as_ref().or(self.stuck.as_ref())
    }
}

impl Facts {
    /// Of a healthy node that has applied up to this index.
    pub fn new(applied_index: u64) -> Self {
        Self {
            applied: watch::Sender::new(applied_index),
            health: watch::Sender::default(),
            room: watch::Sender::new(Room::default()),
            fresh_as_of: Arc::default(),
            behind: Arc::default(),
        }
    }

    /// The applied index, as published: whoever reads after this sees at least that.
    pub fn applied_index(&self) -> u64 {
        *self.applied.borrow()
    }

    /// Publishes the applied index, once its replies are given.
    pub fn publish_applied(&self, index: u64) {
        self.applied.send_replace(index);
    }

    /// Returns once this index is applied.
    pub async fn applied(&self, index: u64) {
        // We hold a sender, so waiting cannot fail for want of one.
        let _ = self.applied.subscribe().wait_for(|applied| *applied >= index).await;
    }

    /// Why requests cannot be executed here, or None.
    pub fn health(&self) -> Option<String> {
        self.health.borrow().unhealthy().cloned()
    }

    /// Why nothing can be applied, or None.
    pub fn stuck_now(&self) -> Option<String> {
        self.health.borrow().stuck.clone()
    }

    /// Why the content cannot be trusted, or None.
    pub fn diverged(&self) -> Option<String> {
        self.health.borrow().diverged.clone()
    }

    /// What a person must look at while the node serves on, or None.
    pub fn alarm(&self) -> Option<String> {
        self.health.borrow().alarm.clone()
    }

    /// News of all that.
    pub fn watch_health(&self) -> watch::Receiver<Health> {
        self.health.subscribe()
    }

    /// Says why nothing can be applied and what to do, or that it can be again.
    pub fn publish_stuck(&self, stuck: Option<String>) {
        self.change(|health| &mut health.stuck, stuck);
    }

    /// Says why the content cannot be trusted and what to do, or that it is another content now.
    pub fn publish_diverged(&self, diverged: Option<String>) {
        self.change(|health| &mut health.diverged, diverged);
    }

    /// Says what a person must look at, or that there is nothing any more.
    pub fn publish_alarm(&self, alarm: Option<String>) {
        self.change(|health| &mut health.alarm, alarm);
    }

    fn change(&self, part: fn(&mut Health) -> &mut Option<String>, to: Option<String>) {
        self.health.send_if_modified(|health| {
            let part = part(health);
            let changed = *part != to;
            *part = to;
            changed
        });
    }

    /// Returns why requests cannot be executed here, once they cannot.
    pub async fn unhealthy(&self) -> String {
        self.once(|health| health.unhealthy()).await
    }

    /// Returns why nothing can be applied, once nothing can.
    pub async fn stuck(&self) -> String {
        self.once(|health| health.stuck.as_ref()).await
    }

    async fn once(&self, part: fn(&Health) -> Option<&String>) -> String {
        let mut health = self.health.subscribe();
        // We hold a sender, so waiting cannot fail for want of one.
        let found = health.wait_for(|health| part(health).is_some()).await;
        found.ok().and_then(|health| part(&health).cloned()).unwrap_or_default()
    }

    /// Where the room on the database's filesystem is published.
    pub fn room_publisher(&self) -> watch::Sender<Room> {
        self.room.clone()
    }

    /// The room on the database's filesystem, and news of it.
    pub fn room(&self) -> watch::Receiver<Room> {
        self.room.subscribe()
    }

    /// Whether this node lacks what was committed some time ago.
    pub fn is_behind(&self) -> bool {
        self.behind.load(Ordering::Relaxed)
    }

    /// Says so.
    pub fn publish_behind(&self, behind: bool) {
        self.behind.store(behind, Ordering::Relaxed);
    }

    /// Notes that a read now sees every write that was acknowledged before `moment`.
    pub fn publish_fresh(&self, moment: Instant) {
        let mut fresh = self.fresh_as_of.lock().unwrap_or_else(PoisonError::into_inner);
        *fresh = (*fresh).max(Some(moment));
    }

    /// The latest moment of which that is known.
    pub fn fresh_as_of(&self) -> Option<Instant> {
        *self.fresh_as_of.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
