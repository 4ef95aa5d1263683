use super::*;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::Instant,
};

crate::define_metrics! {
    /// One metric.
    pub struct Figures {
        /// Things that were counted,
        /// one by one.
        pub things: prometheus::IntCounter = "resqlite_things_total";
    }
}

struct Daemon {
    figures: Figures,
    failure: Option<String>,
}

impl Monitored for Daemon {
    async fn metrics(&self) -> &Registry {
        self.figures.things.inc();
        self.figures.registry()
    }

    async fn live(&self) -> Vec<Check> {
        vec![Check::new("loop", None)]
    }

    async fn ready(&self) -> Vec<Check> {
        vec![Check::new("loop", None), Check::new("leader", self.failure.clone())]
    }
}

/// A daemon that is not ready, on a port of its own.
async fn start() -> SocketAddr {
    let listener = bind(Some(([127, 0, 0, 1], 0).into())).await.unwrap().unwrap();
    let address = listener.local_addr().unwrap();
    let daemon = Daemon { figures: Figures::new(), failure: Some("none is known".into()) };
    tokio::spawn(serve(Some(listener), daemon));
    address
}

/// Sends this and reads until the server closes.
async fn exchange(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    // A refusal may come with a reset, for nobody reads what was too much.
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8(answer).unwrap()
}

async fn get(address: SocketAddr, path: &str) -> String {
    exchange(address, &format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n")).await
}

#[tokio::test]
async fn metrics_come_in_the_text_format_with_their_help() {
    let answer = get(start().await, "/metrics").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("content-type: text/plain; version=0.0.4"), "{answer}");
    assert!(
        answer.contains("# HELP resqlite_things_total Things that were counted, one by one.\n"),
        "{answer}"
    );
    assert!(answer.contains("\nresqlite_things_total 1\n"), "{answer}");
    assert!(answer.contains("\nresqlite_process_resident_memory_bytes "), "{answer}");
}

#[tokio::test]
async fn a_failed_check_is_named_and_makes_the_whole_unavailable() {
    let address = start().await;
    let live = get(address, "/livez").await;
    assert!(live.starts_with("HTTP/1.1 200") && live.ends_with("\r\n\r\n[+]loop ok\n"), "{live}");
    let ready = get(address, "/readyz").await;
    assert!(ready.starts_with("HTTP/1.1 503"), "{ready}");
    assert!(ready.ends_with("[+]loop ok\n[-]leader failed: none is known\n"), "{ready}");
}

#[tokio::test]
async fn anything_else_is_refused_with_words() {
    let address = start().await;
    assert!(get(address, "/").await.starts_with("HTTP/1.1 404"));
    let posted = exchange(address, "POST /metrics HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n").await;
    assert!(posted.starts_with("HTTP/1.1 405") && posted.contains("allow: GET, HEAD"), "{posted}");
    let huge = format!("GET /metrics HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "y".repeat(2 * MAX_HEAD_BYTES));
    let refused = exchange(address, &huge).await;
    assert!(refused.is_empty() || refused.starts_with("HTTP/1.1 431"), "{refused}");
}

/// Real time, for sockets do not know of a paused clock: the test takes as long as a head may.
#[tokio::test]
async fn those_who_say_nothing_are_closed_and_others_are_served_then() {
    let address = start().await;
    let mut silent = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    let began = Instant::now();
    assert!(get(address, "/livez").await.starts_with("HTTP/1.1 200"));
    assert!(began.elapsed() < MAX_REQUEST_TIME, "{:?}", began.elapsed());
    for mut stream in silent {
        // Zero bytes: the server has closed it.
        assert_eq!(timeout(MAX_REQUEST_TIME, stream.read(&mut [0; 1])).await.unwrap().unwrap_or(0), 0);
    }
}
