//! What operators ask of a cluster: whether the nodes hold the same (a marker in the log, and what each node's content
//! comes to as of it), and that another node leads.

use std::time::Duration;

use tonic::Request;

use super::{Client, endpoints::Connection, error::Error};
use crate::api::{ContentHashRequest, ContentHashResponse, MoveLeaderRequest, VerifyRequest};

impl Client {
    /// Puts a marker in the log, as of which every node hashes its content, and returns its index.
    pub async fn verify(&self) -> Result<u64, Error> {
        // A second marker does no harm, so an attempt whose outcome is unknown is simply made again.
        let call = |mut connection: Connection, left| {
            let request = with_timeout(VerifyRequest {}, left);
            async move { connection.verify(request).await }
        };
        let index = self.attempts(false).call(call).await?.into_inner().log_index;
        self.saw(index);
        Ok(index)
    }

    /// What the asked node's content comes to as of a marker; waits for it until the deadline.
    pub async fn content_hash(&self, log_index: u64) -> Result<ContentHashResponse, Error> {
        let call = |mut connection: Connection, left| {
            let request = with_timeout(ContentHashRequest { log_index }, left);
            async move { connection.content_hash(request).await }
        };
        Ok(self.attempts(false).call(call).await?.into_inner())
    }
}

impl Client {
    /// Asks the node, which must lead, to hand leadership over: to a member, or with 0 to the most advanced one.
    /// Returns who leads then.
    pub async fn move_leader(&self, to: u64) -> Result<u64, Error> {
        let call = |mut connection: Connection, left| {
            let request = with_timeout(MoveLeaderRequest { to }, left);
            async move { connection.move_leader(request).await }
        };
        Ok(self.attempts(false).call(call).await?.into_inner().leader_id)
    }
}

fn with_timeout<T>(message: T, left: Option<Duration>) -> Request<T> {
    let mut request = Request::new(message);
    if let Some(left) = left {
        request.set_timeout(left);
    }
    request
}
