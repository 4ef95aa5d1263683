//! What is known of this node's own state: how far it has applied, whether it
//! can, and how fresh its data is known to be. Everybody may look, few change it.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::{sync::watch, time::Instant};

/// Shared knowledge. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Facts {
    applied: watch::Sender<u64>,
    unhealthy: watch::Sender<Option<String>>,
    fresh_as_of: Arc<Mutex<Option<Instant>>>,
}

impl Facts {
    /// Of a healthy node that has applied up to this index.
    pub fn new(applied_index: u64) -> Self {
        Self {
            applied: watch::Sender::new(applied_index),
            unhealthy: watch::Sender::new(None),
            fresh_as_of: Arc::default(),
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

    /// What is wrong, or None.
    pub fn health(&self) -> Option<String> {
        self.unhealthy.borrow().clone()
    }

    /// News of it.
    pub fn watch_health(&self) -> watch::Receiver<Option<String>> {
        self.unhealthy.subscribe()
    }

    /// Says what is wrong and what to do, or that nothing is any more.
    pub fn publish_health(&self, unhealthy: Option<String>) {
        self.unhealthy.send_if_modified(|now| {
            let changed = *now != unhealthy;
            *now = unhealthy;
            changed
        });
    }

    /// Returns what is wrong, once something is.
    pub async fn unhealthy(&self) -> String {
        let mut health = self.unhealthy.subscribe();
        // We hold a sender, so waiting cannot fail for want of one.
        let unhealthy = health.wait_for(Option::is_some).await;
        unhealthy.ok().and_then(|unhealthy| unhealthy.clone()).unwrap_or_default()
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
