//! Whoever guesses has to wait: longer and longer, by address, and by address and name.
//!
//! A right password or token that is known already never comes here, so a flood of wrong ones
//! keeps out nobody who is in. Everything is bounded; it knows nothing of passwords.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    time::Duration,
};

use tokio::time::Instant;

/// So many wrong passwords for one name are free: people mistype.
const FREE_BY_NAME: u32 = 5;
/// So many wrong passwords or tokens from one address are free: it may be many people's.
const FREE_BY_ADDRESS: u32 = 20;
/// The first pause, doubled with each further failure up to the longest.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// What has been quiet for so long is forgotten.
const FORGET_AFTER: Duration = Duration::from_secs(900);
/// How many addresses and names are remembered; the one that has been quiet for longest gives way.
const MAX_REMEMBERED: usize = 10_000;
/// How many passwords from one address may wait to be checked.
const MAX_WAITING_BY_ADDRESS: usize = 128;

/// Who fails, and how often.
#[derive(Debug, Default)]
pub struct Backoff {
    failures: HashMap<(IpAddr, Option<Box<str>>), Failures>,
    waiting: HashMap<IpAddr, usize>,
}

#[derive(Clone, Copy, Debug)]
struct Failures {
    count: u32,
    last: Instant,
    refused_until: Instant,
}

impl Backoff {
    /// How long this one still has to wait.
    pub fn pause(&self, from: IpAddr, name: Option<&str>, now: Instant) -> Option<Duration> {
        let until =
            keys(from, name).filter_map(|key| self.failures.get(&key)).map(|known| known.refused_until);
        until.max().filter(|until| *until > now).map(|until| until - now)
    }

    /// Notes a wrong password or token.
    pub fn failed(&mut self, from: IpAddr, name: Option<&str>, now: Instant) {
        for key in keys(from, name) {
            self.make_room(&key, now);
            let free = if key.1.is_some() { FREE_BY_NAME } else { FREE_BY_ADDRESS };
            let known = self.failures.entry(key);
            let known = known.or_insert(Failures { count: 0, last: now, refused_until: now });
            known.count = known.count.saturating_add(1);
            known.last = now;
            if known.count >= free {
                let doublings = (known.count - free).min(6);
                known.refused_until = now + (PAUSE.0 * (1 << doublings)).min(PAUSE.1);
            }
        }
    }

    /// Notes a right password. It clears the name only: somebody with a user of their own could otherwise go on
    /// guessing other names.
    pub fn succeeded(&mut self, from: IpAddr, name: &str) {
        for key in keys(from, Some(name)).filter(|key| key.1.is_some()) {
            self.failures.remove(&key);
        }
    }

    /// Begins to wait; false: too many of the same address do so already.
    pub fn enter(&mut self, from: IpAddr) -> bool {
        let waiting = self.waiting.entry(network(from)).or_default();
        let enters = *waiting < MAX_WAITING_BY_ADDRESS;
        *waiting += usize::from(enters);
        enters
    }

    /// Has ended to wait.
    pub fn leave(&mut self, from: IpAddr) {
        let from = network(from);
        if let Some(waiting) = self.waiting.get_mut(&from) {
            *waiting -= 1;
            if *waiting == 0 {
                self.waiting.remove(&from);
            }
        }
    }

    fn make_room(&mut self, key: &(IpAddr, Option<Box<str>>), now: Instant) {
        if self.failures.len() < MAX_REMEMBERED || self.failures.contains_key(key) {
            return;
        }
        self.failures.retain(|_, known| now.duration_since(known.last) < FORGET_AFTER);
        if self.failures.len() >= MAX_REMEMBERED {
            let quietest = self.failures.iter().min_by_key(|(_, known)| known.last);
            if let Some(key) = quietest.map(|(key, _)| key.clone()) {
                self.failures.remove(&key);
            }
        }
    }
}

/// The address alone, and with the name.
fn keys(from: IpAddr, name: Option<&str>) -> impl Iterator<Item = (IpAddr, Option<Box<str>>)> {
    let from = network(from);
    [Some((from, None)), name.map(|name| (from, Some(name.into())))].into_iter().flatten()
}

/// Who has one IPv6 address has 2^64 of them.
fn network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const THERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));

    #[tokio::test]
    async fn who_guesses_a_name_waits_longer_and_longer_and_others_do_not() {
        let (mut backoff, now) = (Backoff::default(), Instant::now());
        for _ in 1..FREE_BY_NAME {
            backoff.failed(HERE, Some("alice"), now);
        }
        assert_eq!(backoff.pause(HERE, Some("alice"), now), None);
        let mut pauses = Vec::new();
        for _ in 0..8 {
            backoff.failed(HERE, Some("alice"), now);
            pauses.push(backoff.pause(HERE, Some("alice"), now).unwrap().as_secs());
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(backoff.pause(HERE, Some("bob"), now), None);
        assert_eq!(backoff.pause(THERE, Some("alice"), now), None);
        assert_eq!(backoff.pause(HERE, Some("alice"), now + Duration::from_secs(61)), None);
        backoff.succeeded(HERE, "alice");
        assert_eq!(backoff.pause(HERE, Some("alice"), now), None);
    }

    #[tokio::test]
    async fn an_address_that_guesses_many_names_waits_even_if_it_knows_one() {
        let (mut backoff, now) = (Backoff::default(), Instant::now());
        for number in 0..FREE_BY_ADDRESS {
            backoff.failed(HERE, Some(&format!("user{number}")), now);
            backoff.succeeded(HERE, "mallory");
        }
        assert!(backoff.pause(HERE, Some("alice"), now).is_some());
        assert_eq!(backoff.pause(THERE, Some("alice"), now), None);
    }

    #[tokio::test]
    async fn neighbours_in_one_ipv6_network_count_as_one() {
        let (mut backoff, now) = (Backoff::default(), Instant::now());
        for host in 0..FREE_BY_ADDRESS {
            backoff.failed(format!("2001:db8::{host:x}").parse().unwrap(), None, now);
        }
        assert!(backoff.pause("2001:db8::ffff".parse().unwrap(), None, now).is_some());
        assert_eq!(backoff.pause("2001:db8:0:1::1".parse().unwrap(), None, now), None);
    }

    #[tokio::test]
    async fn what_is_remembered_is_bounded() {
        let (mut backoff, now) = (Backoff::default(), Instant::now());
        for number in 0..MAX_REMEMBERED as u32 + 10 {
            let from = IpAddr::V4(std::net::Ipv4Addr::from_bits(number));
            backoff.failed(from, None, now + Duration::from_millis(number.into()));
        }
        assert_eq!(backoff.failures.len(), MAX_REMEMBERED);
        let entered = (0..1_000).filter(|_| backoff.enter(HERE)).count();
        assert_eq!(entered, MAX_WAITING_BY_ADDRESS);
        backoff.leave(HERE);
        assert!(backoff.enter(HERE) && !backoff.enter(HERE) && backoff.enter(THERE));
    }
}
