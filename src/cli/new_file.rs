//! A file that is there whole or not at all: written beside its name, and renamed once it is durable.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process,
};

use rustix::{
    fs::{CWD, RenameFlags, renameat_with},
    io::Errno,
};

/// A file under way. Dropped before [`NewFile::finish`], it leaves nothing behind.
#[derive(Debug)]
pub struct NewFile {
    path: PathBuf,
    beside: PathBuf,
    file: File,
    replace: bool,
    finished: bool,
}

impl NewFile {
    /// Begins a file, readable to its owner alone. One of this name is replaced at the end, if that is wanted.
    pub fn create(path: &Path, replace: bool) -> io::Result<Self> {
        if !replace && path.try_exists()? {
            return Err(exists(path));
        }
        let mut beside = path.as_os_str().to_owned();
        beside.push(format!(".part-{}", process::id()));
        let beside = PathBuf::from(beside);
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        Ok(Self { path: path.to_owned(), beside, file, replace, finished: false })
    }

    /// Makes it durable and gives it its name.
    pub fn finish(mut self) -> io::Result<()> {
        self.file.sync_all()?;
        let flags = if self.replace { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
        match renameat_with(CWD, &self.beside, CWD, &self.path, flags) {
            Ok(()) => {}
            Err(Errno::EXIST) => return Err(exists(&self.path)),
            // Some file systems do not know the flag.
            Err(Errno::INVAL | Errno::NOSYS) if !self.path.try_exists()? => {
                fs::rename(&self.beside, &self.path)?
            }
            Err(error) => return Err(error.into()),
        }
        self.finished = true;
        let parent = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
    }
}

impl Write for NewFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.finished {
            // If that fails there is nobody to tell, and its name says what it is.
            let _ = fs::remove_file(&self.beside);
        }
    }
}

fn exists(path: &Path) -> io::Error {
    let message = format!("{} exists: choose another name, or say --force", path.display());
    io::Error::new(io::ErrorKind::AlreadyExists, message)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_file_has_its_name_only_when_it_is_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        let mut file = NewFile::create(&path, false).unwrap();
        file.write_all(b"first").unwrap();
        assert!(!path.exists());
        file.finish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"first");
        drop(NewFile::create(&path, true).unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"first");
        assert_eq!(names(directory.path()), ["f"]);
    }

    #[test]
    fn a_file_is_replaced_only_if_that_is_wanted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        let late = NewFile::create(&path, false).unwrap();
        fs::write(&path, b"other").unwrap();
        assert_eq!(late.finish().unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert!(NewFile::create(&path, false).unwrap_err().to_string().contains("--force"));
        assert_eq!(fs::read(&path).unwrap(), b"other");
        let mut file = NewFile::create(&path, true).unwrap();
        file.write_all(b"new").unwrap();
        file.finish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(names(directory.path()), ["f"]);
    }
}
