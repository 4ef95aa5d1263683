//! What the hard state needs of a file: reads, positioned writes, and a sync.
//!
//! Two kinds exist: files of the operating system, and ones that a simulation can tear, fail and damage. It knows
//! nothing of what the bytes mean.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, MetadataExt},
};

/// A small file that is written in place.
pub trait BlockFile: Send {
    /// The whole content.
    fn read_all(&self) -> io::Result<Vec<u8>>;

    /// Writes at an offset. Until the next [`BlockFile::sync_data`] a power cut may undo any sector of it.
    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()>;

    /// Returns once everything written so far, and the length of the file, would survive a power cut.
    fn sync_data(&self) -> io::Result<()>;
}

impl BlockFile for File {
    fn read_all(&self) -> io::Result<Vec<u8>> {
        let length = usize::try_from(self.metadata()?.size()).map_err(io::Error::other)?;
        let mut bytes = vec![0; length];
        self.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        FileExt::write_all_at(self, bytes, at)
    }

    fn sync_data(&self) -> io::Result<()> {
        // fdatasync writes the length too, for without it what was written could not be read (fdatasync(2)).
        File::sync_data(self)
    }
}
