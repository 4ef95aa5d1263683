//! A log store that notes how long its syncs take, whichever log store it is.

use bytes::Bytes;
use prometheus::Histogram;

use super::log_store::{LogStore, LogStoreError, Scan};
use super::record::Key;

/// Passes everything on.
pub(super) struct MeasuredLog<L> {
    log: L,
    fsync: Histogram,
}

impl<L: LogStore> MeasuredLog<L> {
    pub(super) fn new(log: L, fsync: Histogram) -> Self {
        Self { log, fsync }
    }
}

impl<L: LogStore> LogStore for MeasuredLog<L> {
    fn insert(&self, key: Key, value: Vec<u8>) -> Result<(), LogStoreError> {
        self.log.insert(key, value)
    }

    fn remove(&self, key: Key) -> Result<(), LogStoreError> {
        self.log.remove(key)
    }

    fn flush(&self) -> Result<(), LogStoreError> {
        self.log.flush()
    }

    fn sync(&self) -> Result<(), LogStoreError> {
        let timer = self.fsync.start_timer();
        let synced = self.log.sync();
        timer.observe_duration();
        synced
    }

    fn first_key(&self) -> Result<Option<Key>, LogStoreError> {
        self.log.first_key()
    }

    fn last_key(&self) -> Result<Option<Key>, LogStoreError> {
        self.log.last_key()
    }

    fn at_or_before(&self, key: Key) -> Result<Option<(Key, Bytes)>, LogStoreError> {
        self.log.at_or_before(key)
    }

    fn scan(&self, from: Key) -> Scan<'_> {
        self.log.scan(from)
    }

    fn size_bytes(&self) -> Result<u64, LogStoreError> {
        self.log.size_bytes()
    }
}
