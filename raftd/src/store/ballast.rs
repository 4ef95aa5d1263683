//! Room kept for the day the disk is full.
//!
//! sled writes while it opens (it zeroes torn segments and writes a snapshot), so that on a full disk even a restart
//! fails. The ballast is a file that can be deleted then: it makes the restart possible that lets reads, elections
//! and compaction go on. It comes back when there is room again.

use std::{
    fs::{self, OpenOptions},
    io,
    path::{Path, PathBuf},
};

use rustix::fs::{FallocateFlags, fallocate, statvfs};

/// Two of sled's segments: one to go on writing in, one for its snapshot and for what it zeroes.
const BALLAST_BYTES: u64 = 16 << 20;

/// With less than this the disk counts as full when the store opens.
const FULL_BELOW_BYTES: u64 = BALLAST_BYTES;

/// With more than this there is room for the ballast.
const ROOM_ABOVE_BYTES: u64 = 3 * BALLAST_BYTES;

/// The ballast of one data directory.
#[derive(Debug)]
pub(super) struct Ballast {
    path: PathBuf,
}

impl Ballast {
    pub(super) fn in_dir(dir: &Path) -> Self {
        Self { path: dir.join("ballast") }
    }

    /// Whether the room is reserved.
    pub(super) fn is_held(&self) -> bool {
        // A shorter file is what an interrupted creation left.
        fs::metadata(&self.path).is_ok_and(|file| file.len() >= BALLAST_BYTES)
    }

    /// Gives the room back if the disk is full.
    pub(super) fn release_if_full(&self) -> io::Result<bool> {
        if self.available_bytes()? >= FULL_BELOW_BYTES { Ok(false) } else { self.release() }
    }

    /// Gives the room back; says whether there was any.
    pub(super) fn release(&self) -> io::Result<bool> {
        match fs::remove_file(&self.path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Reserves the room if there is enough; says whether it is held.
    ///
    /// Nothing depends on it being durable: a ballast that a power cut took is made anew at the next start.
    pub(super) fn renew(&self) -> io::Result<bool> {
        if self.is_held() {
            return Ok(true);
        }
        if self.available_bytes()? < ROOM_ABOVE_BYTES {
            return Ok(false);
        }
        let file = OpenOptions::new().create(true).truncate(true).write(true).open(&self.path)?;
        // Blocks are reserved without being written, which is quick. A filesystem that cannot do that goes without.
        let reserved = fallocate(&file, FallocateFlags::empty(), 0, BALLAST_BYTES);
        if let Err(error) = reserved {
            fs::remove_file(&self.path)?;
            return Err(error.into());
        }
        Ok(true)
    }

    fn available_bytes(&self) -> io::Result<u64> {
        let dir = self.path.parent().expect("the ballast lies in the data directory");
        let disk = statvfs(dir)?;
        Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ballast_takes_room_and_gives_it_back() {
        use std::os::unix::fs::MetadataExt;

        let dir = tempfile::tempdir().unwrap();
        let ballast = Ballast::in_dir(dir.path());
        assert!(!ballast.is_held() && !ballast.release().unwrap());
        assert!(ballast.renew().unwrap(), "this test needs {ROOM_ABOVE_BYTES} bytes of room");
        let blocks = fs::metadata(dir.path().join("ballast")).unwrap().blocks();
        assert!(blocks * 512 >= BALLAST_BYTES, "the blocks are really reserved");
        assert!(!ballast.release_if_full().unwrap() && ballast.is_held());
        assert!(ballast.release().unwrap() && !ballast.is_held());
    }
}
