//! The users as this node's requests see them: what is committed here, published by the applier.
//!
//! A read asks after its consistency is waited for, so a linearizable read that begins after a revocation was
//! acknowledged sees the revocation. Nothing is changed through it.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, PoisonError, RwLock},
};

use super::{TokenHash, User};

/// What is committed of the users.
#[derive(Debug, Default)]
pub struct Published {
    required: bool,
    users: BTreeMap<String, Arc<User>>,
    tokens: HashMap<TokenHash, (Arc<User>, u64)>,
}

impl Published {
    pub(super) fn new(required: bool, users: BTreeMap<String, Arc<User>>) -> Self {
        let of_user = |user: &Arc<User>| {
            let user = Arc::clone(user);
            user.tokens.clone().into_iter().map(move |(hash, expires)| (hash, (Arc::clone(&user), expires)))
        };
        let tokens = users.values().flat_map(of_user).collect();
        Self { required, users, tokens }
    }

    /// The user of this name.
    pub fn user(&self, name: &str) -> Option<&Arc<User>> {
        self.users.get(name)
    }

    /// All users, by name.
    pub fn users(&self) -> impl Iterator<Item = &Arc<User>> {
        self.users.values()
    }

    /// Whose token that is, if it is one and good at this time.
    pub fn user_of_token(&self, hash: &TokenHash, now_ms: u64) -> Option<&Arc<User>> {
        self.tokens.get(hash).filter(|(_, expires_at_ms)| now_ms < *expires_at_ms).map(|(user, _)| user)
    }
}

/// Where the published users are found. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Directory {
    current: Arc<RwLock<Arc<Published>>>,
    /// This node's configuration says so, whatever the database does.
    required_here: bool,
}

impl Directory {
    /// Without users. `required_here`: this node lets nobody in who does not say who they are.
    pub fn new(required_here: bool) -> Self {
        Self { required_here, ..Self::default() }
    }

    /// What is committed now.
    pub fn current(&self) -> Arc<Published> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether whoever does not say who they are is refused.
    pub fn is_required(&self) -> bool {
        self.required_here || self.current.read().unwrap_or_else(PoisonError::into_inner).required
    }

    pub(super) fn publish(&self, published: Published) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(published);
    }
}
