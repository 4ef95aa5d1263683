//! A log store in memory that can lose power: for tests and simulations.
//!
//! It keeps what is durable apart from the changes since the last sync, so that a crash can lose any
//! suffix of those changes. It knows no more of records than the trait does.

use std::{
    collections::BTreeMap,
    ops::Bound::{Included, Unbounded},
    sync::{Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;

use super::{
    log_store::{LogStore, LogStoreError, Scan},
    record::Key,
};

/// A log store that lives as long as the value.
#[derive(Debug, Default)]
pub struct MemoryLog {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    durable: BTreeMap<Key, Bytes>,
    current: BTreeMap<Key, Bytes>,
    unsynced: Vec<(Key, Option<Bytes>)>,
    syncs: u64,
}

impl MemoryLog {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// What a power cut now would leave if the first `survivors` unsynced changes reached the disk.
    pub fn after_power_cut(&self, survivors: usize) -> Self {
        let inner = self.lock();
        let mut durable = inner.durable.clone();
        for (key, value) in inner.unsynced.iter().take(survivors) {
            apply(&mut durable, *key, value.clone());
        }
        Self { inner: Mutex::new(Inner { current: durable.clone(), durable, ..Inner::default() }) }
    }

    /// How many changes a power cut now could lose.
    pub fn unsynced(&self) -> usize {
        self.lock().unsynced.len()
    }

    /// How often the store was synced.
    pub fn syncs(&self) -> u64 {
        self.lock().syncs
    }

    /// Every key, ascending.
    pub fn keys(&self) -> Vec<Key> {
        self.lock().current.keys().copied().collect()
    }

    /// Changes one bit of a record, unnoticed, where it lies: `bit` counts from the value's beginning and wraps. False:
    /// there is no such record.
    pub fn flip_bit(&self, key: Key, bit: usize) -> bool {
        let mut inner = self.lock();
        let Inner { durable, current, .. } = &mut *inner;
        let mut found = false;
        for value in [durable.get_mut(&key), current.get_mut(&key)].into_iter().flatten() {
            let mut bytes = value.to_vec();
            let at = (bit / 8) % bytes.len();
            bytes[at] ^= 1 << (bit % 8);
            *value = bytes.into();
            found = true;
        }
        found
    }

    fn change(&self, key: Key, value: Option<Bytes>) {
        let mut inner = self.lock();
        apply(&mut inner.current, key, value.clone());
        inner.unsynced.push((key, value));
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing under the lock can panic half-way.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn apply(records: &mut BTreeMap<Key, Bytes>, key: Key, value: Option<Bytes>) {
    match value {
        Some(value) => records.insert(key, value),
        None => records.remove(&key),
    };
}

impl LogStore for MemoryLog {
    fn insert(&self, key: Key, value: Vec<u8>) -> Result<(), LogStoreError> {
        self.change(key, Some(value.into()));
        Ok(())
    }

    fn remove(&self, key: Key) -> Result<(), LogStoreError> {
        self.change(key, None);
        Ok(())
    }

    fn flush(&self) -> Result<(), LogStoreError> {
        Ok(())
    }

    fn sync(&self) -> Result<(), LogStoreError> {
        let mut inner = self.lock();
        inner.syncs += 1;
        for (key, value) in std::mem::take(&mut inner.unsynced) {
            apply(&mut inner.durable, key, value);
        }
        Ok(())
    }

    fn first_key(&self) -> Result<Option<Key>, LogStoreError> {
        Ok(self.lock().current.first_key_value().map(|(key, _)| *key))
    }

    fn last_key(&self) -> Result<Option<Key>, LogStoreError> {
        Ok(self.lock().current.last_key_value().map(|(key, _)| *key))
    }

    fn at_or_before(&self, key: Key) -> Result<Option<(Key, Bytes)>, LogStoreError> {
        let inner = self.lock();
        Ok(inner.current.range(..=key).next_back().map(|(key, value)| (*key, value.clone())))
    }

    fn scan(&self, from: Key) -> Scan<'_> {
        let mut next = Included(from);
        Box::new(std::iter::from_fn(move || {
            let inner = self.lock();
            let (key, value) = inner.current.range((next, Unbounded)).next()?;
            next = std::ops::Bound::Excluded(*key);
            Some(Ok((*key, value.clone())))
        }))
    }

    fn size_bytes(&self) -> Result<u64, LogStoreError> {
        Ok(self.lock().current.values().map(|value| value.len() as u64).sum())
    }
}
