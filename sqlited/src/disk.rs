//! How much room there is on the disk under the database.

use std::{io, path::Path};

use rustix::fs::statvfs;

/// The bytes that this process may still use on the disk that holds this file.
pub fn free_bytes(path: &Path) -> io::Result<u64> {
    let disk = statvfs(path)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}
