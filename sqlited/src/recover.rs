//! A cluster whose majority is gone for good: its database becomes that of a new cluster. For
//! `resqlite cluster recover`, while the daemons are stopped.

use resqlite::{config::Config, recovery::SurvivingDatabase};

use crate::{
    DATABASE_FILE, RunError,
    apply::{Applier, ApplySettings},
    lock_data_dir, snapshot,
};

/// What the data directory holds, whichever cluster it belongs to.
pub fn show(config: &Config) -> Result<SurvivingDatabase, RunError> {
    with_applier(config, |_| Ok(()))
}

/// Makes the database the beginning of the cluster that the configuration describes. Done before, it changes nothing.
pub fn found(config: &Config) -> Result<SurvivingDatabase, RunError> {
    with_applier(config, |applier| applier.adopt_cluster(config.cluster_id()).map_err(RunError::Open))
}

fn with_applier(
    config: &Config,
    change: impl FnOnce(&mut Applier) -> Result<(), RunError>,
) -> Result<SurvivingDatabase, RunError> {
    let dir = &config.sqlited.data_dir;
    let database = dir.join(DATABASE_FILE);
    if !database.is_file() {
        // Opening it would make an empty one, which could then be taken for a survivor's.
        return Err(RunError::Start(format!("there is no database in {}", dir.display())));
    }
    let _lock = lock_data_dir(dir)?;
    snapshot::finish(&database)
        .map_err(|error| RunError::Start(format!("cannot finish the install of a snapshot: {error}")))?;
    let mut applier = Applier::open(&database, ApplySettings::default()).map_err(RunError::Open)?;
    change(&mut applier)?;
    let position = applier.position();
    Ok(SurvivingDatabase { cluster_id: position.cluster_id, applied_index: position.applied_index })
}
