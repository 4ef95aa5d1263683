//! The only file with `unsafe`: what rusqlite does not offer of SQLite's C interface.
//!
//! - [`WriterVfs`]: a VFS over the platform's own. It gives `'now'` the log's time, notices a full
//!   disk (SQLITE_FULL alone does not say whether the disk or a counter is full), and can be told
//!   to fail, so that every error path is tried by a test.
//! - a few calls on a connection: deferred foreign keys, `last_insert_rowid()`, the change counters.
//! - process-wide: `'localtime'` means UTC.
//!
//! It knows nothing of entries, requests or replies.
#![allow(unsafe_code)]

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    mem::size_of,
    ptr,
    sync::{
        Arc, Once,
        atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicU64, Ordering},
    },
};

use rusqlite::{
    Connection,
    ffi::{self, sqlite3_file, sqlite3_int64, sqlite3_io_methods, sqlite3_vfs},
    functions::FunctionFlags,
};

/// Milliseconds from the Julian day 0 to the Unix epoch, SQLite's own constant.
const UNIX_EPOCH_JULIAN_MS: i64 = 24_405_875 * 8_640_000;
/// 9999-12-31 23:59:59.999, the last moment that SQLite's date functions know.
const LAST_JULIAN_MS: i64 = 464_269_060_799_999;

/// What a [`WriterVfs`] shares with the connection's owner.
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

/// What the VFS's methods reach through `pAppData`.
struct AppData {
    below: *mut sqlite3_vfs,
    state: Arc<VfsState>,
}

/// A registered VFS with a clock of its own. It must outlive every connection opened through it.
pub struct WriterVfs {
    vfs: *mut sqlite3_vfs,
    name: CString,
    state: Arc<VfsState>,
}

// SAFETY: the pointer is owned by this value alone, and SQLite guards its list of VFSs with a mutex.
unsafe impl Send for WriterVfs {}

impl WriterVfs {
    /// Registers a new VFS over the platform's default one. `None` if SQLite has no default VFS or no memory.
    pub fn register() -> Option<Self> {
        // SAFETY: a null name asks for the default VFS; the answer is null or valid for the life of the process.
        let below = unsafe { ffi::sqlite3_vfs_find(ptr::null()) };
        if below.is_null() {
            return None;
        }
        let state = Arc::new(VfsState::new());
        let app_data = Box::into_raw(Box::new(AppData { below, state: Arc::clone(&state) }));
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

impl Drop for WriterVfs {
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
/// `vfs` must be one that [`WriterVfs::register`] made; SQLite passes no other to our methods.
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
        file.cast::<ShimFile>().write(ShimFile { base: sqlite3_file { pMethods: methods }, state });
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
    unsafe { *out = app_data(vfs).state.julian_ms.load(Ordering::Relaxed) };
    ffi::SQLITE_OK
}

unsafe extern "C" fn vfs_current_time(vfs: *mut sqlite3_vfs, out: *mut f64) -> c_int {
    // SAFETY: SQLite passes our VFS and a place for the answer.
    unsafe { *out = app_data(vfs).state.julian_ms.load(Ordering::Relaxed) as f64 / 86_400_000.0 };
    ffi::SQLITE_OK
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
    file_read => xRead(buffer: *mut c_void, bytes: c_int, offset: sqlite3_int64);
    file_size => xFileSize(size: *mut sqlite3_int64);
    file_lock => xLock(level: c_int);
    file_unlock => xUnlock(level: c_int);
    file_check_reserved => xCheckReservedLock(result: *mut c_int);
    file_control => xFileControl(operation: c_int, argument: *mut c_void);
    file_sector_size => xSectorSize();
    file_characteristics => xDeviceCharacteristics();
    file_shm_map => xShmMap(page: c_int, page_bytes: c_int, extend: c_int, out: *mut *mut c_void);
    file_shm_lock => xShmLock(offset: c_int, locks: c_int, flags: c_int);
    file_shm_unmap => xShmUnmap(delete: c_int);
}

hand_on_change! {
    file_write => xWrite(buffer: *const c_void, bytes: c_int, offset: sqlite3_int64);
    file_truncate => xTruncate(bytes: sqlite3_int64);
    file_sync => xSync(flags: c_int);
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

unsafe extern "C" {
    /// POSIX. Here only so that `'localtime'` can mean UTC; `struct tm` stays opaque.
    fn gmtime_r(time: *const c_void, out: *mut c_void) -> *mut c_void;
}

unsafe extern "C" fn utc_as_local_time(time: *const c_void, out: *mut c_void) -> c_int {
    // SAFETY: SQLite passes a `time_t` and room for a `struct tm`, as it would to `localtime_r`.
    c_int::from(unsafe { gmtime_r(time, out) }.is_null())
}

/// Makes `'localtime'` mean UTC in this process, whatever its time zone: a node's place must not show in its data.
///
/// This is the hook that SQLite's own tests use to replace `localtime_r`; it is process-wide.
pub fn make_local_time_utc() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let replacement: unsafe extern "C" fn(*const c_void, *mut c_void) -> c_int = utc_as_local_time;
        // SAFETY: SQLITE_TESTCTRL_LOCALTIME_FAULT takes an int and, when that is 2, a function of this type.
        unsafe { ffi::sqlite3_test_control(ffi::SQLITE_TESTCTRL_LOCALTIME_FAULT, 2 as c_int, replacement) };
    });
}

/// Whether the open transaction holds violations of deferred foreign keys, which would fail its COMMIT.
pub fn has_deferred_violations(connection: &Connection) -> bool {
    let (mut current, mut highest): (c_int, c_int) = (0, 0);
    // SAFETY: the handle is open while `connection` is borrowed; both places are valid.
    unsafe {
        ffi::sqlite3_db_status(
            connection.handle(),
            ffi::SQLITE_DBSTATUS_DEFERRED_FKS,
            &mut current,
            &mut highest,
            0,
        )
    };
    current != 0
}

/// Limits the memory that SQLite may use in this process, all connections together; 0 is no limit.
pub fn limit_memory(bytes: i64) {
    // SAFETY: any number may be given.
    unsafe { ffi::sqlite3_hard_heap_limit64(bytes) };
}

/// How much memory SQLite uses in this process.
pub fn memory_used() -> i64 {
    // SAFETY: it has no preconditions.
    unsafe { ffi::sqlite3_memory_used() }
}

/// Sets what `last_insert_rowid()` answers.
pub fn set_last_insert_rowid(connection: &Connection, rowid: i64) {
    // SAFETY: the handle is open while `connection` is borrowed.
    unsafe { ffi::sqlite3_set_last_insert_rowid(connection.handle(), rowid) };
}

/// Replaces `total_changes()` by one that counts from `base`, a value that it had on this connection.
pub fn count_changes_from(connection: &Connection, base: Arc<AtomicU64>) -> rusqlite::Result<()> {
    let flags = FunctionFlags::SQLITE_UTF8 | FunctionFlags::SQLITE_INNOCUOUS;
    connection.create_scalar_function("total_changes", 0, flags, move |context| {
        // SAFETY: the borrowed connection does not leave this call.
        let total = unsafe { context.get_connection() }?.total_changes();
        Ok((total - base.load(Ordering::Relaxed)) as i64)
    })
}

/// An operand of a [`BytesFunction`], as SQLite converts it to text.
pub struct Operand<'a> {
    /// It is NULL; `bytes` is empty.
    pub is_null: bool,
    /// It is a blob.
    pub is_blob: bool,
    /// Its text or its blob.
    pub bytes: &'a [u8],
}

/// What a [`BytesFunction`] answers.
pub enum Outcome {
    /// NULL.
    Null,
    /// An integer.
    Integer(i32),
    /// A text; it need not be valid UTF-8.
    Text(Vec<u8>),
    /// A blob.
    Blob(Vec<u8>),
    /// SQLITE_TOOBIG.
    TooBig,
}

/// An SQL function that depends on its operands' bytes alone. It must not panic.
pub type BytesFunction = fn(&[Operand<'_>]) -> Outcome;

/// Creates, or replaces, a deterministic SQL function with up to three operands.
pub fn create_bytes_function(
    connection: &Connection,
    name: &CStr,
    operands: c_int,
    function: BytesFunction,
) -> rusqlite::Result<()> {
    assert!(operands <= 3, "call_bytes_function has room for three");
    let flags = ffi::SQLITE_UTF8 | ffi::SQLITE_DETERMINISTIC | ffi::SQLITE_INNOCUOUS;
    let data = function as *mut c_void;
    // SAFETY: the handle is open while `connection` is borrowed; the name is NUL-terminated; the function is a
    // plain `fn`, which lives for ever and needs no destructor.
    let code = unsafe {
        let (handle, call) = (connection.handle(), Some(call_bytes_function as _));
        ffi::sqlite3_create_function_v2(handle, name.as_ptr(), operands, flags, data, call, None, None, None)
    };
    if code == ffi::SQLITE_OK {
        return Ok(());
    }
    Err(rusqlite::Error::SqliteFailure(ffi::Error::new(code), None))
}

unsafe extern "C" fn call_bytes_function(
    context: *mut ffi::sqlite3_context,
    count: c_int,
    values: *mut *mut ffi::sqlite3_value,
) {
    // SAFETY: SQLite passes `count` valid values; what sqlite3_value_text and _blob answer stays valid until the
    // same value is converted otherwise, which does not happen before this returns. The user data is the
    // function that `create_bytes_function` was given. SQLITE_TRANSIENT makes SQLite copy the answer.
    unsafe {
        let mut operands = [const { Operand { is_null: true, is_blob: false, bytes: &[] } }; 3];
        let count = count as usize;
        for (number, operand) in operands[..count].iter_mut().enumerate() {
            let value = *values.add(number);
            let kind = ffi::sqlite3_value_type(value);
            if kind == ffi::SQLITE_NULL {
                continue;
            }
            let is_blob = kind == ffi::SQLITE_BLOB;
            let start = if is_blob {
                ffi::sqlite3_value_blob(value).cast::<u8>()
            } else {
                ffi::sqlite3_value_text(value)
            };
            // Text and length belong together in this order, says SQLite's documentation.
            let length = ffi::sqlite3_value_bytes(value) as usize;
            if start.is_null() && length > 0 {
                return ffi::sqlite3_result_error_nomem(context);
            }
            let bytes = if start.is_null() { &[] } else { std::slice::from_raw_parts(start, length) };
            *operand = Operand { is_null: false, is_blob, bytes };
        }
        let function = std::mem::transmute::<*mut c_void, BytesFunction>(ffi::sqlite3_user_data(context));
        match function(&operands[..count]) {
            Outcome::Null => ffi::sqlite3_result_null(context),
            Outcome::Integer(integer) => ffi::sqlite3_result_int(context, integer),
            Outcome::Text(bytes) => ffi::sqlite3_result_text(
                context,
                bytes.as_ptr().cast(),
                bytes.len() as c_int,
                ffi::SQLITE_TRANSIENT(),
            ),
            Outcome::Blob(bytes) => ffi::sqlite3_result_blob(
                context,
                bytes.as_ptr().cast(),
                bytes.len() as c_int,
                ffi::SQLITE_TRANSIENT(),
            ),
            Outcome::TooBig => ffi::sqlite3_result_error_toobig(context),
        }
    }
}

/// The exact source of the SQLite library, as `sqlite_source_id()` tells it.
pub fn source_id() -> &'static str {
    // SAFETY: a static, NUL-terminated ASCII string.
    unsafe { CStr::from_ptr(ffi::sqlite3_sourceid()) }.to_str().unwrap_or("")
}

/// The options that the SQLite library was compiled with.
pub fn compile_options() -> impl Iterator<Item = &'static str> {
    (0..).map_while(|number| {
        // SAFETY: any number may be asked for; the answer is null or a static, NUL-terminated string.
        let option = unsafe { ffi::sqlite3_compileoption_get(number) };
        // SAFETY: checked not to be null.
        (!option.is_null()).then(|| unsafe { CStr::from_ptr(option) }.to_str().unwrap_or(""))
    })
}
