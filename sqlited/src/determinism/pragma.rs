//! Every PRAGMA of this SQLite and what becomes of it: the table that the manual's list is made from.
//!
//! A PRAGMA may be a read, a write that is replicated, or refused; and the same name may be one thing
//! without a value and another with one. It knows only names and values.

/// What becomes of a PRAGMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// A read whose answer depends on the content only: allowed in reads and in writes.
    Read,
    /// A read whose answer may differ from node to node: allowed in reads only.
    NodeLocalRead,
    /// Replicated: kept in the database.
    Replicated,
    /// Replicated: holds until the end of its request.
    Request,
    /// `PRAGMA foreign_keys`, which travels with the requests of its session.
    ForeignKeys,
    /// Refused, with the reason.
    Refused(&'static str),
}

/// One PRAGMA.
#[derive(Clone, Copy, Debug)]
pub struct Pragma {
    /// Its name, in lower case.
    pub name: &'static str,
    /// `PRAGMA name`.
    pub plain: Rule,
    /// `PRAGMA name = value` and `PRAGMA name(value)`.
    pub with_value: Rule,
}

const fn pragma(name: &'static str, plain: Rule, with_value: Rule) -> Pragma {
    Pragma { name, plain, with_value }
}

const FIXED_AT_CREATION: Rule = Rule::Refused("it is fixed when the database is created");
const SET_BY_SERVER: Rule = Rule::Refused("the server sets it, alike on every node");
const CHANGES_MEANING: Rule =
    Rule::Refused("it would change what later statements mean, of everybody on this connection");
const CONNECTION_ONLY: Rule = Rule::Refused("connections are shared: a setting of one has no meaning here");
const CORRUPTS: Rule = Rule::Refused("it can corrupt the database");
const DEPENDS_ON_SESSION: Rule = Rule::Refused("what it does depends on the connection's history");
const DEPRECATED: Rule = Rule::Refused("it is deprecated");
const WAL_ONLY: Rule = Rule::Refused("the server runs the write-ahead log and its checkpoints");

/// All of them, in the order of their names.
pub const PRAGMAS: &[Pragma] = &[
    pragma("analysis_limit", Rule::NodeLocalRead, CHANGES_MEANING),
    pragma("application_id", Rule::Read, Rule::Replicated),
    pragma("auto_vacuum", Rule::Read, FIXED_AT_CREATION),
    pragma("automatic_index", Rule::NodeLocalRead, CHANGES_MEANING),
    pragma("busy_timeout", Rule::NodeLocalRead, CONNECTION_ONLY),
    pragma("cache_size", Rule::NodeLocalRead, CONNECTION_ONLY),
    pragma("cache_spill", Rule::NodeLocalRead, CONNECTION_ONLY),
    pragma("case_sensitive_like", CHANGES_MEANING, CHANGES_MEANING),
    pragma("cell_size_check", Rule::NodeLocalRead, SET_BY_SERVER),
    pragma("checkpoint_fullfsync", Rule::NodeLocalRead, SET_BY_SERVER),
    pragma("collation_list", Rule::NodeLocalRead, Rule::NodeLocalRead),
    pragma("compile_options", Rule::NodeLocalRead, Rule::NodeLocalRead),
    pragma("count_changes", DEPRECATED, DEPRECATED),
    pragma("data_version", Rule::NodeLocalRead, Rule::NodeLocalRead),
    pragma("database_list", Rule::NodeLocalRead, Rule::NodeLocalRead),
    pragma("default_cache_size", DEPRECATED, DEPRECATED),
    pragma("defer_foreign_keys", Rule::NodeLocalRead, Rule::Request),
    pragma("empty_result_callbacks", DEPRECATED, DEPRECATED),
    pragma("encoding", Rule::Read, FIXED_AT_CREATION),
    pragma("foreign_key_check", Rule::Read, Rule::Read),
    pragma("foreign_key_list", Rule::Read, Rule::Read),
    pragma("foreign_keys", Rule::ForeignKeys, Rule::ForeignKeys),
    pragma("freelist_count", Rule::NodeLocalRead, Rule::NodeLocalRead),
    pragma("full_column_names", DEPRECATED, DEPRECATED),
    pragma("fullfsync", Rule::NodeLocalRead, SET_BY_SERVER),
    pragma("function_list", Rule::NodeLocalRead, Rule::NodeLocalRead),
    pragma("hard_heap_limit", Rule::NodeLocalRead, SET_BY_SERVER),
    pragma("ignore_check_constraints", Rule::NodeLocalRead, CHANGES_MEANING),
    pragma("incremental_vacuum", SET_BY_SERVER, SET_BY_SERVER),
    pragma("index_info", Rule::Read, Rule::Read),
    pragma("index_list", Rule::Read, Rule::Read),
    pragma("index_xinfo", Rule::Read, Rule::Read),
    pragma("integrity_check", Rule::NodeLocalRead, Rule::NodeLocalRead),
    pragma("journal_mode", Rule::NodeLocalRead, WAL_ONLY),
    pragma("journal_size_limit", Rule::NodeLocalRead, WAL_ONLY),
    pragma("legacy_alter_table", Rule::NodeLocalRead, CHANGES_MEANING),
    pragma("legacy_file_format", DEPRECATED, DEPRECATED),
    pragma("locking_mode", Rule::NodeLocalRead, SET_BY_SERVER),
    pragma("max_page_count", Rule::NodeLocalRead, SET_BY_SERVER),
    pragma("mmap_size", Rule::NodeLocalRead, SET_BY_SERVER),
    pragma("module_list", Rule::NodeLocalRead, Rule::NodeLocalRead),
    pragma("optimize", DEPENDS_ON_SESSION, DEPENDS_ON_SESSION),
    pragma("page_count", Rule::NodeLocalRead, Rule::NodeLocalRead),
    // FTS4 asks for it when it is used for the first time, which is not at the same moment on every node.
    pragma("page_size", Rule::Read, FIXED_AT_CREATION),
    pragma("pragma_list", Rule::NodeLocalRead, Rule::NodeLocalRead),
    pragma("query_only", Rule::NodeLocalRead, SET_BY_SERVER),
    pragma("quick_check", Rule::NodeLocalRead, Rule::NodeLocalRead),
    pragma("read_uncommitted", Rule::NodeLocalRead, CONNECTION_ONLY),
    pragma("recursive_triggers", Rule::NodeLocalRead, CHANGES_MEANING),
    pragma("reverse_unordered_selects", Rule::NodeLocalRead, CHANGES_MEANING),
    // VACUUM raises it, and a node that crashed in between runs VACUUM twice.
    pragma("schema_version", Rule::NodeLocalRead, CORRUPTS),
    pragma("secure_delete", Rule::NodeLocalRead, SET_BY_SERVER),
    pragma("short_column_names", DEPRECATED, DEPRECATED),
    pragma("shrink_memory", CONNECTION_ONLY, CONNECTION_ONLY),
    pragma("soft_heap_limit", Rule::NodeLocalRead, SET_BY_SERVER),
    pragma("synchronous", Rule::NodeLocalRead, SET_BY_SERVER),
    pragma("table_info", Rule::Read, Rule::Read),
    // In the order of a hash table, which depends on how the schema came to be in memory.
    pragma("table_list", Rule::NodeLocalRead, Rule::NodeLocalRead),
    pragma("table_xinfo", Rule::Read, Rule::Read),
    pragma("temp_store", Rule::NodeLocalRead, CONNECTION_ONLY),
    pragma("temp_store_directory", DEPRECATED, DEPRECATED),
    pragma("threads", Rule::NodeLocalRead, SET_BY_SERVER),
    pragma("trusted_schema", Rule::NodeLocalRead, SET_BY_SERVER),
    pragma("user_version", Rule::Read, Rule::Replicated),
    pragma("wal_autocheckpoint", Rule::NodeLocalRead, WAL_ONLY),
    pragma("wal_checkpoint", WAL_ONLY, WAL_ONLY),
    pragma("writable_schema", Rule::NodeLocalRead, CORRUPTS),
];

/// What becomes of this PRAGMA. One that SQLite does not know either is refused, where SQLite would
/// ignore it: a misspelt setting should not pass for one that holds.
pub fn rule(name: &str, value: Option<&str>) -> Rule {
    let lower = name.to_ascii_lowercase();
    match PRAGMAS.binary_search_by(|pragma| pragma.name.cmp(&lower)) {
        Ok(found) if value.is_some() => PRAGMAS[found].with_value,
        Ok(found) => PRAGMAS[found].plain,
        Err(_) => Rule::Refused("there is no such PRAGMA"),
    }
}

/// SQLite's reading of a switch: its `sqlite3GetBoolean`, which keeps a number's lowest byte only.
pub fn is_on(value: &str) -> bool {
    let digits = value.len() - value.trim_start_matches(|digit: char| digit.is_ascii_digit()).len();
    if digits > 0 {
        return value[..digits].parse::<i32>().is_ok_and(|number| number & 0xff != 0);
    }
    ["on", "yes", "true"].iter().any(|word| value.eq_ignore_ascii_case(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_order() {
        assert!(PRAGMAS.is_sorted_by(|left, right| left.name < right.name));
    }

    #[test]
    fn every_pragma_of_this_sqlite_is_in_the_table() {
        let connection = rusqlite::Connection::open_in_memory().unwrap();
        let mut statement = connection.prepare("SELECT name FROM pragma_pragma_list").unwrap();
        let names = statement.query_map([], |row| row.get::<_, String>(0)).unwrap();
        for name in names {
            let name = name.unwrap();
            assert_ne!(rule(&name, None), Rule::Refused("there is no such PRAGMA"), "{name}");
        }
    }

    #[test]
    fn a_switch_reads_as_sqlite_reads_it() {
        for on in ["1", "ON", "yes", "true", "2", "01"] {
            assert!(is_on(on), "{on}");
        }
        for off in ["0", "off", "no", "false", "maybe", "", "000", "256", "-1", "full"] {
            assert!(!is_on(off), "{off}");
        }
    }
}
