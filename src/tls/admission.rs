//! Who may stay connected: how many in all, how many from one address, and how long without a call.
//!
//! Every connection has a seat, from the moment that it is accepted. Where the seats are taken, whoever was idle for
//! longest gives way to the next that comes, and of those first who have never made a call; so nobody keeps
//! others out by sitting there. Only when every seat is at work is the newcomer turned away.
//! It knows nothing of what travels over a connection, only when a call begins and ends.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    future::Future,
    net::{IpAddr, Ipv6Addr},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use prometheus::{IntCounterVec, IntGauge};
use tokio::sync::oneshot;

/// How many may be connected, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionLimits {
    /// In all.
    pub total: usize,
    /// From one address; the addresses of an IPv6 network of 64 bits, which one host can have, count as one.
    pub per_address: usize,
    /// Until the handshake is done and HTTP/2 has begun.
    pub first_bytes: Duration,
    /// Without a call.
    pub idle: Duration,
}

/// Where it is counted.
#[derive(Clone, Debug)]
pub struct ConnectionMetrics {
    /// Connections that there are.
    pub open: IntGauge,
    /// Those that were closed or turned away for a limit's sake, by the limit's name.
    pub refused: IntCounterVec,
}

/// What closes a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// There are as many as may be.
    Total,
    /// There are as many from that address as may be.
    PerAddress,
    /// It took too long to begin to speak.
    FirstBytes,
    /// It made no call for too long.
    Idle,
}

impl Limit {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Total, Self::PerAddress, Self::FirstBytes, Self::Idle];

    /// As the setting and the metric's label have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Total => "connections",
            Self::PerAddress => "connections_per_address",
            Self::FirstBytes => "first_bytes_seconds",
            Self::Idle => "idle_seconds",
        }
    }
}

/// Gives out the seats. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Admission {
    limits: ConnectionLimits,
    metrics: ConnectionMetrics,
    table: Arc<Mutex<Table>>,
}

/// How much a connection has shown so far; who has shown less gives way first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// Nothing, or not yet the beginning of HTTP/2.
    Silent,
    /// It speaks HTTP/2, and has made no call.
    Speaking,
    /// It has made calls.
    Known,
}

/// Its place among the idle: the stage, then who has been idle for longest.
type Rank = (Stage, u64);

#[derive(Debug, Default)]
struct Table {
    next: u64,
    seats: HashMap<u64, Taken>,
    by_address: HashMap<IpAddr, Group>,
    /// Those without a call under way, and since when.
    idle: BTreeMap<Rank, (u64, Instant)>,
}

#[derive(Debug)]
struct Taken {
    address: IpAddr,
    calls: usize,
    stage: Stage,
    /// `None` while calls are under way.
    rank: Option<u64>,
    /// Tells the connection to close.
    _close: oneshot::Sender<()>,
}

#[derive(Debug, Default)]
struct Group {
    count: usize,
    idle: BTreeSet<Rank>,
}

impl Admission {
    /// With all seats free.
    pub fn new(limits: ConnectionLimits, metrics: ConnectionMetrics) -> Self {
        for limit in Limit::ALL {
            metrics.refused.with_label_values(&[limit.name()]);
        }
        Self { limits, metrics, table: Arc::default() }
    }

    /// A seat for a connection from this address, and what tells when it has to be given up; or the limit that is in
    /// the way.
    pub fn admit(&self, address: IpAddr, now: Instant) -> Result<(Seat, Closing), Limit> {
        let address = group_of(address);
        let mut table = self.lock();
        let from_there = table.by_address.get(&address).map_or(0, |group| group.count);
        let full = match (from_there >= self.limits.per_address, table.seats.len() >= self.limits.total) {
            (true, _) => Some((Limit::PerAddress, table.longest_idle_of(address))),
            (false, true) => Some((Limit::Total, table.idle.keys().next().copied())),
            (false, false) => None,
        };
        if let Some((limit, gives_way)) = full {
            self.metrics.refused.with_label_values(&[limit.name()]).inc();
            let gives_way = gives_way.ok_or(limit)?;
            table.evict(gives_way);
        }
        let (close, closing) = oneshot::channel();
        let id = table.take(address, close, now);
        self.metrics.open.set(table.seats.len() as i64);
        drop(table);
        Ok((Seat { held: Arc::new(Held { admission: self.clone(), id }) }, Closing(closing)))
    }

    /// Closes those who have taken too long to speak, or to make a call.
    pub fn sweep(&self, now: Instant) {
        let mut table = self.lock();
        let stages = [
            (Stage::Silent, Limit::FirstBytes, self.limits.first_bytes),
            (Stage::Speaking, Limit::Idle, self.limits.idle),
            (Stage::Known, Limit::Idle, self.limits.idle),
        ];
        for (stage, limit, patience) in stages {
            while let Some((&rank, &(_, since))) = table.idle.range((stage, 0)..=(stage, u64::MAX)).next()
                && now.saturating_duration_since(since) >= patience
            {
                table.evict(rank);
                self.metrics.refused.with_label_values(&[limit.name()]).inc();
            }
        }
        self.metrics.open.set(table.seats.len() as i64);
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Nothing under the lock can panic half-way.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn take(&mut self, address: IpAddr, close: oneshot::Sender<()>, now: Instant) -> u64 {
        let id = self.next;
        self.next += 1;
        let taken = Taken { address, calls: 0, stage: Stage::Silent, rank: None, _close: close };
        self.seats.insert(id, taken);
        self.by_address.entry(address).or_default().count += 1;
        self.rest(id, now);
        id
    }

    fn longest_idle_of(&self, address: IpAddr) -> Option<Rank> {
        self.by_address.get(&address)?.idle.first().copied()
    }

    /// Puts a seat at the end of those of its stage who are idle.
    fn rest(&mut self, id: u64, now: Instant) {
        let number = self.next;
        let Some(seat) = self.seats.get_mut(&id) else { return };
        self.next += 1;
        seat.rank = Some(number);
        let rank = (seat.stage, number);
        self.idle.insert(rank, (id, now));
        self.by_address.entry(seat.address).or_default().idle.insert(rank);
    }

    /// Takes a seat out of those who are idle.
    fn stir(&mut self, id: u64) {
        let Some(seat) = self.seats.get_mut(&id) else { return };
        let Some(number) = seat.rank.take() else { return };
        let rank = (seat.stage, number);
        self.idle.remove(&rank);
        if let Some(group) = self.by_address.get_mut(&seat.address) {
            group.idle.remove(&rank);
        }
    }

    fn evict(&mut self, rank: Rank) {
        if let Some(&(id, _)) = self.idle.get(&rank) {
            self.leave(id);
        }
    }

    /// The seat is free from now on; its connection, if it still stands, is told.
    fn leave(&mut self, id: u64) {
        self.stir(id);
        let Some(seat) = self.seats.remove(&id) else { return };
        if let Some(group) = self.by_address.get_mut(&seat.address) {
            group.count -= 1;
            if group.count == 0 {
                self.by_address.remove(&seat.address);
            }
        }
    }
}

/// Which addresses count as one.
fn group_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let network = address.to_bits() & !u128::from(u64::MAX);
            IpAddr::V6(Ipv6Addr::from_bits(network))
        }
        address => address,
    }
}

/// A connection's seat; free again when the last copy goes.
#[derive(Clone)]
pub struct Seat {
    held: Arc<Held>,
}

struct Held {
    admission: Admission,
    id: u64,
}

impl fmt::Debug for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Seat").field(&self.held.id).finish()
    }
}

impl Seat {
    /// HTTP/2 has begun.
    pub fn speaks(&self) {
        let Held { admission, id } = &*self.held;
        let mut table = admission.lock();
        table.stir(*id);
        if let Some(seat) = table.seats.get_mut(id) {
            seat.stage = Stage::Speaking;
        }
        table.rest(*id, Instant::now());
    }

    /// A call is under way until the result goes.
    pub fn call(&self) -> UnderWay {
        let Held { admission, id } = &*self.held;
        let mut table = admission.lock();
        table.stir(*id);
        if let Some(seat) = table.seats.get_mut(id) {
            seat.calls += 1;
            seat.stage = Stage::Known;
        }
        UnderWay(self.clone())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut table = self.admission.lock();
        table.leave(self.id);
        self.admission.metrics.open.set(table.seats.len() as i64);
    }
}

/// A call that is under way.
#[derive(Debug)]
pub struct UnderWay(Seat);

impl Drop for UnderWay {
    fn drop(&mut self) {
        let Held { admission, id } = &*self.0.held;
        let mut table = admission.lock();
        let Some(seat) = table.seats.get_mut(id) else { return };
        seat.calls -= 1;
        if seat.calls == 0 {
            table.rest(*id, Instant::now());
        }
    }
}

/// Becomes ready once the seat has been given to somebody else; then stays so.
#[derive(Debug)]
pub struct Closing(oneshot::Receiver<()>);

impl Future for Closing {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        // Its sender is never used: that it is gone says it, and says it again.
        if self.0.is_terminated() {
            return Poll::Ready(());
        }
        Pin::new(&mut self.0).poll(cx).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const B: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));
    const FIRST_BYTES: Duration = Duration::from_secs(10);
    const IDLE: Duration = Duration::from_secs(600);

    fn admission(total: usize, per_address: usize) -> Admission {
        let metrics = ConnectionMetrics {
            open: IntGauge::new("open", "open").unwrap(),
            refused: IntCounterVec::new(prometheus::Opts::new("refused", "refused"), &["limit"]).unwrap(),
        };
        Admission::new(ConnectionLimits { total, per_address, first_bytes: FIRST_BYTES, idle: IDLE }, metrics)
    }

    fn is_closed(closing: &mut Closing) -> bool {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        Pin::new(closing).poll(&mut cx).is_ready()
    }

    fn closed_for(admission: &Admission, limit: Limit) -> u64 {
        admission.metrics.refused.with_label_values(&[limit.name()]).get()
    }

    #[test]
    fn whoever_was_idle_for_longest_gives_way_and_of_those_first_who_never_made_a_call() {
        let admission = admission(3, 3);
        let now = Instant::now();
        let (known, mut known_closing) = admission.admit(A, now).unwrap();
        drop(known.call());
        let (_first, mut first_closing) = admission.admit(A, now).unwrap();
        let (_second, mut second_closing) = admission.admit(B, now).unwrap();
        let (_third, _) = admission.admit(B, now).unwrap();
        assert!(is_closed(&mut first_closing) && is_closed(&mut first_closing));
        assert!(!is_closed(&mut second_closing));
        let (_fourth, fourth_closing) = admission.admit(B, now).unwrap();
        assert!(is_closed(&mut second_closing) && !is_closed(&mut known_closing));
        drop(fourth_closing);
        assert_eq!(closed_for(&admission, Limit::Total), 2);
        assert_eq!(admission.metrics.open.get(), 3);
    }

    #[test]
    fn while_every_seat_is_at_work_newcomers_are_turned_away() {
        let admission = admission(2, 2);
        let now = Instant::now();
        let (one, mut closing) = admission.admit(A, now).unwrap();
        let (other, _closing) = admission.admit(B, now).unwrap();
        let (busy, _also_busy) = (one.call(), other.call());
        let again = one.call();
        assert_eq!(admission.admit(A, now).unwrap_err(), Limit::Total);
        drop(busy);
        assert_eq!(admission.admit(A, now).unwrap_err(), Limit::Total, "its other call is still under way");
        drop(again);
        let _newcomer = admission.admit(A, now).unwrap();
        assert!(is_closed(&mut closing));
    }

    #[test]
    fn one_address_takes_the_seats_of_its_own_only() {
        let admission = admission(10, 2);
        let now = Instant::now();
        let (_other, mut other_closing) = admission.admit(B, now).unwrap();
        let seats: Vec<_> = (0..5).map(|_| admission.admit(A, now).unwrap()).collect();
        let closed: Vec<bool> =
            seats.into_iter().map(|(_seat, mut closing)| is_closed(&mut closing)).collect();
        assert_eq!(closed, [true, true, true, false, false]);
        assert!(!is_closed(&mut other_closing));
        assert_eq!(closed_for(&admission, Limit::PerAddress), 3);
    }

    #[test]
    fn the_addresses_of_one_ipv6_network_count_as_one_and_a_mapped_one_as_ipv4() {
        let group = |address: &str| group_of(address.parse().unwrap());
        assert_eq!(group("2001:db8:0:1::1"), group("2001:db8:0:1:ffff::2"));
        assert_ne!(group("2001:db8:0:1::1"), group("2001:db8:0:2::1"));
        assert_eq!(group("::ffff:10.0.0.1"), A);
    }

    #[test]
    fn who_says_nothing_and_who_makes_no_call_is_closed_in_time_and_who_works_is_not() {
        let admission = admission(10, 10);
        let now = Instant::now();
        let (_silent, mut silent_closing) = admission.admit(A, now).unwrap();
        let (speaking, mut speaking_closing) = admission.admit(A, now).unwrap();
        speaking.speaks();
        let (working, mut working_closing) = admission.admit(A, now).unwrap();
        let call = working.call();
        // The clock is read at `speaks`, too: a little later than `now`.
        let slack = Duration::from_secs(5);
        admission.sweep(now + FIRST_BYTES - slack);
        assert!(!is_closed(&mut silent_closing));
        admission.sweep(now + FIRST_BYTES);
        assert!(is_closed(&mut silent_closing) && !is_closed(&mut speaking_closing));
        admission.sweep(now + IDLE + slack);
        assert!(is_closed(&mut speaking_closing) && !is_closed(&mut working_closing));
        drop(call);
        admission.sweep(Instant::now() + IDLE);
        assert!(is_closed(&mut working_closing));
        assert_eq!(closed_for(&admission, Limit::FirstBytes), 1);
        assert_eq!(closed_for(&admission, Limit::Idle), 2);
    }

    #[test]
    fn those_who_leave_leave_nothing_behind() {
        let admission = admission(1, 1);
        let (seat, closing) = admission.admit(A, Instant::now()).unwrap();
        seat.speaks();
        let call = seat.call();
        drop((seat, closing));
        drop(call);
        let table = admission.lock();
        assert!(table.seats.is_empty() && table.by_address.is_empty() && table.idle.is_empty());
        drop(table);
        assert_eq!(admission.metrics.open.get(), 0);
    }
}
