//! `resqlite user`, `auth` and `login`: who may do what, and whether anybody asks.
//!
//! A password is typed without being shown, or is the first line of a file; it is never an argument, which
//! other users of the host could see.

use std::{
    fs,
    io::{self, Read, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use super::{Endpoints, connect, fail};
use crate::{
    api::{AddUser, RightsChange, SetPassword},
    client::{Change, Client, Error, Rights, Role},
};

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Make a user
    Add {
        #[command(flatten)]
        cluster: Endpoints,
        /// The new user's name: what a client's certificate says, if it is to be known by one
        name: String,
        #[command(flatten)]
        rights: RightsArguments,
        #[command(flatten)]
        password: NewPassword,
    },
    /// Set a user's password anew, which ends their tokens
    Password {
        #[command(flatten)]
        cluster: Endpoints,
        /// Whose
        name: String,
        #[command(flatten)]
        password: NewPassword,
    },
    /// Let a user do more
    Grant {
        #[command(flatten)]
        cluster: Endpoints,
        /// Who
        name: String,
        #[command(flatten)]
        rights: RightsArguments,
    },
    /// Let a user do less
    Revoke {
        #[command(flatten)]
        cluster: Endpoints,
        /// Who
        name: String,
        #[command(flatten)]
        rights: RightsArguments,
    },
    /// Show all users and what they may do
    List {
        #[command(flatten)]
        cluster: Endpoints,
    },
    /// Remove a user
    Remove {
        #[command(flatten)]
        cluster: Endpoints,
        /// Who
        name: String,
    },
}

/// Rights, as they are given and taken.
#[derive(Debug, clap::Args)]
pub struct RightsArguments {
    /// What they may do everywhere; may be repeated
    #[arg(long = "role", value_name = "ROLE")]
    roles: Vec<RoleName>,
    /// A table that they may read; may be repeated
    #[arg(long = "read-table", value_name = "TABLE")]
    read_tables: Vec<String>,
    /// A table that they may read and change; may be repeated
    #[arg(long = "write-table", value_name = "TABLE")]
    write_tables: Vec<String>,
}

/// A role, by its name.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum RoleName {
    /// Everything, the users included
    Admin,
    /// Read and change every table, and the schema
    Write,
    /// Read every table
    Read,
    /// Take backups
    Backup,
}

impl RightsArguments {
    fn rights(self) -> Rights {
        let role = |role: RoleName| match role {
            RoleName::Admin => Role::Admin,
            RoleName::Write => Role::Write,
            RoleName::Read => Role::Read,
            RoleName::Backup => Role::Backup,
        };
        Rights {
            roles: self.roles.into_iter().map(|name| role(name).into()).collect(),
            read_tables: self.read_tables,
            write_tables: self.write_tables,
        }
    }
}

/// Where a new password comes from; asked for at the terminal unless said otherwise.
#[derive(Debug, clap::Args)]
pub struct NewPassword {
    /// The first line of this file is the new password; - is stdin
    #[arg(long, value_name = "FILE", conflicts_with = "no_password")]
    new_password_file: Option<PathBuf>,
    /// No password: known by a client certificate only
    #[arg(long)]
    no_password: bool,
}

#[derive(Debug, clap::Args)]
pub struct AuthArguments {
    #[command(flatten)]
    cluster: Endpoints,
    /// Whether everybody must say who they are
    #[arg(value_enum)]
    state: Switch,
}

/// On or off.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Switch {
    /// Refuse who does not
    On,
    /// Let everybody do everything
    Off,
}

#[derive(Debug, clap::Args)]
pub struct LoginArguments {
    #[command(flatten)]
    cluster: Endpoints,
    /// For how long the token is good
    #[arg(long, value_name = "H", default_value_t = 12, value_parser = clap::value_parser!(u64).range(1..=720))]
    hours: u64,
}

/// Why nothing was changed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Cluster(#[from] Error),
    #[error("cannot read the new password: {0}")]
    Password(io::Error),
    #[error("the two passwords differ: nothing was changed")]
    Differ,
    #[error("cannot write the answer: {0}")]
    Output(#[from] io::Error),
}

/// Runs `resqlite user`.
pub async fn run(command: Command) -> ExitCode {
    report(change_or_list(command).await)
}

/// Runs `resqlite auth`.
pub async fn run_auth(arguments: AuthArguments) -> ExitCode {
    let change = Change::RequireAuthentication(matches!(arguments.state, Switch::On));
    report(change_users(&arguments.cluster, change).await)
}

/// Runs `resqlite login`.
pub async fn run_login(arguments: LoginArguments) -> ExitCode {
    let login = async {
        let client = connect(arguments.cluster.builder()).await?;
        let token = client.login(Some(Duration::from_secs(arguments.hours * 3_600))).await?;
        Ok(writeln!(io::stdout(), "{token}")?)
    };
    report(login.await)
}

fn report(outcome: Result<(), Failure>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => fail(&failure.to_string()),
    }
}

async fn change_or_list(command: Command) -> Result<(), Failure> {
    let (cluster, change) = match command {
        Command::Add { cluster, name, rights, password } => {
            let password = new_password(&name, password)?;
            (cluster, Change::Add(AddUser { name, password, rights: Some(rights.rights()) }))
        }
        Command::Password { cluster, name, password } => {
            let password = new_password(&name, password)?;
            (cluster, Change::Password(SetPassword { name, password }))
        }
        Command::Grant { cluster, name, rights } => {
            (cluster, Change::Grant(RightsChange { name, rights: Some(rights.rights()) }))
        }
        Command::Revoke { cluster, name, rights } => {
            (cluster, Change::Revoke(RightsChange { name, rights: Some(rights.rights()) }))
        }
        Command::Remove { cluster, name } => (cluster, Change::Remove(name)),
        Command::List { cluster } => return list(&connect(cluster.builder()).await?).await,
    };
    change_users(&cluster, change).await
}

async fn change_users(cluster: &Endpoints, change: Change) -> Result<(), Failure> {
    Ok(connect(cluster.builder()).await?.change_users(change).await?)
}

/// One user a line: the name, and what they may do.
async fn list(client: &Client) -> Result<(), Failure> {
    let answer = client.list_users().await?;
    let mut out = io::stdout().lock();
    writeln!(out, "authentication: {}", if answer.authentication_required { "on" } else { "off" })?;
    for user in answer.users {
        let rights = user.rights.unwrap_or_default();
        let mut words: Vec<String> = rights.roles().map(|role| role_name(role).to_owned()).collect();
        words.extend(rights.read_tables.iter().map(|table| format!("read {table}")));
        words.extend(rights.write_tables.iter().map(|table| format!("write {table}")));
        let known_by = if user.has_password { "" } else { " (no password)" };
        writeln!(out, "{}{known_by}: {}", user.name, words.join(", "))?;
    }
    Ok(())
}

fn role_name(role: Role) -> &'static str {
    match role {
        Role::Admin => "admin",
        Role::Write => "write",
        Role::Read => "read",
        Role::Backup => "backup",
        Role::Unspecified => "?",
    }
}

fn new_password(name: &str, source: NewPassword) -> Result<String, Failure> {
    if source.no_password {
        return Ok(String::new());
    }
    if let Some(file) = source.new_password_file {
        return first_line(&file).map_err(Failure::Password);
    }
    let ask = |prompt: String| rpassword::prompt_password(prompt).map_err(Failure::Password);
    let password = ask(format!("New password of {name}: "))?;
    if ask("Once more: ".to_owned())? != password {
        return Err(Failure::Differ);
    }
    Ok(password)
}

fn first_line(file: &Path) -> io::Result<String> {
    let text = if file == Path::new("-") {
        let mut text = String::new();
        io::stdin().read_to_string(&mut text)?;
        text
    } else {
        fs::read_to_string(file)?
    };
    let line = text.lines().next().unwrap_or_default();
    // An empty one would mean: none at all.
    if line.is_empty() { Err(io::Error::other("its first line is empty")) } else { Ok(line.to_owned()) }
}
