//! Room on a daemon's filesystem: when there is too little for new writes, and a reserve for the day there is none.
//!
//! A daemon that runs out of room while it writes must stop, because nothing that it holds in memory can be trusted
//! after a failed write. So new writes are refused long before, while there is still room for what is under way, for
//! elections and for compaction. It knows directories; what is refused, and by whom, is decided by the daemons.

mod ballast;

use std::{
    convert::Infallible,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::statvfs;
use tokio::{
    sync::watch,
    task::spawn_blocking,
    time::{MissedTickBehavior, interval},
};

pub use ballast::Ballast;

/// How often the filesystem is asked. What a daemon writes meanwhile must fit into the room below the watermark.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Writes resume once there is this fraction more than the watermark: on its edge they would otherwise be refused and
/// taken in turns.
const HYSTERESIS_DIVISOR: u64 = 8;

/// How many bytes of the filesystem of this directory may still be written by a daemon, which has no privileges.
pub fn free_bytes(dir: &Path) -> io::Result<u64> {
    let filesystem = statvfs(dir)?;
    Ok(filesystem.f_bavail.saturating_mul(filesystem.f_frsize))
}

/// What is known of the room for one data directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// How much was free at the last look.
    pub free_bytes: u64,
    /// Why there is not enough for new writes, and what to do; None while there is.
    pub shortage: Option<String>,
}

/// Tells when the room for one data directory falls below the watermark, and when it is well above it again.
#[derive(Clone, Debug)]
pub struct Watermark {
    dir: PathBuf,
    min_free_bytes: u64,
    is_low: bool,
}

impl Watermark {
    /// For this directory; there is room until the first look.
    pub fn new(dir: &Path, min_free_bytes: u64) -> Self {
        Self { dir: dir.to_owned(), min_free_bytes, is_low: false }
    }

    /// Takes a measurement.
    pub fn observe(&mut self, free_bytes: u64) -> Room {
        let needed = match self.is_low {
            true => self.min_free_bytes.saturating_add(self.min_free_bytes / HYSTERESIS_DIVISOR),
            false => self.min_free_bytes,
        };
        self.is_low = free_bytes < needed;
        let shortage = self.is_low.then(|| {
            format!(
                "the filesystem of {} has {free_bytes} bytes free, and new writes need {needed} (min_free_bytes is {}): \
                 free some, or enlarge it; writes then go on by themselves",
                self.dir.display(),
                self.min_free_bytes
            )
        });
        Room { free_bytes, shortage }
    }
}

/// Measures the room now.
pub fn look(watermark: &mut Watermark) -> io::Result<Room> {
    Ok(watermark.observe(free_bytes(&watermark.dir)?))
}

/// Keeps `room` true, a few times a second, and the ballast in place while there is room for it. Runs until dropped.
pub async fn keep_watch(mut watermark: Watermark, ballast: Ballast, room: watch::Sender<Room>) -> Infallible {
    let mut looks = interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut complained = false;
    loop {
        looks.tick().await;
        // A filesystem that hangs must not hold up the daemon's other work.
        let (mut looking, holding) = (watermark.clone(), ballast.clone());
        let looked = spawn_blocking(move || {
            let held = holding.renew();
            (look(&mut looking).map(|now| (looking, now)), held)
        });
        let Ok((measured, held)) = looked.await else { continue };
        let unusable = measured.as_ref().err().or(held.as_ref().err());
        if let Some(error) = unusable.filter(|_| !complained) {
            tracing::warn!(dir = %watermark.dir.display(), %error, "the room on this filesystem cannot be kept in view");
        }
        complained = unusable.is_some();
        if let Ok((watermark_now, now)) = measured {
            watermark = watermark_now;
            publish(&room, now);
        }
    }
}

fn publish(room: &watch::Sender<Room>, now: Room) {
    room.send_if_modified(|known| {
        match (&known.shortage, &now.shortage) {
            (None, Some(why)) => tracing::warn!(why, "new writes are refused for want of room"),
            (Some(_), None) => {
                tracing::info!(free_bytes = now.free_bytes, "there is room for new writes again")
            }
            _ => {}
        }
        let changed = *known != now;
        *known = now;
        changed
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn below_the_watermark_the_shortage_names_filesystem_free_and_needed_bytes() {
        let mut watermark = Watermark::new(Path::new("/srv/raft"), 1_000);
        assert_eq!(watermark.observe(1_000), Room { free_bytes: 1_000, shortage: None });
        let shortage = watermark.observe(999).shortage.unwrap();
        assert!(shortage.contains("/srv/raft has 999 bytes free, and new writes need 1000"), "{shortage}");
    }

    #[test]
    fn writes_resume_only_well_above_the_watermark() {
        let mut watermark = Watermark::new(Path::new("/srv/raft"), 1_000);
        assert!(watermark.observe(10).shortage.is_some());
        let shortage = watermark.observe(1_124).shortage.unwrap();
        assert!(shortage.contains("need 1125"), "{shortage}");
        assert_eq!(watermark.observe(1_125).shortage, None);
        assert_eq!(
            watermark.observe(1_000).shortage,
            None,
            "and once resumed, they go on down to the watermark"
        );
    }

    #[tokio::test]
    async fn the_watch_reports_the_room_and_holds_the_ballast() {
        let dir = tempfile::tempdir().unwrap();
        let ballast = Ballast::in_dir(dir.path(), 1 << 20);
        let (sender, mut room) = watch::channel(Room::default());
        let watching = keep_watch(Watermark::new(dir.path(), 1), ballast.clone(), sender);
        tokio::select! {
            never = watching => match never {},
            seen = room.wait_for(|room| room.free_bytes > 0) => assert_eq!(seen.unwrap().shortage, None),
        }
        assert!(ballast.is_held());
    }
}
