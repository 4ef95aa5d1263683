//! The command line: what `resqlite` understands, and who does it.
//!
//! Everything here stands on the client library and the configuration; nothing
//! in the daemons knows of it.

mod backup;
mod batch;
mod bench;
mod cert;
mod cluster;
mod csv;
mod dot;
mod import;
mod input;
mod interactive;
mod leader;
mod new_file;
mod node;
mod number;
mod playground;
mod progress;
mod raft;
mod render;
mod restore;
mod screen;
mod shell;
mod status;
mod user;
mod verify;

use std::{
    io::{self, IsTerminal},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::{Args, CommandFactory, Parser, Subcommand};

use self::{
    input::Input,
    render::{Format, Mode},
    shell::Shell,
};
use crate::client::{Builder, Client, ClientTlsFiles, Credentials, Error};

/// What a program that a broken pipe ended reports, as if SIGPIPE had done it.
const EXIT_BROKEN_PIPE: u8 = 128 + 13;

/// SQLite, replicated by Raft.
#[derive(Debug, Parser)]
#[command(name = "resqlite", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a cluster on this machine, and a shell or the SQL on stdin
    Playground(playground::Arguments),
    /// Run SQL: typed, from -c, -f or stdin
    Shell(ShellArguments),
    /// Show every node of the cluster
    Status(status::Arguments),
    /// Say who is to lead
    #[command(subcommand)]
    Leader(leader::Command),
    /// Compare what the nodes hold, while they serve
    Verify(verify::Arguments),
    /// Keep the whole content as of one moment in an SQLite file
    Backup(backup::BackupArguments),
    /// Write the whole content as of one moment as SQL
    Dump(backup::DumpArguments),
    /// Replace the whole content by that of an SQLite file
    Restore(restore::Arguments),
    /// Put in the rows of a CSV file, or run the statements of an SQL file
    Import(import::Arguments),
    /// Measure a cluster: a closed loop of clients
    Bench(bench::Arguments),
    /// Make certificates: for a cluster's nodes and for its clients
    #[command(subcommand)]
    Cert(cert::Command),
    /// Save what is left of a cluster
    #[command(subcommand)]
    Cluster(cluster::Command),
    /// Replace a node whose data is damaged or lost
    #[command(subcommand)]
    Node(node::Command),
    /// Say who may do what
    #[command(subcommand)]
    User(user::Command),
    /// Turn on or off that everybody must say who they are
    Auth(user::AuthArguments),
    /// Print a bearer token for the user of --user, to be kept in a file
    Login(user::LoginArguments),
    /// Speak to a raftd that has no sqlited
    #[command(subcommand)]
    Raft(raft::Command),
}

/// Where the cluster is.
#[derive(Debug, Args)]
struct Endpoints {
    /// Addresses of nodes; the first is asked first, the others when it fails
    #[arg(long, env = "RESQLITE_ENDPOINTS", value_name = "HOST:PORT,…", value_delimiter = ',')]
    #[arg(default_value = "127.0.0.1:50051")]
    endpoints: Vec<String>,
    #[command(flatten)]
    tls: TlsFiles,
}

/// How to know the nodes, and be known to them. Without a CA, plain text is spoken.
#[derive(Clone, Debug, Default, Args)]
struct TlsFiles {
    /// Speak TLS, to servers that this CA has signed
    #[arg(long, env = "RESQLITE_CA", value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Show this certificate, to servers that want one
    #[arg(long, env = "RESQLITE_CERT", value_name = "FILE", requires_all = ["ca", "key"])]
    cert: Option<PathBuf>,
    /// The private key of that certificate
    #[arg(long, env = "RESQLITE_KEY", value_name = "FILE", requires = "cert")]
    key: Option<PathBuf>,
    /// Say that this is me; the password is asked for, or in --password-file
    #[arg(long, env = "RESQLITE_USER", value_name = "NAME")]
    user: Option<String>,
    /// The first line of this file is my password
    #[arg(long, env = "RESQLITE_PASSWORD_FILE", value_name = "FILE", requires = "user")]
    password_file: Option<PathBuf>,
    /// The first line of this file is my token, from `resqlite login`
    #[arg(long, env = "RESQLITE_TOKEN_FILE", value_name = "FILE", conflicts_with = "user")]
    token_file: Option<PathBuf>,
}

impl TlsFiles {
    /// What every client of this command is built from.
    fn builder(&self) -> Builder {
        let files = self.ca.as_ref().map(ClientTlsFiles::new);
        let files = match (files, &self.cert, &self.key) {
            (Some(files), Some(cert), Some(key)) => Some(files.identity(cert, key)),
            (files, ..) => files,
        };
        Client::builder().tls(files).credentials(self.credentials())
    }

    fn credentials(&self) -> Option<Credentials> {
        if let Some(file) = &self.token_file {
            return Some(Credentials::TokenFile(file.clone()));
        }
        let user = self.user.clone()?;
        Some(match &self.password_file {
            Some(file) => Credentials::PasswordFile { user, file: file.clone() },
            None => {
                let asked = rpassword::prompt_password(format!("Password of {user}: "));
                // Without a password the cluster says what is wrong; why there is none, only we can.
                let password = asked.unwrap_or_else(|error| {
                    eprintln!("cannot ask for the password: {error}: use --password-file");
                    String::new()
                });
                Credentials::Password { user, password }
            }
        })
    }
}

impl Endpoints {
    /// A client of all of them.
    fn builder(&self) -> Builder {
        self.tls.builder().endpoints(&self.endpoints)
    }
}

#[derive(Debug, Args)]
struct ShellArguments {
    #[command(flatten)]
    cluster: Endpoints,
    /// How results are laid out [default: table on a terminal, else list]
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    /// Show the columns' names in list, csv and column mode
    #[arg(long)]
    headers: bool,
    /// Run this SQL; may be repeated
    #[arg(short, value_name = "SQL")]
    command: Vec<String>,
    /// Run the SQL in this file; may be repeated, after every -c
    #[arg(short, value_name = "FILE")]
    file: Vec<PathBuf>,
}

/// What `resqlite` understands: manual pages and completions are made from it.
pub fn command() -> clap::Command {
    Arguments::command()
}

/// The whole program: parses the arguments, does it, and says how it went.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // One thread: what a client waits for is the network. Blocking work has threads of its own.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("cannot start: {error}")),
    };
    let code = runtime.block_on(run(arguments.command));
    // A thread may still be reading stdin; nobody waits for what it reads.
    runtime.shutdown_background();
    code
}

async fn run(command: Command) -> ExitCode {
    match command {
        Command::Playground(arguments) => playground::run(arguments).await,
        Command::Shell(arguments) => run_shell(arguments).await,
        Command::Status(arguments) => status::run(arguments).await,
        Command::Leader(command) => leader::run(command).await,
        Command::Verify(arguments) => verify::run(arguments).await,
        Command::Backup(arguments) => backup::run_backup(arguments).await,
        Command::Dump(arguments) => backup::run_dump(arguments).await,
        Command::Restore(arguments) => restore::run(arguments).await,
        Command::Import(arguments) => import::run(arguments).await,
        Command::Bench(arguments) => bench::run(arguments).await,
        Command::Cert(command) => cert::run(command),
        Command::Cluster(command) => cluster::run(command),
        Command::Node(command) => node::run(command),
        Command::User(command) => user::run(command).await,
        Command::Auth(arguments) => user::run_auth(arguments).await,
        Command::Login(arguments) => user::run_login(arguments).await,
        Command::Raft(command) => raft::run(command).await,
    }
}

fn fail(message: &str) -> ExitCode {
    eprintln!("Error: {message}");
    ExitCode::FAILURE
}

/// Results on a terminal are for reading, others for the next program; as sqlite3 has it.
fn format_of(mode: Option<Mode>, headers: bool) -> Format {
    let mut format = Format::option(mode.unwrap_or(Mode::List));
    if mode.is_none() && io::stdout().is_terminal() {
        format.set_mode(Mode::Table);
    }
    if headers {
        format.set_headers(true);
    }
    format
}

/// The client of a shell: a query may take as long as it likes, a cluster that is gone may not.
async fn connect(builder: Builder) -> Result<Client, Error> {
    builder.deadline(None).retry_for(Duration::from_secs(30)).connect().await
}

async fn run_shell(arguments: ShellArguments) -> ExitCode {
    let client = match connect(arguments.cluster.builder()).await {
        Ok(client) => client,
        Err(error) => return fail(&error.to_string()),
    };
    let shell = Shell::new(client, format_of(arguments.mode, arguments.headers));
    if arguments.command.is_empty() && arguments.file.is_empty() {
        return run_stdin(shell).await;
    }
    let texts = arguments.command.iter().map(|text| shell::Job::Text(text));
    let files = arguments.file.iter().map(|path| shell::Job::File(path));
    shell.run_all(texts.chain(files)).await
}

/// A person at a terminal gets prompts; a program's statements are run as they come.
async fn run_stdin(shell: Shell) -> ExitCode {
    if io::stdin().is_terminal() {
        interactive::run(shell).await
    } else {
        shell.run_all([shell::Job::Input(Input::stdin())]).await
    }
}
