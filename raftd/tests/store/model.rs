//! Random histories against a plain model: reopened at any time, and with the power cut at any step.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
        mpsc::channel,
    },
};

use bytes::Bytes;
use proptest::prelude::*;
use raft::{Entry, HardState, Index, Install, Log, Position, Term};
use raftd::store::{
    Store, Write,
    block_file::BlockFile,
    journaled_log::JournaledLog,
    log_store::{LogStore, LogStoreError, Scan},
    memory_log::MemoryLog,
    record::Key,
};

use crate::support::{Running, entry, options, whole_log};

#[derive(Clone, Debug)]
enum Step {
    /// Appends entries of these payload lengths, after giving up so many of the last ones.
    Append {
        replaced: u64,
        lens: Vec<usize>,
    },
    Vote(Option<u64>),
    /// Discards all but so many entries.
    Compact {
        kept: u64,
    },
    /// Begins anew so far behind the end, or beyond it.
    Install {
        back: u64,
        ahead: u64,
        keep_suffix: bool,
    },
    Settle,
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let len = prop_oneof![6 => 0..300usize, 2 => 30_000..70_000usize, 1 => 100_000..300_000usize];
    let replaced = prop_oneof![3 => Just(0u64), 1 => 1..12u64];
    prop_oneof![
        8 => (replaced, prop::collection::vec(len, 1..12)).prop_map(|(replaced, lens)| Step::Append { replaced, lens }),
        1 => prop::option::of(1..4u64).prop_map(Step::Vote),
        2 => (0..20u64).prop_map(|kept| Step::Compact { kept }),
        1 => (0..10u64, 0..10u64, any::<bool>()).prop_map(|(back, ahead, keep_suffix)| Step::Install { back, ahead, keep_suffix }),
        2 => Just(Step::Settle),
        2 => Just(Step::Reopen),
    ]
}

/// What the log should hold.
#[derive(Clone, Debug, Default)]
struct Model {
    base: Position,
    last: Index,
    hard_state: HardState,
    /// Compacted entries stay, so that an older base can be checked against them.
    entries: BTreeMap<Index, Entry>,
    /// Where the history begins that `entries` knows: the last base that gave up the log.
    floor: Index,
}

impl Model {
    fn log(&self) -> Vec<Entry> {
        self.entries.range(self.base.index + 1..).map(|(_, entry)| entry.clone()).collect()
    }

    fn position(&self, index: Index) -> Position {
        if index == self.base.index { self.base } else { self.entries[&index].position() }
    }

    fn append(&mut self, replaced: u64, lens: &[usize]) -> Write {
        let kept = self.last - replaced.min(self.last - self.base.index);
        // Only a later term replaces entries.
        let hard_state = (kept < self.last || self.hard_state.term == 0).then(|| {
            self.hard_state =
                HardState { term: self.hard_state.term + 1, voted_for: None, ..self.hard_state };
            self.hard_state
        });
        self.entries.split_off(&(kept + 1));
        let added: Vec<_> =
            (kept + 1..).zip(lens).map(|(index, len)| entry(index, self.hard_state.term, *len)).collect();
        self.last = kept + added.len() as u64;
        self.entries.extend(added.iter().map(|entry| (entry.index, entry.clone())));
        Write { hard_state, entries: added, ..Write::default() }
    }

    fn vote(&mut self, voted_for: Option<u64>) -> Write {
        self.hard_state = HardState { term: self.hard_state.term + 1, voted_for, ..self.hard_state };
        Write { hard_state: Some(self.hard_state), ..Write::default() }
    }

    fn install(&mut self, back: u64, ahead: u64, keep_suffix: bool) -> Write {
        let index = self.last - back.min(self.last - self.base.index);
        let install = if keep_suffix {
            Install { base: self.position(index), keep_suffix }
        } else {
            let term: Term = self.hard_state.term.max(1);
            let index = index + ahead;
            Install { base: Position { index, term, timestamp_ms: 1_000 + index }, keep_suffix }
        };
        self.base = install.base;
        let mut hard_state = None;
        if !keep_suffix {
            self.entries.clear();
            self.last = self.base.index;
            self.floor = self.base.index;
            self.hard_state.term = self.hard_state.term.max(1);
            hard_state = Some(self.hard_state);
        }
        Write { hard_state, install: Some(install), ..Write::default() }
    }
}

/// Does a step on both. `Reopen` is the caller's.
fn carry_out(step: &Step, model: &mut Model, store: &mut Running) {
    let write = match step {
        Step::Append { replaced, lens } => model.append(*replaced, lens),
        Step::Vote(candidate) => model.vote(*candidate),
        Step::Install { back, ahead, keep_suffix } => model.install(*back, *ahead, *keep_suffix),
        Step::Compact { kept } => {
            store.settle();
            let to = model.last.saturating_sub(*kept);
            let base = store.writer.compact(to).unwrap();
            model.base = model.position(base.max(model.base.index));
            return;
        }
        Step::Settle | Step::Reopen => return store.settle(),
    };
    store.submit(write).unwrap();
}

fn check(model: &Model, store: &Running) {
    assert_eq!(store.reader.base().unwrap(), model.base);
    assert_eq!(store.reader.last_index().unwrap(), model.last);
    assert_eq!(store.reader.term(model.last).unwrap(), Some(model.position(model.last).term));
    assert!(store.log() == model.log(), "the log differs from the model's");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn the_store_equals_the_model_through_every_reopening(steps in prop::collection::vec(step(), 1..40)) {
        let dir = tempfile::tempdir().unwrap();
        let mut model = Model { hard_state: HardState::new(7), ..Model::default() };
        let mut store = Running::open(dir.path()).unwrap();
        for step in steps {
            carry_out(&step, &mut model, &mut store);
            if matches!(step, Step::Reopen) {
                store.stop();
                store = Running::open(dir.path()).unwrap();
                prop_assert_eq!(store.hard_state, model.hard_state);
            }
            check(&model, &store);
        }
        store.stop();
        let store = Running::open(dir.path()).unwrap();
        prop_assert_eq!(store.hard_state, model.hard_state);
        check(&model, &store);
    }
}

/// Loses power at the k-th step: keeps what the disk would hold then, and goes on as if nothing had happened.
struct Cut {
    records: MemoryLog,
    journal: Mutex<TornFile>,
    hard_state: PathBuf,
    before_cut: AtomicU64,
    survivors: usize,
    note_survives: bool,
    reported: Arc<AtomicU64>,
    submitted: Arc<AtomicU64>,
    left: Mutex<Option<Left>>,
}

/// The log store of a [`Cut`].
struct CutLog(Arc<Cut>);

/// The journal's file of a [`Cut`].
struct CutFile(Arc<Cut>);

/// A file of which a power cut keeps what was synced, and any of the sectors written since.
#[derive(Clone, Default)]
struct TornFile {
    durable: Vec<u8>,
    current: Vec<u8>,
    /// Decides which sectors are kept.
    seed: u64,
}

const SECTOR_BYTES: usize = 512;

impl TornFile {
    fn write_at(&mut self, bytes: &[u8], at: usize) {
        let end = at + bytes.len();
        self.current.resize(end.max(self.current.len()), 0);
        self.current[at..end].copy_from_slice(bytes);
    }

    fn after_power_cut(&self) -> Self {
        let mut left = self.current.clone();
        let mut random = self.seed;
        for (at, sector) in left.chunks_mut(SECTOR_BYTES).enumerate() {
            let durable = self.durable.get(at * SECTOR_BYTES..at * SECTOR_BYTES + sector.len());
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            if random >> 63 == 0 {
                match durable {
                    Some(durable) => sector.copy_from_slice(durable),
                    None => sector.fill(0),
                }
            }
        }
        Self { durable: left.clone(), current: left, seed: self.seed }
    }
}

/// What a power cut left.
struct Left {
    log: MemoryLog,
    journal: TornFile,
    hard_state: Vec<u8>,
    reported: u64,
    submitted: u64,
}

impl Cut {
    fn step(&self) {
        if self.before_cut.fetch_sub(1, Ordering::SeqCst) != 1 {
            return;
        }
        // This is the writer's own thread: the hard state is not being written now. Its slots are synced, its note
        // need not be.
        let Ok(mut hard_state) = fs::read(&self.hard_state) else { return };
        if !self.note_survives {
            hard_state[8192..].fill(0);
        }
        let log = self.records.after_power_cut(self.survivors);
        let journal = self.journal.lock().unwrap().after_power_cut();
        let reported = self.reported.load(Ordering::SeqCst);
        let submitted = self.submitted.load(Ordering::SeqCst);
        *self.left.lock().unwrap() = Some(Left { log, journal, hard_state, reported, submitted });
    }
}

impl LogStore for CutLog {
    fn insert(&self, key: Key, value: Vec<u8>) -> Result<(), LogStoreError> {
        self.0.step();
        self.0.records.insert(key, value)
    }

    fn remove(&self, key: Key) -> Result<(), LogStoreError> {
        self.0.step();
        self.0.records.remove(key)
    }

    fn flush(&self) -> Result<(), LogStoreError> {
        self.0.records.flush()
    }

    fn sync(&self) -> Result<(), LogStoreError> {
        self.0.step();
        self.0.records.sync()?;
        self.0.step();
        Ok(())
    }

    fn first_key(&self) -> Result<Option<Key>, LogStoreError> {
        self.0.records.first_key()
    }

    fn last_key(&self) -> Result<Option<Key>, LogStoreError> {
        self.0.records.last_key()
    }

    fn at_or_before(&self, key: Key) -> Result<Option<(Key, Bytes)>, LogStoreError> {
        self.0.records.at_or_before(key)
    }

    fn scan(&self, from: Key) -> Scan<'_> {
        self.0.records.scan(from)
    }

    fn size_bytes(&self) -> Result<u64, LogStoreError> {
        self.0.records.size_bytes()
    }
}

impl BlockFile for CutFile {
    fn read_all(&self) -> io::Result<Vec<u8>> {
        Ok(self.0.journal.lock().unwrap().current.clone())
    }

    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.0.step();
        self.0.journal.lock().unwrap().write_at(bytes, at as usize);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.step();
        {
            let mut journal = self.0.journal.lock().unwrap();
            journal.durable = journal.current.clone();
        }
        self.0.step();
        Ok(())
    }
}

/// Whether what was recovered is the log of one of these models, or its beginning while a later one of them was
/// about to replace the rest: nothing may be missing that all of them hold.
fn is_explained(recovered: &[Entry], base: Position, models: &[Model]) -> bool {
    let last = recovered.last().map_or(base.index, |entry| entry.index);
    let is_beginning_of = |model: &Model| {
        let same = recovered.iter().all(|entry| model.entries.get(&entry.index) == Some(entry));
        same && base.index >= model.floor && base.index <= model.base.index
    };
    let explaining = models.iter().position(is_beginning_of);
    explaining.is_some_and(|at| {
        // What follows a snapshot that gave up the log has nothing to do with what came before.
        let comparable = models.iter().filter(|model| model.floor == models[at].floor);
        let first = models.iter().find(|model| model.floor == models[at].floor).unwrap_or(&models[at]);
        let held_by_all = comparable.map(|model| {
            let differs = |index: &Index| model.entries.get(index) != first.entries.get(index);
            (first.floor + 1..=first.last).find(differs).map_or(first.last, |index| index - 1)
        });
        // Before the first model that has this floor nothing of it was reported.
        let is_reported = models[0].floor == models[at].floor;
        !is_reported || last >= held_by_all.min().unwrap_or(0)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 500, ..ProptestConfig::default() })]

    #[test]
    fn a_power_cut_loses_nothing_that_was_reported(
        steps in prop::collection::vec(step(), 1..30),
        cut in any::<prop::sample::Index>(),
        survivors in 0..60usize,
        note_survives in any::<bool>(),
        seed in any::<u64>(),
        is_journaled in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (reported, submitted) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let disk = Arc::new(Cut {
            records: MemoryLog::new(),
            journal: Mutex::new(TornFile { seed, ..TornFile::default() }),
            hard_state: dir.path().join("hard_state"),
            before_cut: AtomicU64::new(1 + cut.index(200) as u64),
            survivors,
            note_survives,
            reported: reported.clone(),
            submitted: submitted.clone(),
            left: Mutex::default(),
        });
        let log: Arc<dyn LogStore> = if is_journaled {
            let file = Box::new(CutFile(disk.clone()));
            Arc::new(JournaledLog::create_on(Box::new(CutLog(disk.clone())), file).unwrap())
        } else {
            Arc::new(CutLog(disk.clone()))
        };
        let mut store = Store::open_with(options(dir.path()), |_, _| Ok(log.clone())).unwrap();
        let (sender, reports) = channel();
        let said = reported.clone();
        let mut writer = store.start_writer(Box::new(move |report| {
            let number = report.unwrap();
            said.store(number, Ordering::SeqCst);
            sender.send(number).unwrap();
        })).unwrap();

        // models[n] is what the log holds once write n is durable.
        let mut models = vec![Model { hard_state: HardState::new(7), ..Model::default() }];
        for step in &steps {
            let mut model = models.last().unwrap().clone();
            let write = match step {
                Step::Append { replaced, lens } => model.append(*replaced, lens),
                Step::Vote(candidate) => model.vote(*candidate),
                Step::Install { back, ahead, keep_suffix } => model.install(*back, *ahead, *keep_suffix),
                Step::Compact { kept } => {
                    // Compactions are not reported: the newest model stands for before and after.
                    let base = writer.compact(model.last.saturating_sub(*kept)).unwrap();
                    model.base = model.position(base.max(model.base.index));
                    *models.last_mut().unwrap() = model;
                    continue;
                }
                Step::Settle | Step::Reopen => {
                    while reported.load(Ordering::SeqCst) < models.len() as u64 - 1 {
                        reports.recv_timeout(crate::support::PATIENCE).unwrap();
                    }
                    continue;
                }
            };
            submitted.store(models.len() as u64, Ordering::SeqCst);
            writer.submit(Write { number: models.len() as u64, ..write }).unwrap();
            models.push(model);
        }
        writer.shutdown().unwrap();
        let Some(left) = disk.left.lock().unwrap().take() else { return Ok(()) };

        let after = tempfile::tempdir().unwrap();
        fs::write(after.path().join("hard_state"), &left.hard_state).unwrap();
        let survived: Arc<dyn LogStore> = if is_journaled {
            Arc::new(opened_again(left.log, left.journal))
        } else {
            Arc::new(left.log)
        };
        let store = recover(after.path(), survived);
        let models = &models[left.reported as usize..=left.submitted as usize];
        prop_assert!(store.hard_state().term >= models[0].hard_state.term);
        prop_assert!(models.iter().any(|model| model.hard_state == store.hard_state()));
        let reader = store.reader();
        let (found, base) = (whole_log(&reader), reader.base().unwrap());
        let last_term = reader.term(reader.last_index().unwrap()).unwrap().unwrap();
        prop_assert!(last_term <= store.hard_state().term, "the hard state is behind the log");
        prop_assert!(is_explained(&found, base, models), "base {base:?}, log of {} entries", found.len());
    }
}

/// What a start makes of what a power cut left; it is no damage.
fn opened_again(records: MemoryLog, journal: TornFile) -> JournaledLog {
    let uncut = Arc::new(Cut {
        records,
        journal: Mutex::new(journal),
        hard_state: PathBuf::new(),
        before_cut: AtomicU64::new(u64::MAX),
        survivors: 0,
        note_survives: true,
        reported: Arc::default(),
        submitted: Arc::default(),
        left: Mutex::default(),
    });
    let file = Box::new(CutFile(uncut.clone()));
    JournaledLog::open_on(Box::new(CutLog(uncut)), file)
        .unwrap_or_else(|error| panic!("a power cut is not damage: {error}"))
}

fn recover(dir: &Path, log: Arc<dyn LogStore>) -> Store {
    match Store::open_with(options(dir), |_, _| Ok(log.clone())) {
        Ok(store) => store,
        Err(error) => panic!("a power cut is not damage: {error}"),
    }
}
