//! The file beside the database that says that its content cannot be trusted, so that a restart does not forget it.
//!
//! It is there or not; its text is for people. It goes only with the database that it is about: when a snapshot takes
//! that one's place, or with the data directory. It knows files, and nothing of how a node behaves then.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

use blake3::Hash;

use crate::snapshot;

/// The file's name is the database's with this at its end.
pub const FILE_SUFFIX: &str = ".diverged";

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The marker as of which the contents were compared.
    pub marker_index: u64,
    /// What this node's content came to …
    pub own: Hash,
    /// … and that of most members.
    pub majority: Hash,
}

impl Mark {
    /// Writes it down beside the database, durably.
    pub fn save(&self, database: &Path) -> io::Result<()> {
        let Self { marker_index, own, majority } = self;
        let (path, new) =
            (snapshot::beside(database, FILE_SUFFIX), snapshot::beside(database, ".diverged.new"));
        let mut file = File::create(&new)?;
        writeln!(file, "{self}\nmarker index:            {marker_index}")?;
        writeln!(file, "hash of this node:       {own}\nhash of most members:    {majority}")?;
        file.sync_all()?;
        fs::rename(&new, &path)?;
        snapshot::sync_directory_of(database)
    }

    /// What stands in the mark beside this database, in a sentence; None if there is no mark.
    pub fn load(database: &Path) -> io::Result<Option<String>> {
        match fs::read(snapshot::beside(database, FILE_SUFFIX)) {
            // Whatever is in it: nobody writes one for a database that is right.
            Ok(text) => {
                let text = String::from_utf8_lossy(&text);
                let found = text.lines().next().filter(|line| !line.is_empty());
                Ok(Some(found.unwrap_or("its content was found to differ from its peers'").to_owned()))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let index = self.marker_index;
        write!(
            f,
            "its content differs from that of most members as of log index {index}: rebuild it from its peers with \
             `resqlite node replace`"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_takes_the_mark_away_with_the_content_that_it_is_about() {
        let directory = tempfile::tempdir().unwrap();
        let database = directory.path().join("resqlite.db");
        let mark = Mark { marker_index: 42, own: blake3::hash(b"own"), majority: blake3::hash(b"theirs") };
        mark.save(&database).unwrap();
        assert!(!snapshot::finish(&database).unwrap());
        assert!(Mark::load(&database).unwrap().is_some(), "a start alone changes nothing");
        for name in ["resqlite.db.incoming", "resqlite.db.incoming-sums", "resqlite.db.installing"] {
            File::create(directory.path().join(name)).unwrap();
        }
        assert!(snapshot::finish(&database).unwrap());
        assert_eq!(Mark::load(&database).unwrap(), None);
    }

    #[test]
    fn a_mark_is_found_again_and_any_mark_counts() {
        let directory = tempfile::tempdir().unwrap();
        let database = directory.path().join("resqlite.db");
        assert_eq!(Mark::load(&database).unwrap(), None);
        let mark = Mark { marker_index: 42, own: blake3::hash(b"own"), majority: blake3::hash(b"theirs") };
        mark.save(&database).unwrap();
        assert_eq!(Mark::load(&database).unwrap(), Some(mark.to_string()));
        let text = fs::read_to_string(directory.path().join("resqlite.db.diverged")).unwrap();
        assert!(text.contains(mark.own.to_hex().as_str()) && text.contains(mark.majority.to_hex().as_str()));
        assert!(text.contains("log index 42") && text.contains("resqlite node replace"), "{text}");

        fs::write(directory.path().join("resqlite.db.diverged"), [0xff]).unwrap();
        assert!(Mark::load(&database).unwrap().is_some());
        fs::write(directory.path().join("resqlite.db.diverged"), "").unwrap();
        assert!(Mark::load(&database).unwrap().is_some());
    }
}
