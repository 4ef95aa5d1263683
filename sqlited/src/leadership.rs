//! Handing leadership over, as an operator asks for it through the public API.
//! raftd does it; this says in words what the operator should know. It knows
//! nothing of Raft's rules.

use std::time::Duration;

use resqlite::{
    api::{Member, TransferLeadershipRequest},
    config::Config,
};
use tokio::time::timeout;
use tonic::{Code, Status};

use crate::{raft_link::RaftLink, status::members_of};

/// Hands the leadership of this node over.
#[derive(Debug)]
pub struct Leadership {
    node_id: u64,
    members: Vec<Member>,
    link: RaftLink,
    patience: Duration,
}

impl Leadership {
    /// Of the node that the configuration describes.
    pub fn new(config: &Config, link: RaftLink) -> Self {
        // raftd gives a transfer up after two election timeouts.
        let patience = Duration::from_millis(4 * config.cluster.election_timeout_ms);
        Self { node_id: config.node_id, members: members_of(config), link, patience }
    }

    /// Returns the new leader once there is one. `to` 0: the most advanced member.
    pub async fn move_to(&self, to: u64) -> Result<u64, Status> {
        self.check_target(to)?;
        let leader_id = self.link.state().borrow().leader_id;
        if to != 0 && to == leader_id {
            return Ok(leader_id);
        }
        self.check_own_lead(leader_id)?;
        let mut raftd = self.link.client().ok_or_else(|| {
            Status::unavailable(
                "raftd beside this node cannot be reached: see whether it runs, then try again",
            )
        })?;
        match timeout(self.patience, raftd.transfer_leadership(TransferLeadershipRequest { to })).await {
            Ok(Ok(response)) => Ok(response.into_inner().leader_id),
            Ok(Err(status)) if status.code() == Code::Unavailable => Err(Status::unavailable(format!(
                "{}: see in `resqlite status` whether that node runs and has caught up, then try again",
                status.message()
            ))),
            Ok(Err(status)) => Err(status),
            Err(_) => Err(Status::deadline_exceeded(
                "raftd has not answered in time: `resqlite status` says who leads now",
            )),
        }
    }

    fn check_target(&self, to: u64) -> Result<(), Status> {
        if to == 0 || self.members.iter().any(|member| member.id == to) {
            return Ok(());
        }
        let known: Vec<String> = self.members.iter().map(|member| member.id.to_string()).collect();
        Err(Status::invalid_argument(format!(
            "{to} is not a member of the cluster (members: {})",
            known.join(", ")
        )))
    }

    fn check_own_lead(&self, leader_id: u64) -> Result<(), Status> {
        if leader_id == self.node_id {
            return Ok(());
        }
        let leader = self.members.iter().find(|member| member.id == leader_id);
        Err(match leader {
            Some(Member { id, sql_address, .. }) => Status::failed_precondition(format!(
                "node {} does not lead: ask node {id}, which does, at {sql_address}",
                self.node_id
            )),
            None => Status::unavailable(
                "no leader is known, so there is no leadership to hand over: wait for an election, or see whether \
                 most members run",
            ),
        })
    }
}
