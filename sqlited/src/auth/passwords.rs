//! Passwords: made into argon2 hashes, and checked against them, by few at a time.
//!
//! A hash costs 19 MiB of memory and some ten milliseconds, on purpose. So what was found right is remembered for a
//! while, as a keyed hash that means nothing outside this process. It knows nothing of who asks.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use argon2::{
    Algorithm, Argon2, Params, PasswordHash, PasswordHasher, PasswordVerifier, Version,
    password_hash::SaltString,
};
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    task::spawn_blocking,
    time::Instant,
};
use tonic::Status;

use crate::users::User;

/// Argon2id with the parameters that OWASP's Password Storage Cheat Sheet gives: 19 MiB, two passes, one lane.
const PARAMS: (u32, u32, u32) = (19_456, 2, 1);
/// Shorter passwords are guessed too easily …
const MIN_BYTES: usize = 8;
/// … and longer ones only cost time.
const MAX_BYTES: usize = 1_024;
/// How long a right password is remembered.
const REMEMBER_FOR: Duration = Duration::from_secs(300);
/// How many are remembered.
const MAX_REMEMBERED: usize = 10_000;
/// How many may wait to be checked.
const MAX_WAITING: usize = 512;
/// What a password is checked against when there is no such user: no password is right, but the time is the same.
const NO_SALT: &[u8; 16] = b"there is no user";

/// Checks and remembers.
pub struct Passwords {
    key: [u8; 32],
    right: Mutex<HashMap<[u8; 32], Right>>,
    waiting: Semaphore,
    running: Semaphore,
}

/// A password that was found right: for this hash, and for so long.
struct Right {
    password_hash: String,
    until: Instant,
}

/// The right to use the processor for passwords.
pub struct Turn<'a> {
    _waiting: SemaphorePermit<'a>,
    _running: SemaphorePermit<'a>,
}

impl std::fmt::Debug for Passwords {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Passwords").finish_non_exhaustive()
    }
}

impl Passwords {
    /// Fails only when the operating system has no entropy.
    pub fn new() -> Result<Self, getrandom::Error> {
        let mut key = [0; 32];
        getrandom::fill(&mut key)?;
        // Half of the processors at most: the rest is for those who are in.
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            key,
            right: Mutex::default(),
            waiting: Semaphore::new(MAX_WAITING),
            running: Semaphore::new((processors / 2).clamp(1, 4)),
        })
    }

    /// Waits until it is one's turn; refused when too many wait.
    pub async fn turn(&self) -> Result<Turn<'_>, Status> {
        let waiting = self.waiting.try_acquire().map_err(|_| {
            Status::resource_exhausted(
                "too many passwords wait to be checked: try again later, or use a token",
            )
        })?;
        let running = self.running.acquire().await;
        let running = running.map_err(|_| Status::unavailable("this node is shutting down"))?;
        Ok(Turn { _waiting: waiting, _running: running })
    }

    /// Whether this was found to be the user's password a short while ago.
    pub fn is_known(&self, user: &User, password: &str) -> bool {
        let right = self.lock();
        let known = right.get(&self.mark(&user.name, password));
        known.is_some_and(|known| known.password_hash == user.password_hash && known.until > Instant::now())
    }

    /// Whether this is the user's password; takes as long when there is no such user, or none with a password.
    pub async fn is_right(
        &self,
        _turn: &Turn<'_>,
        user: Option<&User>,
        password: &str,
    ) -> Result<bool, Status> {
        let hash = user.map(|user| user.password_hash.clone()).filter(|hash| !hash.is_empty());
        let tried = password.to_owned();
        let checked = spawn_blocking(move || check(hash.as_deref(), &tried)).await;
        let right = checked.map_err(|_| Status::internal("the check of a password has failed"))?;
        if let (true, Some(user)) = (right, user) {
            self.remember(user, password);
        }
        Ok(right)
    }

    /// The hash of a new password, in the PHC string format.
    pub async fn hash(&self, password: String) -> Result<String, Status> {
        if !(MIN_BYTES..=MAX_BYTES).contains(&password.len()) {
            return Err(Status::invalid_argument(format!("a password has {MIN_BYTES} to {MAX_BYTES} bytes")));
        }
        let mut salt = [0; 16];
        getrandom::fill(&mut salt).map_err(|error| Status::internal(format!("no entropy: {error}")))?;
        let _turn = self.turn().await?;
        let hashed = spawn_blocking(move || hash(&password, &salt)).await;
        let hashed = hashed.map_err(|_| Status::internal("the hashing of a password has failed"))?;
        hashed.map_err(|error| Status::internal(format!("the password cannot be hashed: {error}")))
    }

    fn remember(&self, user: &User, password: &str) {
        let now = Instant::now();
        let mut right = self.lock();
        if right.len() >= MAX_REMEMBERED {
            right.retain(|_, known| known.until > now);
            if right.len() >= MAX_REMEMBERED {
                right.clear();
            }
        }
        let known = Right { password_hash: user.password_hash.clone(), until: now + REMEMBER_FOR };
        right.insert(self.mark(&user.name, password), known);
    }

    /// What stands for a name and its password in memory.
    fn mark(&self, name: &str, password: &str) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes()).update(password.as_bytes());
        *hasher.finalize().as_bytes()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<[u8; 32], Right>> {
        self.right.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn argon2() -> Argon2<'static> {
    let (memory_kib, passes, lanes) = PARAMS;
    let params =
        Params::new(memory_kib, passes, lanes, None).expect("these parameters are within argon2's bounds");
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
}

fn hash(password: &str, salt: &[u8; 16]) -> Result<String, argon2::password_hash::Error> {
    let salt = SaltString::encode_b64(salt)?;
    Ok(argon2().hash_password(password.as_bytes(), &salt)?.to_string())
}

/// Compares in constant time (`PasswordVerifier`).
fn check(stored: Option<&str>, password: &str) -> bool {
    match stored.map(PasswordHash::new) {
        Some(Ok(stored)) => argon2().verify_password(password.as_bytes(), &stored).is_ok(),
        _ => {
            // For the time that it takes.
            drop(hash(password, NO_SALT));
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(password_hash: &str) -> User {
        User { name: "alice".into(), password_hash: password_hash.into(), ..User::default() }
    }

    #[tokio::test]
    async fn a_password_is_kept_as_argon2id_with_a_salt_of_its_own() {
        let passwords = Passwords::new().unwrap();
        let (one, other) = (
            passwords.hash("correct horse".into()).await.unwrap(),
            passwords.hash("correct horse".into()).await.unwrap(),
        );
        assert!(one.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{one}");
        assert_ne!(one, other);
        let turn = passwords.turn().await.unwrap();
        assert!(passwords.is_right(&turn, Some(&user(&one)), "correct horse").await.unwrap());
        assert!(!passwords.is_right(&turn, Some(&user(&one)), "Correct horse").await.unwrap());
        assert!(!passwords.is_right(&turn, Some(&user("")), "").await.unwrap());
        assert!(!passwords.is_right(&turn, None, "correct horse").await.unwrap());
    }

    #[tokio::test]
    async fn what_was_found_right_is_remembered_for_that_hash_only() {
        let passwords = Passwords::new().unwrap();
        let alice = user(&passwords.hash("correct horse".into()).await.unwrap());
        assert!(!passwords.is_known(&alice, "correct horse"));
        let turn = passwords.turn().await.unwrap();
        assert!(passwords.is_right(&turn, Some(&alice), "correct horse").await.unwrap());
        drop(turn);
        assert!(passwords.is_known(&alice, "correct horse"));
        assert!(!passwords.is_known(&alice, "correct hors"));
        assert!(!passwords.is_known(&User { name: "bob".into(), ..alice.clone() }, "correct horse"));
        let changed = user(&passwords.hash("battery staple".into()).await.unwrap());
        assert!(!passwords.is_known(&changed, "correct horse"));
    }

    #[tokio::test]
    async fn the_queue_has_an_end() {
        let passwords = Passwords::new().unwrap();
        let _all = passwords.waiting.try_acquire_many(MAX_WAITING as u32).unwrap();
        let refused = passwords.turn().await.err().unwrap();
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
    }

    #[tokio::test]
    async fn passwords_that_are_too_short_or_too_long_are_refused() {
        let passwords = Passwords::new().unwrap();
        for wrong in ["", "1234567", &"x".repeat(MAX_BYTES + 1)] {
            let refused = passwords.hash(wrong.to_owned()).await.unwrap_err();
            assert_eq!(refused.code(), tonic::Code::InvalidArgument);
        }
    }
}
