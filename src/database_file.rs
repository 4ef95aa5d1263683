//! Whether an SQLite file can become a cluster's database, as far as its header tells
//! (<https://sqlite.org/fileformat2.html>, section 1.3).
//!
//! The client asks before it sends a file, every node before it takes one. It knows bytes only.

/// How much of a file the header is.
pub const HEADER_BYTES: usize = 100;
/// The size of the pages of every cluster's database.
pub const PAGE_BYTES: u64 = 4_096;

/// Where the header says with which journal the file was written, and may be read.
pub const VERSIONS: std::ops::Range<usize> = 18..20;

/// Why a file cannot be taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// There is no header.
    #[error("the file is not an SQLite database, or it is encrypted")]
    NotADatabase,
    /// The file does not end with a page.
    #[error("the file is cut off: {size_bytes} bytes are no whole number of pages of {page_bytes}")]
    CutOff {
        /// Of the file.
        size_bytes: u64,
        /// Of its pages.
        page_bytes: u64,
    },
    /// What a cluster's database has otherwise, and what cannot be changed without new rowids.
    #[error(
        "the file has {0}: convert it first with: sqlite3 FILE '.dump --preserve-rowids' | sqlite3 NEWFILE"
    )]
    Foreign(String),
}

/// Looks at the beginning of a file of this size.
pub fn check_header(beginning: &[u8], size_bytes: u64) -> Result<(), Unfit> {
    let Some(header) =
        beginning.get(..HEADER_BYTES).filter(|header| header.starts_with(b"SQLite format 3\0"))
    else {
        return Err(Unfit::NotADatabase);
    };
    let number = |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let page_bytes = match u64::from(u16::from_be_bytes([header[16], header[17]])) {
        1 => 65_536,
        page_bytes => page_bytes,
    };
    if page_bytes != PAGE_BYTES {
        return Err(Unfit::Foreign(format!("pages of {page_bytes} bytes instead of {PAGE_BYTES}")));
    }
    if !size_bytes.is_multiple_of(page_bytes) {
        return Err(Unfit::CutOff { size_bytes, page_bytes });
    }
    if header[20] != 0 {
        return Err(Unfit::Foreign("room for an extension in every page, such as a checksum".into()));
    }
    if number(52) != 0 {
        return Err(Unfit::Foreign("auto_vacuum".into()));
    }
    match number(56) {
        0 | 1 => Ok(()),
        2 | 3 => Err(Unfit::Foreign("the text encoding UTF-16 instead of UTF-8".into())),
        _ => Err(Unfit::NotADatabase),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header_after(sql: &str) -> (Vec<u8>, u64) {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let connection = rusqlite::Connection::open(file.path()).expect("a database");
        connection.execute_batch(sql).expect(sql);
        drop(connection);
        let bytes = std::fs::read(file.path()).expect("its bytes");
        let size = bytes.len() as u64;
        (bytes, size)
    }

    fn verdict(sql: &str) -> Result<(), String> {
        let (bytes, size) = header_after(sql);
        check_header(&bytes, size).map_err(|unfit| unfit.to_string())
    }

    #[test]
    fn only_what_a_clusters_database_is_like_is_taken() {
        assert_eq!(verdict("CREATE TABLE t(a)"), Ok(()));
        assert_eq!(verdict("PRAGMA journal_mode = WAL; CREATE TABLE t(a)"), Ok(()));
        for (sql, reason) in [
            ("PRAGMA page_size = 1024; CREATE TABLE t(a)", "pages of 1024 bytes"),
            ("PRAGMA page_size = 65536; CREATE TABLE t(a)", "pages of 65536 bytes"),
            ("PRAGMA encoding = 'UTF-16le'; CREATE TABLE t(a)", "UTF-16"),
            ("PRAGMA auto_vacuum = FULL; CREATE TABLE t(a)", "auto_vacuum"),
        ] {
            let error = verdict(sql).expect_err(sql);
            assert!(error.contains(reason) && error.contains("--preserve-rowids"), "{error}");
        }
    }

    #[test]
    fn what_is_no_database_is_not_taken_for_one() {
        assert_eq!(check_header(b"", 0), Err(Unfit::NotADatabase));
        assert_eq!(check_header(&[7; 4_096], 4_096), Err(Unfit::NotADatabase));
        let (bytes, size) = header_after("CREATE TABLE t(a)");
        assert_eq!(check_header(&bytes[..50], size), Err(Unfit::NotADatabase));
        assert!(matches!(check_header(&bytes, size - 1), Err(Unfit::CutOff { .. })));
    }
}
