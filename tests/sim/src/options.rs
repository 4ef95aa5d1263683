//! What fixes a history: a seed, its length, and which of its faults are left out.

use std::{collections::BTreeSet, fmt};

/// Something that a daemon must not do, done on purpose: whether the checks convict it is how they are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Defect {
    /// Votes and acknowledgements leave before they are durable.
    EarlyAcknowledgement,
    /// Term and vote are not written down.
    ForgottenHardState,
    /// A read does not ask the leader what it must see.
    StaleRead,
    /// The log is discarded up to what the database holds, durably or not.
    EarlyDiscard,
    /// A snapshot leaves out who was answered what.
    ForgottenSessions,
}

impl Defect {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::EarlyAcknowledgement,
        Self::ForgottenHardState,
        Self::StaleRead,
        Self::EarlyDiscard,
        Self::ForgottenSessions,
    ];
}

/// A history is a pure function of these.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Everything random follows from it.
    pub seed: u64,
    /// How many operations the clients begin before the faults stop.
    pub operations: u64,
    /// How many faults are spread over them.
    pub faults: u64,
    /// Faults, by their number, that do not happen.
    pub without: BTreeSet<u64>,
    /// What is wrong with the daemons.
    pub defect: Option<Defect>,
}

impl Options {
    /// A history of the usual length.
    pub fn new(seed: u64) -> Self {
        Self { seed, operations: 1_000, faults: 50, without: BTreeSet::new(), defect: None }
    }

    /// How many faults happen.
    pub fn faults_left(&self) -> u64 {
        self.faults - self.without.iter().filter(|fault| **fault < self.faults).count() as u64
    }

    /// Reads what [`fmt::Display`] writes: words of `name=value`, in any order, after the seed.
    pub fn parse<'a>(words: impl IntoIterator<Item = &'a str>) -> Result<Self, String> {
        let mut options = Self::new(0);
        for word in words {
            let (name, value) =
                word.split_once('=').ok_or_else(|| format!("\"{word}\" is not name=value"))?;
            let number =
                |text: &str| text.parse::<u64>().map_err(|_| format!("{name}: \"{text}\" is not a number"));
            match name {
                "seed" => options.seed = number(value)?,
                "operations" => options.operations = number(value)?,
                "faults" => options.faults = number(value)?,
                "without" => {
                    for range in value.split(',').filter(|range| !range.is_empty()) {
                        let (first, last) = range.split_once('-').unwrap_or((range, range));
                        options.without.extend(number(first)?..=number(last)?);
                    }
                }
                "defect" => {
                    let known = Defect::ALL.into_iter().find(|defect| format!("{defect:?}") == value);
                    options.defect = Some(known.ok_or_else(|| format!("defect: there is no \"{value}\""))?);
                }
                _ => {
                    return Err(format!(
                        "\"{name}\" is not an option: seed, operations, faults, without, defect"
                    ));
                }
            }
        }
        Ok(options)
    }
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed={} operations={} faults={}", self.seed, self.operations, self.faults)?;
        let mut left_out = self.without.iter().copied().peekable();
        let mut separator = " without=";
        while let Some(first) = left_out.next() {
            let mut last = first;
            while left_out.next_if_eq(&(last + 1)).is_some() {
                last += 1;
            }
            write!(f, "{separator}{first}")?;
            if last > first {
                write!(f, "-{last}")?;
            }
            separator = ",";
        }
        if let Some(defect) = self.defect {
            write!(f, " defect={defect:?}")?;
        }
        Ok(())
    }
}
