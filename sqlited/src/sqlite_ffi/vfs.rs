//! [`Vfs`]: a VFS over the platform's own (<https://sqlite.org/vfs.html>).
//!
//! It holds every page of the database's file against its checksum, gives `'now'` the log's time, notices a full disk
//! (SQLITE_FULL alone does not say whether the disk or a counter is full), and can be told to fail, so that every
//! error path is tried by a test. What a page's checksum is, and where it lies, is [`crate::page_sums`]' business.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    io,
    mem::size_of,
    ptr, slice,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI32, AtomicI64, Ordering},
    },
};

use rusqlite::ffi::{self, sqlite3_file, sqlite3_int64, sqlite3_io_methods, sqlite3_vfs};

use crate::page_sums::{PAGE_BYTES, PageSums, WalMark};

/// Milliseconds from the Julian day 0 to the Unix epoch, SQLite's own constant.
const UNIX_EPOCH_JULIAN_MS: i64 = 24_405_875 * 8_640_000;
/// 9999-12-31 23:59:59.999, the last moment that SQLite's date functions know.
const LAST_JULIAN_MS: i64 = 464_269_060_799_999;

/// What a [`Vfs`] shares with the connection's owner.
#[derive(Debug)]
pub struct VfsState {
    julian_ms: AtomicI64,
    disk_full: AtomicBool,
    fail_after: AtomicI64,
    fail_code: AtomicI32,
}

impl VfsState {
    fn new() -> Self {
        Self {
            julian_ms: AtomicI64::new(UNIX_EPOCH_JULIAN_MS),
            disk_full: AtomicBool::new(false),
            fail_after: AtomicI64::new(-1),
            fail_code: AtomicI32::new(ffi::SQLITE_OK),
        }
    }

    /// What `'now'` means from here on, in milliseconds since 1970.
    pub fn set_time_ms(&self, unix_ms: u64) {
        let unix_ms = i64::try_from(unix_ms).unwrap_or(i64::MAX);
        let julian_ms = UNIX_EPOCH_JULIAN_MS.saturating_add(unix_ms).min(LAST_JULIAN_MS);
        self.julian_ms.store(julian_ms, Ordering::Relaxed);
    }

    /// Forgets that the disk was full.
    pub fn clear_disk_full(&self) {
        self.disk_full.store(false, Ordering::Relaxed);
    }

    /// Whether a write found the disk full since [`Self::clear_disk_full`].
    pub fn disk_was_full(&self) -> bool {
        self.disk_full.load(Ordering::Relaxed)
    }

    /// Lets `writes` more writes and syncs pass and fails all later ones with the result code
    /// `code` (such as `SQLITE_IOERR_WRITE` or `SQLITE_FULL`), until [`Self::heal`].
    pub fn fail_after(&self, writes: u32, code: i32) {
        self.fail_code.store(code, Ordering::Relaxed);
        self.fail_after.store(i64::from(writes), Ordering::Relaxed);
    }

    /// Ends what [`Self::fail_after`] began.
    pub fn heal(&self) {
        self.fail_after.store(-1, Ordering::Relaxed);
    }

    /// The result code with which the next write or sync fails, if it is to fail.
    fn injected(&self) -> Option<c_int> {
        match self.fail_after.load(Ordering::Relaxed) {
            ..0 => None,
            0 => Some(self.fail_code.load(Ordering::Relaxed)),
            left => {
                self.fail_after.store(left - 1, Ordering::Relaxed);
                None
            }
        }
    }

    fn note(&self, code: c_int) -> c_int {
        if code & 0xff == ffi::SQLITE_FULL {
            self.disk_full.store(true, Ordering::Relaxed);
        }
        code
    }
}

/// What `'now'` means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// What [`VfsState::set_time_ms`] says.
    Log,
    /// The system's time.
    System,
}

/// What the VFS's methods reach through `pAppData`.
struct AppData {
    below: *mut sqlite3_vfs,
    state: Arc<VfsState>,
    sums: Arc<PageSums>,
    clock: Clock,
}

/// A registered VFS for one database. It must outlive every connection opened through it.
#[derive(Debug)]
pub struct Vfs {
    vfs: *mut sqlite3_vfs,
    name: CString,
    state: Arc<VfsState>,
}

// SAFETY: the pointer is owned by this value alone and given to nobody, and SQLite guards its list of VFSs with a mutex.
unsafe impl Send for Vfs {}
// SAFETY: as above; what its methods share is behind locks and atomics.
unsafe impl Sync for Vfs {}

impl Vfs {
    /// Registers a new VFS over the platform's default one. Every main database that is opened through it is the
    /// one of these sums. `None` if SQLite has no default VFS or no memory.
    pub fn register(sums: Arc<PageSums>, clock: Clock) -> Option<Self> {
        // SAFETY: a null name asks for the default VFS; the answer is null or valid for the life of the process.
        let below = unsafe { ffi::sqlite3_vfs_find(ptr::null()) };
        if below.is_null() {
            return None;
        }
        let state = Arc::new(VfsState::new());
        let app_data = Box::into_raw(Box::new(AppData { below, state: Arc::clone(&state), sums, clock }));
        // The address makes the name unique in the process without a global counter.
        let name = CString::new(format!("resqlite-{:x}", app_data as usize)).ok()?;
        // SAFETY: `below` was checked not to be null.
        let (file_bytes, path_bytes) = unsafe { ((*below).szOsFile, (*below).mxPathname) };
        let vfs = Box::into_raw(Box::new(sqlite3_vfs {
            iVersion: 2,
            szOsFile: size_of::<ShimFile>() as c_int + file_bytes,
            mxPathname: path_bytes,
            pNext: ptr::null_mut(),
            zName: name.as_ptr(),
            pAppData: app_data.cast(),
            xOpen: Some(vfs_open),
            xDelete: Some(vfs_delete),
            xAccess: Some(vfs_access),
            xFullPathname: Some(vfs_full_pathname),
            // Loading extensions is never enabled, so SQLite never calls these.
            xDlOpen: None,
            xDlError: None,
            xDlSym: None,
            xDlClose: None,
            xRandomness: Some(vfs_randomness),
            xSleep: Some(vfs_sleep),
            xCurrentTime: Some(vfs_current_time),
            xGetLastError: Some(vfs_last_error),
            xCurrentTimeInt64: Some(vfs_current_time_int64),
            xSetSystemCall: None,
            xGetSystemCall: None,
            xNextSystemCall: None,
        }));
        let shim = Self { vfs, name, state };
        // SAFETY: `vfs` and all it points to live until `drop`, which unregisters it first.
        (unsafe { ffi::sqlite3_vfs_register(vfs, 0) } == ffi::SQLITE_OK).then_some(shim)
    }

    /// The name to open a connection with.
    pub fn name(&self) -> &CStr {
        &self.name
    }

    /// The clock and the fault switches.
    pub fn state(&self) -> &Arc<VfsState> {
        &self.state
    }
}

impl Drop for Vfs {
    fn drop(&mut self) {
        // SAFETY: both pointers came from `Box::into_raw` in `register` and are freed only here. Unregistering
        // one that is not registered is harmless. The owner closes its connections first.
        unsafe {
            ffi::sqlite3_vfs_unregister(self.vfs);
            drop(Box::from_raw((*self.vfs).pAppData.cast::<AppData>()));
            drop(Box::from_raw(self.vfs));
        }
    }
}

/// The head of an open file; the file of the VFS below follows it in the same allocation.
// SQLite aligns it to 8 bytes (pager.c rounds every part of its allocation so), and no more may be asked for.
#[repr(C)]
struct ShimFile {
    base: sqlite3_file,
    state: *const VfsState,
    /// Null if it is not the database's own file.
    sums: *const PageSums,
    /// The first region of the write-ahead log's index, while it is mapped.
    wal_index: *const u8,
}

/// The file of the VFS below.
///
/// # Safety
/// `file` must have been opened by [`vfs_open`], in an allocation of our `szOsFile` bytes.
unsafe fn below(file: *mut sqlite3_file) -> *mut sqlite3_file {
    // SAFETY: `szOsFile` reserves the room behind the head.
    unsafe { file.cast::<ShimFile>().add(1).cast() }
}

/// The VFS below and the shared state.
///
/// # Safety
/// `vfs` must be one that [`Vfs::register`] made; SQLite passes no other to our methods.
unsafe fn app_data<'a>(vfs: *mut sqlite3_vfs) -> &'a AppData {
    // SAFETY: `pAppData` was set in `register` and lives as long as the VFS.
    unsafe { &*(*vfs).pAppData.cast::<AppData>() }
}

unsafe extern "C" fn vfs_open(
    vfs: *mut sqlite3_vfs,
    name: *const c_char,
    file: *mut sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    // SAFETY: SQLite passes our VFS and `szOsFile` zeroed or uninitialised bytes, which are written before they
    // are read. `pMethods` is set if and only if the file below has to be closed, as sqlite3_vfs requires.
    unsafe {
        let data = app_data(vfs);
        let real = below(file);
        (*real).pMethods = ptr::null();
        let Some(open) = (*data.below).xOpen else { return ffi::SQLITE_CANTOPEN };
        let code = open(data.below, name, real, flags, out_flags);
        let methods: *const sqlite3_io_methods =
            if (*real).pMethods.is_null() { ptr::null() } else { &raw const FILE_METHODS };
        let state = Arc::as_ptr(&data.state);
        let is_database = flags & ffi::SQLITE_OPEN_MAIN_DB != 0;
        let sums = if is_database { Arc::as_ptr(&data.sums) } else { ptr::null() };
        let base = sqlite3_file { pMethods: methods };
        file.cast::<ShimFile>().write(ShimFile { base, state, sums, wal_index: ptr::null() });
        code
    }
}

/// Defines VFS methods that only hand on to the VFS below.
macro_rules! hand_on_vfs {
    ($($name:ident => $method:ident($($arg:ident: $type:ty),*);)*) => { $(
        unsafe extern "C" fn $name(vfs: *mut sqlite3_vfs, $($arg: $type),*) -> c_int {
            // SAFETY: SQLite passes our VFS, and arguments that are right for the same method of the one below.
            unsafe {
                let below = app_data(vfs).below;
                (*below).$method.map_or(ffi::SQLITE_ERROR, |method| method(below, $($arg),*))
            }
        }
    )* };
}

hand_on_vfs! {
    vfs_delete => xDelete(name: *const c_char, sync_directory: c_int);
    vfs_access => xAccess(name: *const c_char, flags: c_int, result: *mut c_int);
    vfs_full_pathname => xFullPathname(name: *const c_char, bytes: c_int, out: *mut c_char);
    vfs_randomness => xRandomness(bytes: c_int, out: *mut c_char);
    vfs_sleep => xSleep(microseconds: c_int);
    vfs_last_error => xGetLastError(bytes: c_int, out: *mut c_char);
}

unsafe extern "C" fn vfs_current_time_int64(vfs: *mut sqlite3_vfs, out: *mut sqlite3_int64) -> c_int {
    // SAFETY: SQLite passes our VFS and a place for the answer.
    unsafe {
        let AppData { below, state, clock, .. } = app_data(vfs);
        match clock {
            Clock::Log => *out = state.julian_ms.load(Ordering::Relaxed),
            Clock::System => {
                return (**below).xCurrentTimeInt64.map_or(ffi::SQLITE_ERROR, |method| method(*below, out));
            }
        }
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn vfs_current_time(vfs: *mut sqlite3_vfs, out: *mut f64) -> c_int {
    let mut julian_ms = 0;
    // SAFETY: SQLite passes our VFS and a place for the answer.
    unsafe {
        let code = vfs_current_time_int64(vfs, &raw mut julian_ms);
        *out = julian_ms as f64 / 86_400_000.0;
        code
    }
}

/// Defines file methods that only hand on to the file below.
macro_rules! hand_on_file {
    ($($name:ident => $method:ident($($arg:ident: $type:ty),*);)*) => { $(
        unsafe extern "C" fn $name(file: *mut sqlite3_file, $($arg: $type),*) -> c_int {
            // SAFETY: SQLite passes a file that `vfs_open` opened, so the one below is open as well.
            unsafe {
                let real = below(file);
                (*(*real).pMethods).$method.map_or(ffi::SQLITE_IOERR, |method| method(real, $($arg),*))
            }
        }
    )* };
}

/// The same for methods that change the file: they can be told to fail, and a full disk is noticed.
macro_rules! hand_on_change {
    ($($name:ident => $method:ident($($arg:ident: $type:ty),*);)*) => { $(
        unsafe extern "C" fn $name(file: *mut sqlite3_file, $($arg: $type),*) -> c_int {
            // SAFETY: SQLite passes a file that `vfs_open` opened, so the one below is open as well, and the
            // state lives as long as the VFS, which outlives its files.
            unsafe {
                let state = &*(*file.cast::<ShimFile>()).state;
                if let Some(code) = state.injected() {
                    return state.note(code);
                }
                let real = below(file);
                state.note((*(*real).pMethods).$method.map_or(ffi::SQLITE_IOERR, |method| method(real, $($arg),*)))
            }
        }
    )* };
}

hand_on_file! {
    file_close => xClose();
    read_below => xRead(buffer: *mut c_void, bytes: c_int, offset: sqlite3_int64);
    file_size => xFileSize(size: *mut sqlite3_int64);
    file_lock => xLock(level: c_int);
    file_unlock => xUnlock(level: c_int);
    file_check_reserved => xCheckReservedLock(result: *mut c_int);
    file_control => xFileControl(operation: c_int, argument: *mut c_void);
    file_sector_size => xSectorSize();
    file_characteristics => xDeviceCharacteristics();
    shm_map_below => xShmMap(page: c_int, page_bytes: c_int, extend: c_int, out: *mut *mut c_void);
    file_shm_lock => xShmLock(offset: c_int, locks: c_int, flags: c_int);
    shm_unmap_below => xShmUnmap(delete: c_int);
}

hand_on_change! {
    write_below => xWrite(buffer: *const c_void, bytes: c_int, offset: sqlite3_int64);
    truncate_below => xTruncate(bytes: sqlite3_int64);
    sync_below => xSync(flags: c_int);
}

/// How much of the database's file SQLite reads when it opens a connection, before it holds any lock. A checkpoint may
/// be writing the page just then, and nothing depends on what is read: the page is read again, whole.
const UNLOCKED_HEADER_BYTES: usize = 100;

/// The sums, if it is the database's own file.
///
/// # Safety
/// `file` must have been opened by [`vfs_open`].
unsafe fn sums_of<'a>(file: *mut sqlite3_file) -> Option<&'a PageSums> {
    // SAFETY: null, or alive as long as the VFS, which outlives its files.
    unsafe { (*file.cast::<ShimFile>()).sums.as_ref() }
}

unsafe extern "C" fn file_read(
    file: *mut sqlite3_file,
    buffer: *mut c_void,
    bytes: c_int,
    offset: sqlite3_int64,
) -> c_int {
    // SAFETY: SQLite passes a file that `vfs_open` opened, and a buffer of so many bytes.
    unsafe {
        let code = read_below(file, buffer, bytes, offset);
        let Some(sums) = sums_of(file) else { return code };
        // After a short read the rest of the buffer is zeros, as xRead promises.
        if !matches!(code, ffi::SQLITE_OK | ffi::SQLITE_IOERR_SHORT_READ) {
            return code;
        }
        let (at, length) = (offset as usize, bytes as usize);
        if at.is_multiple_of(PAGE_BYTES) && length.is_multiple_of(PAGE_BYTES) {
            let content = slice::from_raw_parts(buffer.cast::<u8>(), length);
            let mut pages = (at / PAGE_BYTES..).zip(content.chunks_exact(PAGE_BYTES));
            let is_right = pages.all(|(page, content)| sums.check(page as u64, content));
            return if is_right { code } else { ffi::SQLITE_IOERR_DATA };
        }
        if at == 0 && length == UNLOCKED_HEADER_BYTES {
            return code;
        }
        // A part of a page, which a header brings about that says another size: the whole page has to be right.
        for page in at / PAGE_BYTES..(at + length).div_ceil(PAGE_BYTES) {
            let mut content = [0_u8; PAGE_BYTES];
            let whole = content.as_mut_ptr().cast();
            let read = read_below(file, whole, PAGE_BYTES as c_int, (page * PAGE_BYTES) as sqlite3_int64);
            if !matches!(read, ffi::SQLITE_OK | ffi::SQLITE_IOERR_SHORT_READ) {
                return read;
            }
            if !sums.check(page as u64, &content) {
                return ffi::SQLITE_IOERR_DATA;
            }
        }
        code
    }
}

unsafe extern "C" fn file_write(
    file: *mut sqlite3_file,
    buffer: *const c_void,
    bytes: c_int,
    offset: sqlite3_int64,
) -> c_int {
    // SAFETY: SQLite passes a file that `vfs_open` opened, and a buffer of so many bytes.
    unsafe {
        if let Some(sums) = sums_of(file) {
            let (at, length) = (offset as usize, bytes as usize);
            if !at.is_multiple_of(PAGE_BYTES) || !length.is_multiple_of(PAGE_BYTES) {
                // SQLite writes whole pages, and every database here has pages of this size.
                return ffi::SQLITE_IOERR_WRITE;
            }
            let content = slice::from_raw_parts(buffer.cast::<u8>(), length);
            let pages = (at / PAGE_BYTES..).zip(content.chunks_exact(PAGE_BYTES));
            // Also if the write fails: then SQLite has the page elsewhere, until another write of it succeeds.
            pages.for_each(|(page, content)| sums.note_write(page as u64, content));
        }
        write_below(file, buffer, bytes, offset)
    }
}

unsafe extern "C" fn file_truncate(file: *mut sqlite3_file, bytes: sqlite3_int64) -> c_int {
    // SAFETY: SQLite passes a file that `vfs_open` opened.
    unsafe {
        let code = truncate_below(file, bytes);
        if let (Some(sums), ffi::SQLITE_OK) = (sums_of(file), code) {
            sums.note_truncate((bytes as u64).div_ceil(PAGE_BYTES as u64));
        }
        code
    }
}

unsafe extern "C" fn file_sync(file: *mut sqlite3_file, flags: c_int) -> c_int {
    // SAFETY: SQLite passes a file that `vfs_open` opened; the state lives as long as the VFS.
    unsafe {
        let code = sync_below(file, flags);
        let (Some(sums), ffi::SQLITE_OK) = (sums_of(file), code) else { return code };
        match sums.save(wal_mark(file)) {
            Ok(()) => code,
            Err(error) if error.kind() == io::ErrorKind::StorageFull => {
                (*(*file.cast::<ShimFile>()).state).note(ffi::SQLITE_FULL)
            }
            Err(error) => {
                tracing::error!(%error, "the checksums of the database's pages cannot be written");
                ffi::SQLITE_IOERR_FSYNC
            }
        }
    }
}

/// Which write-ahead log there is, and how many frames it has: the index's header, as
/// <https://sqlite.org/walformat.html>, section 2.1, has it. Zeros if there is none.
///
/// # Safety
/// `file` must have been opened by [`vfs_open`].
unsafe fn wal_mark(file: *mut sqlite3_file) -> WalMark {
    // SAFETY: the region is mapped while the pointer is not null, and longer than the header. Only the connection that
    // writes changes the header, and it is the one that syncs the database's file.
    unsafe {
        let index = (*file.cast::<ShimFile>()).wal_index;
        if index.is_null() {
            return WalMark::default();
        }
        let frames = index.add(16).cast::<u32>().read_volatile();
        WalMark { frames, salts: index.add(32).cast::<[u8; 8]>().read_volatile() }
    }
}

unsafe extern "C" fn file_shm_map(
    file: *mut sqlite3_file,
    page: c_int,
    page_bytes: c_int,
    extend: c_int,
    out: *mut *mut c_void,
) -> c_int {
    // SAFETY: SQLite passes a file that `vfs_open` opened, and a place for the answer, which stays mapped until
    // `file_shm_unmap`.
    unsafe {
        let code = shm_map_below(file, page, page_bytes, extend, out);
        if page == 0 && code == ffi::SQLITE_OK {
            (*file.cast::<ShimFile>()).wal_index = (*out).cast();
        }
        code
    }
}

unsafe extern "C" fn file_shm_unmap(file: *mut sqlite3_file, delete: c_int) -> c_int {
    // SAFETY: SQLite passes a file that `vfs_open` opened.
    unsafe {
        (*file.cast::<ShimFile>()).wal_index = ptr::null();
        shm_unmap_below(file, delete)
    }
}

unsafe extern "C" fn file_shm_barrier(file: *mut sqlite3_file) {
    // SAFETY: as in `hand_on_file`.
    unsafe {
        let real = below(file);
        if let Some(barrier) = (*(*real).pMethods).xShmBarrier {
            barrier(real);
        }
    }
}

/// Version 2: shared memory for the WAL, but no memory mapping, which would hide reads from us.
static FILE_METHODS: sqlite3_io_methods = sqlite3_io_methods {
    iVersion: 2,
    xClose: Some(file_close),
    xRead: Some(file_read),
    xWrite: Some(file_write),
    xTruncate: Some(file_truncate),
    xSync: Some(file_sync),
    xFileSize: Some(file_size),
    xLock: Some(file_lock),
    xUnlock: Some(file_unlock),
    xCheckReservedLock: Some(file_check_reserved),
    xFileControl: Some(file_control),
    xSectorSize: Some(file_sector_size),
    xDeviceCharacteristics: Some(file_characteristics),
    xShmMap: Some(file_shm_map),
    xShmLock: Some(file_shm_lock),
    xShmBarrier: Some(file_shm_barrier),
    xShmUnmap: Some(file_shm_unmap),
    xFetch: None,
    xUnfetch: None,
};
