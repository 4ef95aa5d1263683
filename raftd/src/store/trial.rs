//! Leaving a part of the log's discipline out, so that a test can show what it is good for.

#[cfg(all(feature = "trials", not(debug_assertions)))]
compile_error!("the feature `trials` breaks the log on purpose: it is for debug builds only");

/// Whether this part is left out. The environment is asked only where the feature `trials` is on.
pub(super) fn is_left_out(part: &str) -> bool {
    cfg!(feature = "trials") && std::env::var("RESQLITE_TRIAL").is_ok_and(|trial| trial == part)
}
