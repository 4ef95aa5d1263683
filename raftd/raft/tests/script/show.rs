//! How the scripts show what nodes do: one line each, an entry as `index@term`.

use std::fmt::{Result, Write};

use raft::{
    Append, AppendResponse, Appended, Body, Entry, EntryKind, HardState, LogEnd, Message, NodeId, Position,
    ProposalResult, Ready, Standing, Status,
};

pub fn show_position(position: Position) -> String {
    format!("{}@{}", position.index, position.term)
}

fn show_entry(entry: &Entry) -> String {
    let name = show_position(entry.position());
    let time = if entry.timestamp_ms == 0 { String::new() } else { format!(":{}", entry.timestamp_ms) };
    match entry.kind {
        EntryKind::Noop => format!("{name}{time}(noop)"),
        EntryKind::Payload => format!("{name}{time}({})", String::from_utf8_lossy(&entry.payload)),
    }
}

fn show_entries(entries: &[Entry]) -> String {
    let shown: Vec<String> = entries.iter().map(show_entry).collect();
    format!("[{}]", shown.join(" "))
}

pub fn show_message(message: &Message) -> String {
    let body = match &message.body {
        Body::VoteRequest { pre_vote, last_index, last_term, leadership_transfer } => {
            let kind = if *pre_vote { "pre-vote?" } else { "vote?" };
            let transfer = if *leadership_transfer { " transfer" } else { "" };
            format!("{kind} last={last_index}@{last_term}{transfer}")
        }
        Body::VoteResponse { pre_vote, granted } => {
            let kind = if *pre_vote { "pre-vote" } else { "vote" };
            format!("{kind} {}", if *granted { "granted" } else { "refused" })
        }
        Body::Append(Append { previous_index, previous_term, entries, commit_index }) => {
            format!(
                "append prev={previous_index}@{previous_term} {} commit={commit_index}",
                show_entries(entries)
            )
        }
        Body::AppendResponse(AppendResponse::Matched(index)) => format!("matched {index}"),
        Body::AppendResponse(AppendResponse::Rejected { previous_index, hint_index, hint_term }) => {
            format!("rejected {previous_index} hint={hint_index}@{hint_term}")
        }
        Body::Heartbeat { commit_index, read_round } => {
            format!("heartbeat commit={commit_index} round={read_round}")
        }
        Body::HeartbeatResponse { read_round } => format!("heard round={read_round}"),
        // Ids are random, so that no life of a node repeats those of another.
        Body::ReadIndex { .. } => "read index?".into(),
        Body::ReadIndexResponse { index: Some(index), .. } => format!("read index {index}"),
        Body::ReadIndexResponse { index: None, .. } => "read index unknown".into(),
        Body::Forward { payloads, .. } => {
            let shown: Vec<_> = payloads.iter().map(|payload| String::from_utf8_lossy(payload)).collect();
            format!("forward [{}]", shown.join(" "))
        }
        Body::ForwardResponse { outcome: Ok(appended), .. } => show_appended(*appended),
        Body::ForwardResponse { outcome: Err(reason), .. } => format!("dropped, {reason:?}"),
        Body::TimeoutNow => "campaign now".into(),
        Body::StandingRequest { .. } => "who counts?".into(),
        Body::StandingResponse { known_incarnation, log_end, .. } => {
            let floor = format!("{}@{}", log_end.index, log_end.term);
            format!("this is how I count; log {floor}; known incarnation {known_incarnation}")
        }
        Body::Promote { incarnation } => format!("incarnation {incarnation} counts"),
    };
    match message.standing {
        Standing::Voter => format!("{body} (term {})", message.term),
        standing => format!("{body} (term {}, {standing:?})", message.term),
    }
}

/// Shows what a node wants done.
pub fn show_ready(output: &mut String, id: NodeId, ready: &Ready) -> Result {
    if let Some(soft) = ready.soft_state {
        let leader = soft.leader.map_or("nobody".into(), |leader| format!("n{leader}"));
        writeln!(output, "n{id} is {:?} in term {}, led by {leader}", soft.role, soft.term)?;
    }
    if ready.has_writes() {
        write!(output, "n{id} writes #{}:", ready.number)?;
        if let Some(hard_state) = ready.hard_state {
            let vote = hard_state.voted_for.map_or("none".into(), |vote| format!("n{vote}"));
            write!(output, " term={} vote={vote}", hard_state.term)?;
            let HardState { standing, incarnation, log_floor, .. } = hard_state;
            if (standing, incarnation) != (Standing::Voter, 1) {
                write!(output, " {standing:?} of incarnation {incarnation}")?;
            }
            if log_floor != LogEnd::default() {
                write!(output, " floor={}@{}", log_floor.index, log_floor.term)?;
            }
        }
        if let Some(install) = ready.install {
            let kept = if install.keep_suffix { "keeping what follows" } else { "dropping the log" };
            write!(output, " base={} {kept}", show_position(install.base))?;
        }
        if !ready.entries.is_empty() {
            write!(output, " {}", show_entries(&ready.entries))?;
        }
        writeln!(output)?;
    }
    for message in &ready.messages {
        writeln!(output, "n{id}→n{} {}", message.to, show_message(message))?;
    }
    for message in &ready.messages_after_persist {
        writeln!(
            output,
            "n{id}→n{} {} once #{} is durable",
            message.to,
            show_message(message),
            ready.number
        )?;
    }
    for outcome in &ready.proposals {
        let result = match outcome.result {
            ProposalResult::Appended(appended) => show_appended(appended),
            ProposalResult::Dropped(reason) => format!("dropped, {reason:?}"),
            ProposalResult::Unknown => "unknown".into(),
        };
        writeln!(output, "n{id} batch {}: {result}", outcome.batch_id)?;
    }
    for outcome in &ready.reads {
        let index = outcome.index.map_or("ask again".into(), |index| format!("at {index}"));
        writeln!(output, "n{id} read {}: {index}", outcome.read_id)?;
    }
    for peer in &ready.snapshots {
        writeln!(output, "n{id} has to bring n{peer} a snapshot")?;
    }
    Ok(())
}

fn show_appended(appended: Appended) -> String {
    format!("appended at {}@{}", appended.first_index, appended.term)
}

pub fn show_status(output: &mut String, status: &Status) -> Result {
    let leader = status.leader.map_or("nobody".into(), |leader| format!("n{leader}"));
    write!(
        output,
        "n{} {:?} term={} leader={leader} commit={} deliverable={} durable={} last={}",
        status.id,
        status.role,
        status.term,
        status.commit_index,
        status.deliverable_index,
        status.durable_index,
        status.last_index
    )?;
    if status.standing != Standing::Voter {
        write!(output, " {:?} of incarnation {}", status.standing, status.incarnation)?;
        if !status.waits_for.is_empty() {
            write!(output, ", waits for {:?}", status.waits_for)?;
        }
    }
    match status.transferring_to {
        Some(peer) => writeln!(output, " transferring to n{peer}"),
        None => writeln!(output),
    }
}
