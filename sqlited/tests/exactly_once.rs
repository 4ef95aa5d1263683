//! A request that is repeated is applied once, and its reply is always the first one.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod machine;

use machine::{Machine, entry_at};
use resqlite::api::{LoggedRequest, ReplyClass, RequestId, StoredReply};
use sqlited::sessions::{MAX_REPLIES, MAX_SESSION_BYTES, MAX_TOTAL_BYTES, WINDOW_ENTRIES, WINDOW_MS};

/// An insert by a client that names its requests.
fn insert(machine: &Machine, client: u8, sequence: u64) -> LoggedRequest {
    let id = RequestId { client_id: vec![client; 16].into(), sequence, ..RequestId::default() };
    LoggedRequest {
        id: Some(id),
        server_made_id: false,
        ..machine.request_atomic(&["INSERT INTO t(client) VALUES (random()) RETURNING id, client"])
    }
}

fn with_table() -> Machine {
    let mut machine = Machine::new();
    machine.ok(&["CREATE TABLE t(id INTEGER PRIMARY KEY, client)"]);
    machine
}

fn count(machine: &Machine) -> String {
    machine.read("SELECT count(*) FROM t")
}

fn message(reply: &StoredReply) -> &str {
    reply.error.as_ref().map_or("", |error| &error.message)
}

#[test]
fn a_repeated_request_gets_its_first_reply_also_after_a_restart() {
    let mut machine = with_table();
    let request = insert(&machine, 1, 1);
    let first = machine.apply(request.clone());
    assert_eq!(first.error, None);
    for _ in 0..3 {
        assert_eq!(machine.apply(request.clone()), first);
        machine = machine.reopen();
    }
    // In one group with the original, too.
    let other = insert(&machine, 2, 1);
    let replies = machine.apply_all(vec![other.clone(), other.clone(), request, other]);
    assert_eq!((&replies[0], &replies[2]), (&replies[1], &first));
    assert_eq!(replies[0], replies[3]);
    assert_eq!(count(&machine), "2");
}

#[test]
fn a_failure_is_a_reply_and_is_repeated_as_well() {
    let mut machine = with_table();
    let mut request = insert(&machine, 1, 1);
    request.body = machine.request_atomic(&["INSERT INTO nowhere VALUES (1)"]).body;
    let first = machine.apply(request.clone());
    assert_eq!(first.class(), ReplyClass::Invalid);
    machine.ok(&["CREATE TABLE nowhere(a)"]);
    assert_eq!(machine.apply(request), first);
}

#[test]
fn requests_may_come_out_of_order() {
    let mut machine = with_table();
    let requests: Vec<LoggedRequest> = [5, 2, 9, 1].map(|sequence| insert(&machine, 1, sequence)).into();
    let first = machine.apply_all(requests.clone());
    assert_eq!(machine.apply_all(requests), first);
    assert_eq!(count(&machine), "4");
}

#[test]
fn an_acknowledged_request_is_refused_and_its_reply_forgotten() {
    let mut machine = with_table();
    let first = insert(&machine, 1, 1);
    machine.apply(first.clone());
    let mut second = insert(&machine, 1, 2);
    second.id.as_mut().unwrap().acknowledged_below = 2;
    machine.apply(second);
    let reply = machine.apply(first);
    assert_eq!(reply.class(), ReplyClass::Expired);
    assert!(message(&reply).contains("has acknowledged"), "{}", message(&reply));
    assert_eq!(count(&machine), "2");
}

#[test]
fn a_request_cannot_acknowledge_itself() {
    let mut machine = with_table();
    let mut request = insert(&machine, 1, 1);
    request.id.as_mut().unwrap().acknowledged_below = 99;
    let first = machine.apply(request.clone());
    assert_eq!(first.class(), ReplyClass::Ok);
    assert_eq!(machine.apply(request), first);
}

#[test]
fn a_server_made_request_is_applied_once_without_a_stored_reply() {
    let mut machine = with_table();
    let request = LoggedRequest { server_made_id: true, ..insert(&machine, 1, 1) };
    assert_eq!(machine.apply(request.clone()).class(), ReplyClass::Ok);
    let reply = machine.apply(request);
    assert_eq!(reply.class(), ReplyClass::Expired);
    assert!(message(&reply).contains("applied before"), "{}", message(&reply));
    assert_eq!(count(&machine), "1");
}

#[test]
fn a_session_expires_only_by_both_time_and_entries() {
    let repeat_after = |entries: u64, ms: u64| {
        let mut machine = with_table();
        let request = insert(&machine, 1, 1);
        let first = machine.apply(request.clone());
        machine.skip_to(2 + entries);
        let mut entry = entry_at(2 + entries, request);
        entry.timestamp_ms = machine::FIRST_TIMESTAMP_MS + 2_000 + ms;
        machine.skip_to(2 + entries);
        let applied = machine.try_apply(&[entry]).unwrap();
        ((*applied[0].reply).clone() == first, applied[0].reply.class(), count(&machine))
    };
    let kept = (true, ReplyClass::Ok, "1".to_owned());
    assert_eq!(repeat_after(10, WINDOW_MS * 10), kept);
    assert_eq!(repeat_after(WINDOW_ENTRIES, WINDOW_MS - 1), kept);
    // The request names an index that is out of the window by then: it is refused, not applied again.
    assert_eq!(repeat_after(WINDOW_ENTRIES, WINDOW_MS), (false, ReplyClass::Expired, "1".to_owned()));
}

#[test]
fn an_unknown_client_with_a_recent_request_is_welcome() {
    let mut machine = with_table();
    machine.skip_to(WINDOW_ENTRIES + 10);
    let mut request = insert(&machine, 1, 1);
    assert_eq!(machine.apply(request.clone()).class(), ReplyClass::Expired);
    request.id.as_mut().unwrap().made_at_index = WINDOW_ENTRIES;
    assert_eq!(machine.apply(request).class(), ReplyClass::Ok);
}

/// A request that returns so many bytes.
fn returning(machine: &Machine, client: u8, sequence: u64, bytes: usize) -> LoggedRequest {
    let body = machine.request_atomic(&[&format!("SELECT zeroblob({bytes})")]).body;
    LoggedRequest { body, result_limit_bytes: 64 << 20, ..insert(machine, client, sequence) }
}

#[test]
fn beyond_its_bound_a_session_remembers_of_the_oldest_only_that_they_were_applied() {
    let mut machine = with_table();
    let requests = (1..=MAX_REPLIES as u64 + 1).map(|sequence| insert(&machine, 1, sequence)).collect();
    let replies = machine.apply_all(requests);
    assert!(replies.iter().all(|reply| reply.class() == ReplyClass::Ok));
    let oldest = machine.apply(insert(&machine, 1, 1));
    assert_eq!(oldest.class(), ReplyClass::Expired, "applied before, its reply was not kept");
    assert_eq!(machine.apply(insert(&machine, 1, 2)), replies[1]);
    assert_eq!(count(&machine), (MAX_REPLIES + 1).to_string(), "nothing was applied twice");
}

#[test]
fn a_reply_as_large_as_a_value_may_be_is_given_and_not_kept() {
    let mut machine = with_table();
    let largest = returning(&machine, 1, 1, (16 << 20) - 64);
    let first = machine.apply(largest.clone());
    assert_eq!(first.class(), ReplyClass::Ok, "{:?}", first.error);
    assert_eq!(machine.apply(largest).class(), ReplyClass::Expired, "its reply was not kept");
    assert_eq!(machine.apply(insert(&machine, 1, 2)).class(), ReplyClass::Ok);
}

#[test]
fn clients_that_left_without_acknowledging_stand_in_nobodys_way() {
    let mut machine = with_table();
    let each = MAX_SESSION_BYTES - 1_024;
    let clients = MAX_TOTAL_BYTES / each + 2;
    for client in 0..clients {
        let reply = machine.apply(returning(&machine, client as u8 + 1, 1, each));
        assert_eq!(reply.class(), ReplyClass::Ok, "client {client}");
    }
    let quietest = machine.apply(returning(&machine, 1, 1, each));
    assert_eq!(quietest.class(), ReplyClass::Expired, "applied before, its reply was not kept");
    let latest = machine.apply(returning(&machine, clients as u8, 1, each));
    assert_eq!(latest.class(), ReplyClass::Ok, "its reply was kept");
}

#[test]
fn what_an_earlier_session_of_the_client_may_have_applied_is_not_applied_again() {
    let mut machine = with_table();
    let lost = insert(&machine, 1, 5);
    assert_eq!(machine.apply(lost.clone()).class(), ReplyClass::Ok);
    // Log time passes with the entries, by a second each.
    machine.skip_to(WINDOW_ENTRIES + 1_000);
    // Another request of the same client finds the session forgotten, and begins a new one.
    let mut later = insert(&machine, 1, 6);
    later.id.as_mut().unwrap().made_at_index = WINDOW_ENTRIES;
    later.id.as_mut().unwrap().acknowledged_below = 5;
    assert_eq!(machine.apply(later).class(), ReplyClass::Ok);
    assert_eq!(machine.apply(lost).class(), ReplyClass::Expired);
    assert_eq!(count(&machine), "2");
}

#[test]
fn a_request_without_a_proper_id_is_invalid() {
    let mut machine = with_table();
    for id in [
        None,
        Some(RequestId { client_id: b"short".as_slice().into(), sequence: 1, ..RequestId::default() }),
        Some(RequestId { client_id: vec![1; 16].into(), sequence: 0, ..RequestId::default() }),
    ] {
        let request = LoggedRequest { id, ..insert(&machine, 1, 1) };
        assert_eq!(machine.apply(request).class(), ReplyClass::Invalid);
    }
    assert_eq!(count(&machine), "0");
}

#[test]
fn a_lost_transaction_takes_the_sessions_back_with_it() {
    let mut machine = with_table();
    machine.ok(&["CREATE TABLE u(a UNIQUE)", "INSERT INTO u VALUES (1)"]);
    let mut rolls_back = insert(&machine, 2, 1);
    rolls_back.body = machine.request_atomic(&["INSERT OR ROLLBACK INTO u VALUES (1)"]).body;
    let requests = vec![insert(&machine, 1, 1), insert(&machine, 3, 1), rolls_back, insert(&machine, 1, 2)];
    let first = machine.apply_all(requests.clone());
    assert_eq!(count(&machine), "3");
    let mut machine = machine.reopen();
    assert_eq!(machine.apply_all(requests), first);
    assert_eq!(count(&machine), "3");
}

#[test]
fn vacuum_is_answered_once_too() {
    let mut machine = with_table();
    let mut vacuum = insert(&machine, 1, 2);
    vacuum.body = machine.request_atomic(&["VACUUM"]).body;
    let requests = vec![insert(&machine, 1, 1), vacuum.clone(), insert(&machine, 1, 3)];
    let first = machine.apply_all(requests.clone());
    let mut machine = machine.reopen();
    assert_eq!(machine.apply_all(requests), first);
    assert_eq!(count(&machine), "2");
}
