//! The local socket: whoever may open it may do everything.
//!
//! It lies in the data directory, which is the daemon's own user's alone: who gets there could as well change the
//! database's file. So the first administrator can be made, and a lost password be set anew, by root of any host,
//! and there is never a default password.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use resqlite::{api::re_sqlite_server::ReSqliteServer, config::Config, daemon::Shutdown};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use crate::{
    RunError,
    auth::{AuthLayer, Authenticator},
    limits,
    service::Service,
};

/// The socket's file in the data directory.
pub const LOCAL_SOCKET: &str = "admin.sock";

/// The socket, if it could be made.
pub(crate) struct Local {
    listener: Option<UnixListener>,
    path: PathBuf,
    auth: AuthLayer,
}

impl Local {
    /// Makes the socket. A daemon that cannot (the path is too long, say) serves all the same, and says so.
    pub fn bind(data_dir: &Path, authenticator: Arc<Authenticator>) -> Self {
        let path = data_dir.join(LOCAL_SOCKET);
        let listener = bind(&path).inspect_err(|error| {
            tracing::warn!(path = %path.display(), %error, "no local socket: users can be managed over the network only");
        });
        Self { listener: listener.ok(), path, auth: AuthLayer::local(authenticator) }
    }

    /// Serves until `shutdown`, and then until the last request under way has ended.
    pub async fn serve(self, config: &Config, service: Service, shutdown: Shutdown) -> Result<(), RunError> {
        let Some(listener) = self.listener else { return std::future::pending().await };
        let request_bytes = config.sqlited.max_request_bytes as usize + limits::MESSAGE_SLACK_BYTES;
        let service = ReSqliteServer::new(service)
            .max_decoding_message_size(request_bytes)
            .max_encoding_message_size(usize::MAX);
        let incoming = UnixListenerStream::new(listener);
        let serving = Server::builder()
            .layer(self.auth)
            .add_service(service)
            .serve_with_incoming_shutdown(incoming, async move { shutdown.wait().await });
        serving.await?;
        // The next start removes it otherwise.
        drop(fs::remove_file(&self.path));
        // The end of the daemon is the other listener's to say: it may still have requests under way.
        std::future::pending().await
    }
}

/// Takes the place of a socket that an earlier life left behind, and of nothing else.
fn bind(path: &Path) -> io::Result<UnixListener> {
    if fs::symlink_metadata(path).is_ok_and(|left| left.file_type().is_socket()) {
        fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}
