//! What this node says of itself: the `Status` call and the health service.
//! It only looks; it changes nothing.

use std::{
    collections::VecDeque,
    convert::Infallible,
    path::{Path, PathBuf},
    time::Duration,
};

use resqlite::{
    api::{
        LogStatusRequest, LogStatusResponse, Member, NodeStatus, RaftRole, StatusResponse,
        re_sqlite_server::ReSqliteServer,
    },
    config::Config,
    daemon,
    tls::{Reloading, SqlTls},
};
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    facts::Facts,
    limits::BEHIND_AFTER,
    raft_link::{LinkState, RaftLink},
    service::Service,
};

/// A raftd that takes longer to say how it is, is said to be out of reach.
const RAFTD_PATIENCE: Duration = Duration::from_secs(1);

/// Answers `Status`.
#[derive(Debug)]
pub struct StatusSource {
    node_id: u64,
    cluster_name: String,
    members: Vec<Member>,
    tls: Option<Reloading<SqlTls>>,
    database: PathBuf,
    link: RaftLink,
    facts: Facts,
}

impl StatusSource {
    /// Of the node that the configuration describes.
    pub fn new(
        config: &Config,
        tls: Option<Reloading<SqlTls>>,
        database: PathBuf,
        link: RaftLink,
        facts: Facts,
    ) -> Self {
        Self {
            node_id: config.node_id,
            cluster_name: config.cluster.name.clone(),
            members: members_of(config),
            tls,
            database,
            link,
            facts,
        }
    }

    /// Works at any time: what raftd does not say is unknown.
    pub async fn status(&self) -> StatusResponse {
        let raftd = self.ask_raftd().await;
        let raftd_known = raftd.is_some();
        let raftd = raftd.unwrap_or_default();
        let applied_index = self.facts.applied_index();
        let link = self.link.state();
        let room = self.facts.room().borrow().clone();
        let commit_index = raftd.commit_index.max(link.borrow().commit_index);
        let unhealthy = self.facts.health().unwrap_or_else(|| not_counting(&raftd));
        let node = NodeStatus {
            id: self.node_id,
            cluster_name: self.cluster_name.clone(),
            role: if raftd_known { role_name(raftd.role()) } else { "unknown" }.to_owned(),
            term: raftd.term,
            leader_id: raftd.leader_id,
            commit_index,
            applied_index,
            lag_entries: commit_index.saturating_sub(applied_index),
            database_bytes: self.database_bytes(),
            log_bytes: raftd.log_bytes,
            sqlited_version: env!("CARGO_PKG_VERSION").to_owned(),
            raftd_version: raftd.version,
            sqlite_version: rusqlite::version().to_owned(),
            unhealthy,
            alarm: self.facts.alarm().unwrap_or_default(),
            database_free_bytes: room.free_bytes,
            log_free_bytes: raftd.free_bytes,
            warnings: raftd
                .warnings
                .into_iter()
                .chain(self.tls.as_ref().and_then(Reloading::expiry_warning))
                .collect(),
            writes_refused: room.shortage.unwrap_or_else(|| link.borrow().writes_refused.clone()),
        };
        StatusResponse { node: Some(node), members: self.members.clone() }
    }

    async fn ask_raftd(&self) -> Option<LogStatusResponse> {
        let mut client = self.link.client()?;
        let answer = timeout(RAFTD_PATIENCE, client.log_status(LogStatusRequest {})).await;
        answer.ok()?.ok().map(tonic::Response::into_inner)
    }

    fn database_bytes(&self) -> u64 {
        let (database, wal) = file_bytes(&self.database);
        database + wal
    }
}

/// The sizes of a database and of its write-ahead log. The file system is asked; the files are not opened,
/// which would drop SQLite's locks on them (<https://sqlite.org/howtocorrupt.html>, section 2.2).
pub fn file_bytes(database: &Path) -> (u64, u64) {
    let mut wal = database.as_os_str().to_owned();
    wal.push("-wal");
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    (size(database), size(Path::new(&wal)))
}

/// The members that the configuration lists, as clients are told of them.
pub fn members_of(config: &Config) -> Vec<Member> {
    let members = config.cluster.members.iter().map(|member| Member {
        id: member.id,
        raft_address: member.raft.to_string(),
        sql_address: member.sql.to_string(),
    });
    members.collect()
}

fn role_name(role: RaftRole) -> &'static str {
    match role {
        RaftRole::Unspecified => "unknown",
        RaftRole::Follower => "follower",
        RaftRole::Candidate => "candidate",
        RaftRole::Leader => "leader",
        RaftRole::Learner => "learner",
        RaftRole::New => "new",
    }
}

/// Why the node does not count yet, and for whom it waits; empty if it does, or will by itself.
fn not_counting(raftd: &LogStatusResponse) -> String {
    let ids: Vec<String> = raftd.waits_for.iter().map(u64::to_string).collect();
    match raftd.role() {
        RaftRole::New if ids.is_empty() => "the first start is under way".to_owned(),
        RaftRole::New => format!("the first start waits for node {}", ids.join(", ")),
        RaftRole::Learner if ids.is_empty() => String::new(),
        RaftRole::Learner => format!("does not count before it has heard node {}", ids.join(", ")),
        RaftRole::Unspecified | RaftRole::Follower | RaftRole::Candidate | RaftRole::Leader => String::new(),
    }
}

/// Keeps `grpc.health.v1` and systemd's status line true. Runs until dropped.
pub async fn keep_health(
    reporter: HealthReporter,
    link: RaftLink,
    node_id: u64,
    facts: Facts,
    serving: watch::Sender<bool>,
) -> Infallible {
    let mut state = link.state();
    let mut health = facts.watch_health();
    let mut seconds = interval(Duration::from_secs(1));
    seconds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut lag = Lag::default();
    let (mut told, mut shown) = (None, String::new());
    loop {
        let now = state.borrow_and_update().clone();
        let health_now = health.borrow_and_update().clone();
        let unhealthy = health_now.unhealthy().cloned();
        lag.observe(Instant::now(), now.commit_index, facts.applied_index());
        facts.publish_behind(lag.is_behind());
        let verdict = verdict(&now, unhealthy, lag.is_behind());
        serving.send_replace(verdict.is_ok());
        let line = status_line(&now, node_id, facts.applied_index(), &verdict, health_now.alarm.as_deref());
        if line != shown {
            daemon::notify_status(&line);
            shown = line;
        }
        let news = (verdict, health_now.alarm);
        if told.as_ref() != Some(&news) {
            tell(&reporter, &news.0).await;
            told = Some(news);
        }
        tokio::select! {
            _ = seconds.tick() => {}
            Ok(()) = state.changed() => {}
            Ok(()) = health.changed() => {}
        }
    }
}

/// Ok: serving, under this leader. Err: why not.
fn verdict(state: &LinkState, unhealthy: Option<String>, behind: bool) -> Result<u64, String> {
    if let Some(why) = unhealthy {
        return Err(why);
    }
    if !state.connected {
        return Err("waiting for raftd".to_owned());
    }
    if state.leader_id == 0 {
        return Err("no leader".to_owned());
    }
    if behind {
        return Err("behind: applying what was committed".to_owned());
    }
    Ok(state.leader_id)
}

/// Tells systemd that the service is ready: once it serves, but no later than this. A node without a quorum
/// answers `Status` and stale reads, and the start of the first of three hosts must not wait for the others.
pub async fn announce(mut serving: watch::Receiver<bool>, within: Duration) -> Infallible {
    let _ = timeout(within, serving.wait_for(|serving| *serving)).await;
    daemon::notify_ready();
    std::future::pending().await
}

/// What `systemctl status` shows.
fn status_line(
    state: &LinkState,
    node_id: u64,
    applied_index: u64,
    verdict: &Result<u64, String>,
    alarm: Option<&str>,
) -> String {
    let LinkState { term, leader_id, commit_index, .. } = *state;
    let serving = verdict.as_ref().map_or_else(|why| format!("not serving: {why}"), |_| "serving".to_owned());
    let role = match leader_id {
        0 => "no leader".to_owned(),
        leader if leader == node_id => format!("leader of term {term}"),
        leader => format!("follower in term {term}, leader {leader}"),
    };
    let lag = commit_index.saturating_sub(applied_index);
    let alarm = alarm.map(|alarm| format!("; ALARM: {alarm}")).unwrap_or_default();
    format!("{serving}; {role}, lag {lag} entries{alarm}")
}

async fn tell(reporter: &HealthReporter, verdict: &Result<u64, String>) {
    let status = match verdict {
        Ok(leader) => {
            tracing::info!(leader, "serving");
            ServingStatus::Serving
        }
        Err(why) => {
            tracing::warn!(why, "not serving");
            ServingStatus::NotServing
        }
    };
    // The empty name stands for the server as a whole.
    reporter.set_service_status("", status).await;
    reporter.set_service_status(<ReSqliteServer<Service> as tonic::server::NamedService>::NAME, status).await;
}

/// Whether the node still lacks what was committed some time ago. A mere
/// difference of indexes says little: under load there always is one.
#[derive(Debug, Default)]
struct Lag {
    /// When an index was seen committed that was not applied then; oldest first, a second apart.
    owed: VecDeque<(Instant, u64)>,
    behind: bool,
}

impl Lag {
    fn observe(&mut self, now: Instant, commit_index: u64, applied_index: u64) {
        while self.owed.front().is_some_and(|(_, index)| *index <= applied_index) {
            self.owed.pop_front();
        }
        let due = self.owed.back().is_none_or(|(moment, _)| now - *moment >= Duration::from_secs(1));
        if commit_index > applied_index && due {
            self.owed.push_back((now, commit_index));
        }
        // At most one a second is added, and what is older than the bound need not grow further.
        if self.owed.len() > 2 * BEHIND_AFTER.as_secs() as usize {
            self.owed.remove(1);
        }
        self.behind = self.owed.front().is_some_and(|(moment, _)| now - *moment > BEHIND_AFTER);
    }

    fn is_behind(&self) -> bool {
        self.behind
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_behind_when_it_lacks_what_was_committed_long_ago() {
        let (mut lag, start) = (Lag::default(), Instant::now());
        let at = |second| start + Duration::from_secs(second);
        for second in 0..100 {
            // Always a thousand entries away, but on the move.
            lag.observe(at(second), 1_000 * (second + 1), 1_000 * second);
            assert!(!lag.is_behind());
        }
        for second in 100..200 {
            lag.observe(at(second), 200_000, 100_000);
            assert_eq!(lag.is_behind(), second > 110, "{second}");
        }
        lag.observe(at(200), 200_000, 200_000);
        assert!(!lag.is_behind());
        assert!(lag.owed.is_empty());
    }

    #[test]
    fn the_status_line_names_role_term_leader_and_lag() {
        let state =
            LinkState { connected: true, leader_id: 2, term: 7, commit_index: 12, ..LinkState::default() };
        assert_eq!(
            status_line(&state, 1, 10, &Ok(2), None),
            "serving; follower in term 7, leader 2, lag 2 entries"
        );
        assert_eq!(
            status_line(&state, 2, 12, &Ok(2), Some("look")),
            "serving; leader of term 7, lag 0 entries; ALARM: look"
        );
        let alone = LinkState { leader_id: 0, ..state };
        let line = status_line(&alone, 1, 12, &Err("no leader".into()), None);
        assert_eq!(line, "not serving: no leader; no leader, lag 0 entries");
    }

    #[test]
    fn health_names_the_first_thing_that_is_wrong() {
        let up = LinkState { connected: true, leader_id: 2, ..LinkState::default() };
        assert_eq!(verdict(&up, None, false), Ok(2));
        assert_eq!(verdict(&LinkState { leader_id: 0, ..up.clone() }, None, false), Err("no leader".into()));
        assert_eq!(verdict(&LinkState::default(), None, false), Err("waiting for raftd".into()));
        assert!(verdict(&up, None, true).unwrap_err().starts_with("behind"));
        assert_eq!(verdict(&up, Some("disk full".into()), false), Err("disk full".into()));
    }
}
