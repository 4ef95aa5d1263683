//! One process for each data directory: both daemons hold the lock of theirs, and so does whoever works on it while
//! they are stopped.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, fchown},
    path::Path,
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
    process::geteuid,
};

/// The lock's file in a data directory. It has no content, and stays.
pub const LOCK_FILE: &str = "lock";

/// Holds the data directory until it is dropped or the process ends, however it ends.
#[derive(Debug)]
pub struct DirectoryLock {
    _file: File,
}

impl DirectoryLock {
    /// Locks a directory that exists; `None` if another process holds it.
    pub fn acquire(dir: &Path) -> io::Result<Option<Self>> {
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(dir.join(LOCK_FILE))?;
        if let Some((user, group)) = owner_for_root(dir)? {
            fchown(&file, Some(user), Some(group))?;
        }
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self { _file: file })),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// For root, the user and the group whose a data directory is: the daemon runs as that user and could not open what
/// root makes there for itself. For everybody else `None`.
pub fn owner_for_root(dir: &Path) -> io::Result<Option<(u32, u32)>> {
    if !geteuid().is_root() {
        return Ok(None);
    }
    let directory = fs::metadata(dir)?;
    Ok(Some((directory.uid(), directory.gid())))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::chown;

    use super::*;

    #[test]
    fn a_lock_that_root_makes_belongs_to_the_directorys_owner() {
        let dir = tempfile::tempdir().unwrap();
        if geteuid().is_root() {
            chown(dir.path(), Some(65_534), Some(65_533)).unwrap();
        }
        let _lock = DirectoryLock::acquire(dir.path()).unwrap().unwrap();
        let (directory, lock) =
            (fs::metadata(dir.path()).unwrap(), fs::metadata(dir.path().join(LOCK_FILE)).unwrap());
        assert_eq!((lock.uid(), lock.gid()), (directory.uid(), directory.gid()));
    }
}
