//! Between the Raft core's messages and their form on the wire.
//!
//! Only shapes are translated here. What comes from outside is checked for
//! form (a missing body, an unknown kind), never for Raft's rules: those are
//! the core's.

use raft::{
    Append, AppendResponse, Appended, Body, DropReason, Entry, EntryKind, ForwardOutcome, LogEnd, Message,
    Standing,
};
use resqlite::api::{self, peer_message::Body as Wire};

/// A peer's message that has no meaning in this version.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a message of node {from} cannot be understood: {what}")]
pub struct Malformed {
    /// Who sent it, by its own account.
    pub from: u64,
    /// What is missing or unknown.
    pub what: &'static str,
}

/// What every message from this node carries besides its content.
#[derive(Clone, Copy, Debug)]
pub struct Envelope {
    /// Which cluster this node belongs to.
    pub cluster_id: u64,
}

/// A core message as it goes on the wire.
pub fn to_wire(message: Message, envelope: Envelope) -> api::PeerMessage {
    api::PeerMessage {
        cluster_id: envelope.cluster_id,
        from: message.from,
        to: message.to,
        term: message.term,
        incarnation: message.incarnation,
        // Not the core's business: the sending task puts it in.
        shortage: String::new(),
        standing: standing_to_wire(message.standing).into(),
        body: Some(body_to_wire(message.body)),
    }
}

/// A message from the wire as the core takes it.
pub fn from_wire(message: api::PeerMessage) -> Result<Message, Malformed> {
    let from = message.from;
    let body = message.body.ok_or("it has no body this version knows");
    let body = body.and_then(body_from_wire).map_err(|what| Malformed { from, what })?;
    let standing = standing_from_wire(message.standing).map_err(|what| Malformed { from, what })?;
    let api::PeerMessage { to, term, incarnation, .. } = message;
    Ok(Message { from, to, term, incarnation, standing, body })
}

fn standing_to_wire(standing: Standing) -> api::MemberStanding {
    match standing {
        Standing::New => api::MemberStanding::New,
        Standing::Founder => api::MemberStanding::Founder,
        Standing::Learner => api::MemberStanding::Learner,
        Standing::Voter => api::MemberStanding::Voter,
    }
}

fn standing_from_wire(standing: i32) -> Result<Standing, &'static str> {
    match api::MemberStanding::try_from(standing) {
        Ok(api::MemberStanding::New) => Ok(Standing::New),
        Ok(api::MemberStanding::Founder) => Ok(Standing::Founder),
        Ok(api::MemberStanding::Learner) => Ok(Standing::Learner),
        Ok(api::MemberStanding::Voter) => Ok(Standing::Voter),
        Ok(api::MemberStanding::Unspecified) | Err(_) => Err("it does not say whether its sender counts"),
    }
}

/// An entry as it goes on the wire, to peers and to the state machine alike.
pub fn entry_to_wire(entry: Entry) -> api::LogEntry {
    let kind = match entry.kind {
        EntryKind::Noop => api::LogEntryKind::Noop,
        EntryKind::Payload => api::LogEntryKind::Payload,
    };
    api::LogEntry {
        index: entry.index,
        term: entry.term,
        kind: kind.into(),
        timestamp_ms: entry.timestamp_ms,
        payload: entry.payload,
    }
}

fn entry_from_wire(entry: api::LogEntry) -> Result<Entry, &'static str> {
    let kind = match api::LogEntryKind::try_from(entry.kind) {
        Ok(api::LogEntryKind::Noop) => EntryKind::Noop,
        Ok(api::LogEntryKind::Payload) => EntryKind::Payload,
        Err(_) => return Err("it holds an entry of a kind that this version does not know"),
    };
    Ok(Entry {
        index: entry.index,
        term: entry.term,
        kind,
        timestamp_ms: entry.timestamp_ms,
        payload: entry.payload,
    })
}

fn body_to_wire(body: Body) -> Wire {
    match body {
        Body::VoteRequest { pre_vote, last_index, last_term, leadership_transfer } => {
            Wire::VoteRequest(api::VoteRequest { pre_vote, last_index, last_term, leadership_transfer })
        }
        Body::VoteResponse { pre_vote, granted } => {
            Wire::VoteResponse(api::VoteResponse { pre_vote, granted })
        }
        Body::Append(append) => Wire::AppendRequest(api::AppendRequest {
            previous_index: append.previous_index,
            previous_term: append.previous_term,
            entries: append.entries.into_iter().map(entry_to_wire).collect(),
            commit_index: append.commit_index,
        }),
        Body::AppendResponse(response) => {
            Wire::AppendResponse(api::AppendResponse { outcome: Some(append_outcome_to_wire(response)) })
        }
        Body::Heartbeat { commit_index, read_round } => {
            Wire::Heartbeat(api::Heartbeat { commit_index, read_round })
        }
        Body::HeartbeatResponse { read_round } => {
            Wire::HeartbeatResponse(api::HeartbeatResponse { read_round })
        }
        Body::ReadIndex { read_id } => Wire::ReadIndexRequest(api::ReadIndexRequest { read_id }),
        Body::ReadIndexResponse { read_id, index } => {
            Wire::ReadIndexResponse(api::ReadIndexResponse { read_id, index })
        }
        Body::Forward { batch_id, payloads } => {
            Wire::ForwardRequest(api::ForwardRequest { batch_id, payloads })
        }
        Body::ForwardResponse { batch_id, outcome } => {
            let outcome = Some(forward_outcome_to_wire(outcome));
            Wire::ForwardResponse(api::ForwardResponse { batch_id, outcome })
        }
        Body::TimeoutNow => Wire::TimeoutNow(api::TimeoutNow {}),
        Body::StandingRequest { nonce } => Wire::StandingRequest(api::StandingRequest { nonce }),
        Body::StandingResponse { nonce, known_incarnation, log_end } => {
            let LogEnd { index: log_index, term: log_term } = log_end;
            let response = api::StandingResponse { nonce, known_incarnation, log_index, log_term };
            Wire::StandingResponse(response)
        }
        Body::Promote { incarnation } => Wire::Promote(api::Promote { incarnation }),
    }
}

fn body_from_wire(body: Wire) -> Result<Body, &'static str> {
    Ok(match body {
        Wire::VoteRequest(request) => Body::VoteRequest {
            pre_vote: request.pre_vote,
            last_index: request.last_index,
            last_term: request.last_term,
            leadership_transfer: request.leadership_transfer,
        },
        Wire::VoteResponse(response) => {
            Body::VoteResponse { pre_vote: response.pre_vote, granted: response.granted }
        }
        Wire::AppendRequest(request) => Body::Append(Append {
            previous_index: request.previous_index,
            previous_term: request.previous_term,
            entries: request.entries.into_iter().map(entry_from_wire).collect::<Result<_, _>>()?,
            commit_index: request.commit_index,
        }),
        Wire::AppendResponse(response) => Body::AppendResponse(append_outcome_from_wire(response)?),
        Wire::Heartbeat(heartbeat) => {
            Body::Heartbeat { commit_index: heartbeat.commit_index, read_round: heartbeat.read_round }
        }
        Wire::HeartbeatResponse(response) => Body::HeartbeatResponse { read_round: response.read_round },
        Wire::ReadIndexRequest(request) => Body::ReadIndex { read_id: request.read_id },
        Wire::ReadIndexResponse(response) => {
            Body::ReadIndexResponse { read_id: response.read_id, index: response.index }
        }
        Wire::ForwardRequest(request) => {
            Body::Forward { batch_id: request.batch_id, payloads: request.payloads }
        }
        Wire::ForwardResponse(response) => Body::ForwardResponse {
            batch_id: response.batch_id,
            outcome: forward_outcome_from_wire(response.outcome)?,
        },
        Wire::TimeoutNow(api::TimeoutNow {}) => Body::TimeoutNow,
        Wire::StandingRequest(request) => Body::StandingRequest { nonce: request.nonce },
        Wire::StandingResponse(response) => Body::StandingResponse {
            nonce: response.nonce,
            known_incarnation: response.known_incarnation,
            log_end: LogEnd { index: response.log_index, term: response.log_term },
        },
        Wire::Promote(promote) => Body::Promote { incarnation: promote.incarnation },
    })
}

fn append_outcome_to_wire(response: AppendResponse) -> api::append_response::Outcome {
    use api::append_response::Outcome;
    match response {
        AppendResponse::Matched(index) => Outcome::MatchedIndex(index),
        AppendResponse::Rejected { previous_index, hint_index, hint_term } => {
            Outcome::Rejected(api::AppendRejection { previous_index, hint_index, hint_term })
        }
    }
}

fn append_outcome_from_wire(response: api::AppendResponse) -> Result<AppendResponse, &'static str> {
    use api::append_response::Outcome;
    match response.outcome {
        Some(Outcome::MatchedIndex(index)) => Ok(AppendResponse::Matched(index)),
        Some(Outcome::Rejected(rejection)) => Ok(AppendResponse::Rejected {
            previous_index: rejection.previous_index,
            hint_index: rejection.hint_index,
            hint_term: rejection.hint_term,
        }),
        None => Err("its answer to an append has no outcome"),
    }
}

fn forward_outcome_to_wire(outcome: ForwardOutcome) -> api::forward_response::Outcome {
    use api::forward_response::Outcome;
    match outcome {
        Ok(Appended { first_index, term }) => Outcome::Appended(api::Appended { first_index, term }),
        Err(reason) => {
            let reason = match reason {
                DropReason::NoLeader => api::DropReason::NoLeader,
                DropReason::Overloaded => api::DropReason::Overloaded,
                DropReason::Transferring => api::DropReason::Transferring,
                DropReason::OutOfRoom => api::DropReason::OutOfRoom,
            };
            Outcome::Dropped(reason.into())
        }
    }
}

fn forward_outcome_from_wire(
    outcome: Option<api::forward_response::Outcome>,
) -> Result<ForwardOutcome, &'static str> {
    use api::forward_response::Outcome;
    const NO_REASON: &str = "it drops a proposal for a reason that this version does not know";
    match outcome.ok_or("its answer to a forwarded batch has no outcome")? {
        Outcome::Appended(appended) => {
            Ok(Ok(Appended { first_index: appended.first_index, term: appended.term }))
        }
        Outcome::Dropped(reason) => match api::DropReason::try_from(reason).map_err(|_| NO_REASON)? {
            api::DropReason::NoLeader => Ok(Err(DropReason::NoLeader)),
            api::DropReason::Overloaded => Ok(Err(DropReason::Overloaded)),
            api::DropReason::Transferring => Ok(Err(DropReason::Transferring)),
            api::DropReason::OutOfRoom => Ok(Err(DropReason::OutOfRoom)),
            api::DropReason::Unspecified => Err(NO_REASON),
        },
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn every_body() -> Vec<Body> {
        let entry = Entry {
            index: 5,
            term: 2,
            kind: EntryKind::Payload,
            timestamp_ms: 77,
            payload: Bytes::from_static(b"payload"),
        };
        let noop = Entry { index: 4, kind: EntryKind::Noop, payload: Bytes::new(), ..entry.clone() };
        let rejected = AppendResponse::Rejected { previous_index: 9, hint_index: 8, hint_term: 1 };
        vec![
            Body::VoteRequest { pre_vote: true, last_index: 1, last_term: 2, leadership_transfer: true },
            Body::VoteResponse { pre_vote: false, granted: true },
            Body::Append(Append {
                previous_index: 3,
                previous_term: 2,
                entries: vec![noop, entry],
                commit_index: 3,
            }),
            Body::AppendResponse(AppendResponse::Matched(12)),
            Body::AppendResponse(rejected),
            Body::Heartbeat { commit_index: 3, read_round: 4 },
            Body::HeartbeatResponse { read_round: 4 },
            Body::ReadIndex { read_id: 6 },
            Body::ReadIndexResponse { read_id: 6, index: Some(0) },
            Body::ReadIndexResponse { read_id: 6, index: None },
            Body::Forward { batch_id: 1, payloads: vec![Bytes::from_static(b"a"), Bytes::new()] },
            Body::ForwardResponse { batch_id: 1, outcome: Ok(Appended { first_index: 8, term: 3 }) },
            Body::ForwardResponse { batch_id: 1, outcome: Err(DropReason::NoLeader) },
            Body::ForwardResponse { batch_id: 1, outcome: Err(DropReason::Overloaded) },
            Body::ForwardResponse { batch_id: 1, outcome: Err(DropReason::Transferring) },
            Body::ForwardResponse { batch_id: 1, outcome: Err(DropReason::OutOfRoom) },
            Body::TimeoutNow,
            Body::StandingRequest { nonce: 3 },
            Body::StandingResponse { nonce: 3, known_incarnation: 4, log_end: LogEnd { term: 5, index: 6 } },
            Body::Promote { incarnation: 7 },
        ]
    }

    #[test]
    fn every_message_survives_the_wire() {
        let envelope = Envelope { cluster_id: 99 };
        let standings = [Standing::New, Standing::Founder, Standing::Learner, Standing::Voter];
        for (body, standing) in every_body().into_iter().zip(standings.into_iter().cycle()) {
            let message = Message { from: 1, to: 2, term: 3, incarnation: 4, standing, body };
            let wire = to_wire(message.clone(), envelope);
            assert_eq!((wire.cluster_id, wire.incarnation), (99, 4));
            assert_eq!(from_wire(wire), Ok(message));
        }
    }

    #[test]
    fn a_message_without_meaning_is_refused_with_its_sender() {
        let empty = api::PeerMessage { from: 4, ..Default::default() };
        assert_eq!(from_wire(empty).unwrap_err().from, 4);

        let entries = vec![api::LogEntry { kind: 17, ..Default::default() }];
        let unknown = Wire::AppendRequest(api::AppendRequest { entries, ..Default::default() });
        let message = api::PeerMessage { from: 4, body: Some(unknown), ..Default::default() };
        assert!(from_wire(message).is_err());

        for body in [
            Wire::AppendResponse(api::AppendResponse { outcome: None }),
            Wire::ForwardResponse(api::ForwardResponse { batch_id: 1, outcome: None }),
        ] {
            let message = api::PeerMessage { from: 4, body: Some(body), ..Default::default() };
            assert!(from_wire(message).is_err());
        }
    }
}
