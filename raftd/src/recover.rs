//! A cluster whose majority is gone for good: its log becomes that of a new cluster. For `resqlite cluster recover`,
//! while the daemons are stopped.
//!
//! All of the log is kept, also what was not known to be committed here: the lost majority may have acknowledged it.
//! The node becomes a *founder* of the new cluster, and whoever founds that cluster with it supports no log that ends
//! earlier (see the core's `standing`): empty members cannot elect one of themselves, however many they are.

use raft::{Log, Standing};
use resqlite::{config::Config, recovery::SurvivingLog};

use crate::{
    RunError, new_incarnation,
    store::{Store, StoreError, StoreOptions},
};

/// What the data directory holds, whichever cluster it belongs to.
pub fn show(config: &Config) -> Result<SurvivingLog, RunError> {
    report(&open(config)?)
}

/// Makes the log the beginning of the cluster that the configuration describes. Done before, it changes nothing.
pub fn found(config: &Config) -> Result<SurvivingLog, RunError> {
    let mut store = open(config)?;
    let options = options(config, new_incarnation()?);
    if store.identity().cluster_id != options.cluster_id {
        store.found_cluster(&options)?;
    }
    report(&store)
}

fn options(config: &Config, incarnation: u64) -> StoreOptions {
    StoreOptions {
        data_dir: config.raftd.data_dir.clone(),
        cache_bytes: config.raftd.cache_bytes,
        cluster_id: config.cluster_id(),
        node_id: config.node_id,
        incarnation,
    }
}

fn open(config: &Config) -> Result<Store, StoreError> {
    Store::open_of_any_cluster(options(config, 0))
}

fn report(store: &Store) -> Result<SurvivingLog, RunError> {
    let unreadable = |error| RunError::Node(raft::NewError::Log(error));
    let (base, last) = (store.reader().base().map_err(unreadable)?, store.log_end());
    let counts = !matches!(store.hard_state().standing, Standing::New | Standing::Learner);
    Ok(SurvivingLog {
        cluster_id: store.identity().cluster_id,
        first_index: base.index + 1,
        last_index: last.index,
        last_term: last.term,
        counts,
    })
}
