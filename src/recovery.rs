//! What the daemons' programs say to `resqlite cluster recover` when they are run with `--recover`: a few lines of YAML
//! on standard output. Only they can read their data.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// What `raftd --recover` finds in its data directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SurvivingLog {
    /// The cluster that the log belongs to.
    pub cluster_id: u64,
    /// The log's first entry that is kept.
    pub first_index: u64,
    /// Its last one.
    pub last_index: u64,
    /// The last one's term.
    pub last_term: u64,
    /// False for a learner that was never filled, and for a node of a first start that was never over.
    pub counts: bool,
}

/// What `sqlited --recover` finds in its data directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SurvivingDatabase {
    /// The cluster that the database belongs to; 0 if it never belonged to one.
    pub cluster_id: u64,
    /// The last entry whose effects are in the database.
    pub applied_index: u64,
}

/// As the program prints it.
pub fn to_text(report: &impl Serialize) -> String {
    serde_yaml::to_string(report).expect("a struct of numbers can be written as YAML")
}

/// As it is read again.
///
/// # Errors
/// In words: the program is not of this version.
pub fn from_text<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_yaml::from_str(text).map_err(|error| format!("its answer cannot be read ({error}): {text}"))
}
