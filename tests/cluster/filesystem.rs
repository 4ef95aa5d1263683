//! Filesystems of their own for a node's data, to be filled up, or to lose their power.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use resqlite::disk::free_bytes;

use crate::harness::DEADLINE;

/// An ext4 image on a loop device, mounted until this goes.
pub struct Filesystem {
    image: PathBuf,
    at: PathBuf,
}

impl Filesystem {
    /// Makes and mounts one. None, said aloud, where mounting is not allowed: that takes root and loop devices.
    pub fn mount(image: PathBuf, at: PathBuf, bytes: u64) -> Option<Self> {
        File::create(&image).unwrap().set_len(bytes).unwrap();
        fs::create_dir_all(&at).unwrap();
        // No blocks kept for root, who may run this test, and must meet the end of the filesystem as others do.
        let made = Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(&image).status();
        let mounted = made.is_ok_and(|made| made.success()) && mount(&image, &at);
        if !mounted {
            eprintln!("SKIPPED: no filesystem could be mounted at {}; this test needs root", at.display());
            return None;
        }
        Some(Self { image, at })
    }

    /// Cuts the power of these filesystems: what was never written to the images is gone, and nothing is written to
    /// them any more. Whoever still uses them gets errors.
    pub fn cut(filesystems: &[&Self]) {
        // The ioctl has no safe wrapper. XFS's own tests cut the power so, too: EXT4_IOC_SHUTDOWN, without a flush
        // of the journal (<https://docs.kernel.org/filesystems/ext4/>).
        let script = "import fcntl, os, struct, sys\n\
                      fds = [os.open(path, os.O_RDONLY) for path in sys.argv[1:]]\n\
                      for fd in fds: fcntl.ioctl(fd, 0x8004587D, struct.pack('I', 2))";
        let paths = filesystems.iter().map(|filesystem| &filesystem.at);
        let cut = Command::new("python3").args(["-c", script]).args(paths).status().unwrap();
        assert!(cut.success(), "the power could not be cut");
    }

    /// Power is back: the filesystem as it is on the image, its journal replayed. Nobody may use it any more.
    pub fn power_on(&self) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let unmounted = Command::new("umount").arg(&self.at).status().unwrap();
            assert!(
                unmounted.success() && mount(&self.image, &self.at),
                "{} cannot be mounted",
                self.at.display()
            );
            // A mount namespace that somebody else has just made may still hold the dead one, which is then mounted
            // again.
            let probe = self.at.join("probe");
            if File::create(&probe).and_then(|_| fs::remove_file(&probe)).is_ok() {
                return;
            }
            assert!(Instant::now() < deadline, "{} stays dead", self.at.display());
        }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.at
    }

    /// What is free.
    pub fn free_bytes(&self) -> u64 {
        free_bytes(&self.at).unwrap()
    }

    /// Takes so much room, in a file of that name.
    pub fn take(&self, name: &str, bytes: u64) {
        let mut file = OpenOptions::new().create(true).append(true).open(self.at.join(name)).unwrap();
        for _ in 0..bytes >> 16 {
            file.write_all(&[0; 1 << 16]).unwrap();
        }
        file.sync_all().unwrap();
    }

    /// Takes all the room that is left, to the last block.
    pub fn take_everything(&self, name: &str) {
        let mut file = OpenOptions::new().create(true).append(true).open(self.at.join(name)).unwrap();
        for size in [1 << 20, 4_096, 1_024, 1] {
            while file.write_all(&vec![0; size]).is_ok() {}
        }
    }

    /// Gives room back.
    pub fn give_back(&self, name: &str) {
        fs::remove_file(self.at.join(name)).unwrap();
    }
}

fn mount(image: &Path, at: &Path) -> bool {
    Command::new("mount").args(["-o", "loop"]).arg(image).arg(at).status().unwrap().success()
}

impl Drop for Filesystem {
    fn drop(&mut self) {
        // Lazily: a process that is only just ending may still hold a file.
        let _ = Command::new("umount").arg("--lazy").arg(&self.at).status();
        let _ = fs::remove_file(&self.image);
    }
}
