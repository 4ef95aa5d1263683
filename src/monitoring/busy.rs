//! Tells how long a thread has been at the same piece of work.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// What a thread is at. Clones look at the same thread.
#[derive(Clone, Debug, Default)]
pub struct Busy {
    since: Arc<Mutex<Option<Instant>>>,
}

/// The work lasts as long as this.
#[derive(Debug)]
pub struct BusyGuard {
    busy: Busy,
}

impl Busy {
    /// The thread begins a piece of work.
    pub fn begin(&self) -> BusyGuard {
        self.set(Some(Instant::now()));
        BusyGuard { busy: self.clone() }
    }

    /// For how long it has been at the same piece of work; zero when it has none.
    pub fn for_how_long(&self) -> Duration {
        let since = *self.since.lock().unwrap_or_else(PoisonError::into_inner);
        since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    fn set(&self, since: Option<Instant>) {
        *self.since.lock().unwrap_or_else(PoisonError::into_inner) = since;
    }
}

impl Drop for BusyGuard {
    fn drop(&mut self) {
        self.busy.set(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_has_an_age_only_while_it_lasts() {
        let busy = Busy::default();
        assert_eq!(busy.for_how_long(), Duration::ZERO);
        let work = busy.begin();
        while busy.for_how_long() == Duration::ZERO {}
        drop(work);
        assert_eq!(busy.for_how_long(), Duration::ZERO);
    }
}
