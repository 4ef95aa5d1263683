//! The execution version: what must be equal on two nodes before one may execute the other's entries.
//!
//! It knows nothing of the log; it hashes what this binary is.

use std::sync::LazyLock;

use crate::sqlite_ffi;

/// Raised whenever a rule of this crate changes what an entry means: limits, PRAGMA classes, session
/// windows, the step budget, the random number generator.
pub const SEMANTICS: u32 = 1;

/// Hash of SQLite's source id, its build flags, the architecture class and [`SEMANTICS`].
///
/// The compiler's name is left out: it is not a setting. The architecture class stays in, because a
/// compiler may fuse floating point operations on one architecture and not on another.
pub fn execution_version() -> u64 {
    static VERSION: LazyLock<u64> = LazyLock::new(hash);
    *VERSION
}

fn hash() -> u64 {
    let mut hasher = blake3::Hasher::new_derive_key("resqlite execution version");
    hasher.update(sqlite_ffi::source_id().as_bytes());
    let mut options: Vec<&str> =
        sqlite_ffi::compile_options().filter(|option| !option.starts_with("COMPILER=")).collect();
    options.sort_unstable();
    for option in options {
        hasher.update(b"\0").update(option.as_bytes());
    }
    hasher.update(b"\0").update(std::env::consts::ARCH.as_bytes());
    hasher.update(&[u8::from(cfg!(target_endian = "big"))]);
    hasher.update(&SEMANTICS.to_be_bytes());
    let mut first_bytes = [0; 8];
    first_bytes.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_be_bytes(first_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sqlite_is_built_without_stat4_and_without_foreign_keys_by_default() {
        let options: Vec<&str> = sqlite_ffi::compile_options().collect();
        assert!(!options.contains(&"ENABLE_STAT4"), "{options:?}");
        assert!(!options.iter().any(|option| option.starts_with("DEFAULT_FOREIGN_KEYS")), "{options:?}");
    }

    #[test]
    fn the_execution_version_is_a_constant_of_the_binary() {
        assert_eq!(execution_version(), execution_version());
        assert_ne!(execution_version(), 0);
    }
}
