//! Values that are read from files, and read again when the files change.
//!
//! Whoever uses one asks for the current value each time, and keeps what he got for as long
//! as he needs it: a connection lives on with the certificates that it began with.
//! A file that cannot be used changes nothing but the log.

use std::{
    convert::Infallible,
    fmt, fs,
    os::unix::fs::MetadataExt,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::time::{Instant, MissedTickBehavior, interval};

use super::{TlsError, names::Subject};
use crate::daemon::Reloads;

/// How often the files are looked at. A look is one stat(2) for each.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often the log says that a certificate is about to expire.
const WARN_EVERY: Duration = Duration::from_secs(24 * 3600);

/// What can be read from files, again and again.
pub trait Load: Send + Sync + Sized + 'static {
    /// Where to read.
    type Source: fmt::Debug + Send + Sync;

    /// The files that it is made of.
    fn files(source: &Self::Source) -> Vec<PathBuf>;

    /// Reads them.
    fn load(source: &Self::Source) -> Result<Self, TlsError>;

    /// The certificate that this program shows, if any: its file, and what it says.
    fn certificate(&self) -> Option<(&PathBuf, &Subject)>;
}

/// The value as the files had it when they were last good. Clones share it.
#[derive(Debug)]
pub struct Reloading<T: Load> {
    shared: Arc<Shared<T>>,
}

#[derive(Debug)]
struct Shared<T: Load> {
    source: T::Source,
    state: Mutex<State<T>>,
}

#[derive(Debug)]
struct State<T> {
    current: Arc<T>,
    /// What the files looked like when they were last read, whether that went well or not.
    read: Vec<Look>,
    /// What they looked like last time.
    seen: Vec<Look>,
}

/// A file that was replaced or rewritten looks different: modification time, size, inode.
type Look = Option<(SystemTime, u64, u64)>;

impl<T: Load> Clone for Reloading<T> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone() }
    }
}

impl<T: Load> Reloading<T> {
    /// Reads the files for the first time: now a mistake is an error.
    pub fn load(source: T::Source) -> Result<Self, TlsError> {
        let read = look::<T>(&source);
        let current = Arc::new(T::load(&source)?);
        let state = Mutex::new(State { current, seen: read.clone(), read });
        Ok(Self { shared: Arc::new(Shared { source, state }) })
    }

    /// The value to begin something new with.
    pub fn current(&self) -> Arc<T> {
        self.state().current.clone()
    }

    /// Where it is read from.
    pub fn source(&self) -> &T::Source {
        &self.shared.source
    }

    /// Reads the files again, whatever they look like.
    pub fn reload(&self) -> Result<(), TlsError> {
        let read = look::<T>(&self.shared.source);
        let loaded = T::load(&self.shared.source);
        let mut state = self.state();
        (state.read, state.seen) = (read.clone(), read);
        state.current = Arc::new(loaded?);
        Ok(())
    }

    /// The value to begin something new with, after a look at the files: for those that nobody keeps current.
    pub fn refreshed(&self) -> Arc<T> {
        let changed = look::<T>(&self.shared.source) != self.state().read;
        if changed && let Err(error) = self.reload() {
            tracing::warn!(%error, "certificates not reloaded; going on with those of before");
        }
        self.current()
    }

    /// Reads the files again if they have changed. Several are seldom replaced at one moment, so they must have
    /// looked the same for two calls.
    pub fn reload_if_changed(&self) -> Option<Result<(), TlsError>> {
        let now = look::<T>(&self.shared.source);
        let settled = {
            let mut state = self.state();
            let settled = state.seen == now && state.read != now;
            state.seen = now;
            settled
        };
        settled.then(|| self.reload())
    }

    /// What to say of the certificate that this program shows, if its end is near.
    pub fn expiry_warning(&self) -> Option<String> {
        let current = self.current();
        let (file, subject) = current.certificate()?;
        let warning = subject.expiry_warning(now_seconds())?;
        Some(format!("the certificate {} {warning}", file.display()))
    }

    /// Keeps the value current, for ever: on every request to reload, and when the files have changed.
    pub async fn keep(self, mut requests: Reloads) -> Infallible {
        let mut looks = interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut warned: Option<Instant> = None;
        loop {
            if warned.is_none_or(|at| at.elapsed() >= WARN_EVERY)
                && let Some(warning) = self.expiry_warning()
            {
                tracing::warn!("{warning}");
                warned = Some(Instant::now());
            }
            let outcome = tokio::select! {
                _ = looks.tick() => self.reload_if_changed(),
                Ok(()) = requests.changed() => Some(self.reload()),
            };
            match outcome {
                None => continue,
                Some(Ok(())) => tracing::info!(files = self.files(), "certificates reloaded"),
                Some(Err(error)) => {
                    tracing::error!(%error, "certificates not reloaded; going on with those of before");
                }
            }
            warned = None;
        }
    }

    fn files(&self) -> String {
        let files = T::files(&self.shared.source);
        files.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(", ")
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        // Nothing panics while it is held, and every state is whole.
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn look<T: Load>(source: &T::Source) -> Vec<Look> {
    let look = |file: PathBuf| {
        let metadata = fs::metadata(file).ok()?;
        Some((metadata.modified().ok()?, metadata.len(), metadata.ino()))
    };
    T::files(source).into_iter().map(look).collect()
}

fn now_seconds() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// A file whose text must not be "broken".
    #[derive(Debug)]
    struct Text(String);

    impl Load for Text {
        type Source = PathBuf;

        fn files(source: &PathBuf) -> Vec<PathBuf> {
            vec![source.clone()]
        }

        fn load(source: &PathBuf) -> Result<Self, TlsError> {
            let text = fs::read_to_string(source)
                .map_err(|reason| TlsError::Unreadable { file: source.clone(), reason })?;
            match text.as_str() {
                "broken" => Err(TlsError::malformed(source, "it is broken")),
                _ => Ok(Self(text)),
            }
        }

        fn certificate(&self) -> Option<(&PathBuf, &Subject)> {
            None
        }
    }

    fn replace(file: &Path, text: &str) {
        let beside = file.with_extension("new");
        fs::write(&beside, text).unwrap();
        fs::rename(beside, file).unwrap();
    }

    #[test]
    fn a_changed_file_is_read_once_it_has_settled_and_a_broken_one_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "first").unwrap();
        let text = Reloading::<Text>::load(file.clone()).unwrap();
        assert!(text.reload_if_changed().is_none(), "nothing has changed");

        replace(&file, "second, longer");
        assert!(text.reload_if_changed().is_none(), "it may still be changing");
        text.reload_if_changed().expect("it has settled").unwrap();
        assert_eq!(text.current().0, "second, longer");

        replace(&file, "broken");
        text.reload_if_changed();
        let error = text.reload_if_changed().expect("it has settled").unwrap_err();
        assert_eq!(error.to_string(), format!("{}: it is broken", file.display()));
        assert_eq!(text.current().0, "second, longer");
        assert!(text.reload_if_changed().is_none(), "the same broken file is complained of once");

        replace(&file, "third");
        assert_eq!(text.refreshed().0, "third");
        replace(&file, "broken");
        assert_eq!(text.refreshed().0, "third");

        fs::remove_file(&file).unwrap();
        assert!(text.reload().unwrap_err().to_string().contains("cannot be read"));
        assert_eq!(text.current().0, "third");
    }

    #[test]
    fn at_the_start_a_broken_file_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        assert!(Reloading::<Text>::load(directory.path().join("none")).is_err());
    }
}
