//! SIGHUP: reads the configuration again and says what a restart would change.
//! It knows nothing of who uses the settings.

use std::{convert::Infallible, path::PathBuf};

use resqlite::{config::Config, daemon::Reloads};

/// Answers every request to reload, for ever.
pub async fn answer_requests(path: PathBuf, running: Config, mut requests: Reloads) -> Infallible {
    while requests.changed().await.is_ok() {
        match Config::load(&path) {
            Err(error) => tracing::error!(%error, "not reloaded: the configuration cannot be used"),
            Ok(new) => match differences(&running, &new).as_slice() {
                [] => tracing::info!("reloaded: the configuration is unchanged"),
                keys => {
                    tracing::warn!(keys = keys.join(", "), "not reloaded: these take effect with a restart")
                }
            },
        }
    }
    // No more signals will come; there is nothing left to do but to be quiet.
    std::future::pending().await
}

fn differences(running: &Config, new: &Config) -> Vec<&'static str> {
    let (old, fresh) = (&running.sqlited, &new.sqlited);
    let changed = [
        ("node_id", running.node_id != new.node_id),
        ("min_free_bytes", running.min_free_bytes != new.min_free_bytes),
        ("cluster.name", running.cluster.name != new.cluster.name),
        ("cluster.members", running.cluster.members != new.cluster.members),
        (
            "cluster.election_timeout_ms",
            running.cluster.election_timeout_ms != new.cluster.election_timeout_ms,
        ),
        ("sqlited.tls", old.tls != fresh.tls),
        ("raftd.socket", running.raftd.socket != new.raftd.socket),
        ("sqlited.listen", old.listen != fresh.listen),
        ("sqlited.data_dir", old.data_dir != fresh.data_dir),
        ("sqlited.limits", old.limits != fresh.limits),
        ("sqlited.readers", old.readers != fresh.readers),
        ("sqlited.max_request_bytes", old.max_request_bytes != fresh.max_request_bytes),
        ("sqlited.max_result_bytes", old.max_result_bytes != fresh.max_result_bytes),
        ("sqlited.step_budget", old.step_budget != fresh.step_budget),
        (
            "sqlited.snapshot_bytes_per_second",
            old.snapshot_bytes_per_second != fresh.snapshot_bytes_per_second,
        ),
        ("sqlited.verify_interval_seconds", old.verify_interval_seconds != fresh.verify_interval_seconds),
    ];
    changed.into_iter().filter_map(|(key, changed)| changed.then_some(key)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_named() {
        let running = Config::parse("node_id: 1", "f").unwrap();
        assert!(differences(&running, &running).is_empty());
        let new = Config::parse("node_id: 1\nsqlited: {readers: 9, step_budget: 20000}", "f").unwrap();
        assert_eq!(differences(&running, &new), ["sqlited.readers", "sqlited.step_budget"]);
    }
}
