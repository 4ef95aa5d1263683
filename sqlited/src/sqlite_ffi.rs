//! The only place with `unsafe`: what rusqlite does not offer of SQLite's C interface.
//!
//! - [`Vfs`]: a VFS over the platform's own, in a file of its own.
//! - a few calls on a connection: deferred foreign keys, `last_insert_rowid()`, the change counters.
//! - process-wide: `'localtime'` means UTC.
//!
//! It knows nothing of entries, requests or replies.
#![allow(unsafe_code)]

mod vfs;

use std::{
    ffi::{CStr, c_int, c_void},
    slice,
    sync::{
        Arc, Once,
        atomic::{AtomicU64, Ordering},
    },
};

use rusqlite::{Connection, ffi, functions::FunctionFlags};

pub use vfs::{Clock, Vfs, VfsState};

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
            let bytes = if start.is_null() { &[] } else { slice::from_raw_parts(start, length) };
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
