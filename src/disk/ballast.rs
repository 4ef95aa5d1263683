//! Room kept for the day the filesystem is full.
//!
//! A daemon writes while it opens its data: sled zeroes torn segments and writes a snapshot, SQLite makes its index
//! of the write-ahead log. So on a full filesystem even a restart fails. The ballast is a file that can be deleted
//! then: it makes the restart possible that lets reads, elections and compaction go on. It comes back when there is
//! room again.

use std::{
    fs::{self, OpenOptions},
    io,
    path::{Path, PathBuf},
};

use rustix::fs::{FallocateFlags, fallocate};

use super::free_bytes;

/// How many times its own size must be free before a ballast is made.
const ROOM_FACTOR: u64 = 3;

/// The ballast of one data directory.
#[derive(Clone, Debug)]
pub struct Ballast {
    path: PathBuf,
    bytes: u64,
}

impl Ballast {
    /// The file `ballast` of this directory, of so many bytes.
    pub fn in_dir(dir: &Path, bytes: u64) -> Self {
        Self { path: dir.join("ballast"), bytes }
    }

    /// Whether the room is reserved.
    pub fn is_held(&self) -> bool {
        // A shorter file is what an interrupted creation left.
        fs::metadata(&self.path).is_ok_and(|file| file.len() >= self.bytes)
    }

    /// Gives the room back if less than that is free otherwise.
    pub fn release_if_full(&self) -> io::Result<bool> {
        if free_bytes(self.dir())? >= self.bytes { Ok(false) } else { self.release() }
    }

    /// Gives the room back; says whether there was any.
    pub fn release(&self) -> io::Result<bool> {
        match fs::remove_file(&self.path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Reserves the room if there is enough; says whether it is held.
    ///
    /// Nothing depends on it being durable: a ballast that a power cut took is made anew.
    pub fn renew(&self) -> io::Result<bool> {
        if self.is_held() {
            return Ok(true);
        }
        if free_bytes(self.dir())? < self.bytes.saturating_mul(ROOM_FACTOR) {
            return Ok(false);
        }
        let file = OpenOptions::new().create(true).truncate(true).write(true).open(&self.path)?;
        // Blocks are reserved without being written, which is quick. A filesystem that cannot do that goes without.
        let reserved = fallocate(&file, FallocateFlags::empty(), 0, self.bytes);
        if let Err(error) = reserved {
            fs::remove_file(&self.path)?;
            return Err(error.into());
        }
        Ok(true)
    }

    fn dir(&self) -> &Path {
        self.path.parent().expect("the ballast lies in the data directory")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: u64 = 16 << 20;

    #[test]
    fn the_ballast_takes_room_and_gives_it_back() {
        use std::os::unix::fs::MetadataExt;

        let dir = tempfile::tempdir().unwrap();
        let ballast = Ballast::in_dir(dir.path(), BYTES);
        assert!(!ballast.is_held() && !ballast.release().unwrap());
        assert!(ballast.renew().unwrap(), "this test needs {} bytes of room", BYTES * ROOM_FACTOR);
        let blocks = fs::metadata(dir.path().join("ballast")).unwrap().blocks();
        assert!(blocks * 512 >= BYTES, "the blocks are really reserved");
        assert!(!ballast.release_if_full().unwrap() && ballast.is_held());
        assert!(ballast.release().unwrap() && !ballast.is_held());
    }

    #[test]
    fn a_ballast_is_not_made_where_it_would_fill_the_filesystem() {
        let dir = tempfile::tempdir().unwrap();
        let ballast = Ballast::in_dir(dir.path(), u64::MAX / 2);
        assert!(!ballast.renew().unwrap() && !ballast.is_held());
    }
}
