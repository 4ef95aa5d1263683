//! The one source of randomness of a history. It knows nothing of what it decides.

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};

/// A sequence of numbers that a seed fixes. Streams of one seed are independent, so that one part of a history can be
/// left out without changing what the others draw.
pub struct Random(ChaCha8Rng);

impl Random {
    /// One of a seed's streams.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream);
        Self(rng)
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// A number below `bound`, or 0. The slight bias of the remainder does not matter here.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0.next_u64() % bound.max(1)
    }

    /// A number from `low` to `high`.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True so many times in a thousand.
    pub fn chance(&mut self, per_mille: u64) -> bool {
        self.below(1_000) < per_mille
    }

    /// One of these.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }
}
