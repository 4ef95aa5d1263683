//! One place for each metric: its name, its type, its labels or buckets, and
//! the one text that is both its documentation in the code and its `HELP` line.

use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    core::Collector, process_collector::ProcessCollector,
};

/// Buckets for what takes between a cached read and a slow disk: 0.1 ms to 13 s, each twice the one before.
pub const LATENCY_SECONDS: &[f64] = &[
    0.000_1, 0.000_2, 0.000_4, 0.000_8, 0.001_6, 0.003_2, 0.006_4, 0.012_8, 0.025_6, 0.051_2, 0.102_4,
    0.204_8, 0.409_6, 0.819_2, 1.638_4, 3.276_8, 6.553_6, 13.107_2,
];

/// Buckets for how much was done in one go: 1 to 16,384.
pub const SIZES: &[f64] =
    &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0, 16384.0];

/// A metric that is made from its name, its help and its shape (labels, buckets, or nothing).
pub trait Define<Shape>: Collector + Clone + Sized + 'static {
    /// Makes it, at zero.
    fn make(opts: Opts, shape: Shape) -> prometheus::Result<Self>;
}

impl Define<()> for IntCounter {
    fn make(opts: Opts, (): ()) -> prometheus::Result<Self> {
        Self::with_opts(opts)
    }
}

impl Define<()> for IntGauge {
    fn make(opts: Opts, (): ()) -> prometheus::Result<Self> {
        Self::with_opts(opts)
    }
}

impl Define<&[&str]> for IntCounterVec {
    fn make(opts: Opts, labels: &[&str]) -> prometheus::Result<Self> {
        Self::new(opts, labels)
    }
}

impl Define<&[&str]> for IntGaugeVec {
    fn make(opts: Opts, labels: &[&str]) -> prometheus::Result<Self> {
        Self::new(opts, labels)
    }
}

impl Define<&[f64]> for Histogram {
    fn make(opts: Opts, buckets: &[f64]) -> prometheus::Result<Self> {
        Self::with_opts(HistogramOpts::from(opts).buckets(buckets.to_vec()))
    }
}

impl Define<(&[&str], &[f64])> for HistogramVec {
    fn make(opts: Opts, (labels, buckets): (&[&str], &[f64])) -> prometheus::Result<Self> {
        Self::new(HistogramOpts::from(opts).buckets(buckets.to_vec()), labels)
    }
}

/// Makes a metric and registers it. For [`define_metrics!`](crate::define_metrics).
///
/// # Panics
/// If the name is not one, or is taken: names are constants, and every start of a daemon makes all of them.
pub fn define<Shape, M: Define<Shape>>(registry: &Registry, name: &str, help: &str, shape: Shape) -> M {
    let made = M::make(Opts::new(name, help), shape).and_then(|metric| {
        registry.register(Box::new(metric.clone()))?;
        Ok(metric)
    });
    made.unwrap_or_else(|error| panic!("the metric {name} cannot be defined: {error}"))
}

/// A registry that holds the figures of this process: `resqlite_process_*`.
pub fn registry_of_process() -> Registry {
    let registry = Registry::new();
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    let process = ProcessCollector::new(pid, "resqlite");
    registry.register(Box::new(process)).expect("a new registry has no names yet");
    registry
}

/// Defines a struct of metrics. The documentation of a field is the metric's help text:
///
/// ```
/// resqlite::define_metrics! {
///     /// What is counted here.
///     pub struct Metrics {
///         /// Requests that were answered, by how.
///         pub answers: prometheus::IntCounterVec = "resqlite_answers_total", &["code"][..];
///     }
/// }
/// let metrics = Metrics::new();
/// metrics.answers.with_label_values(&["ok"]).inc();
/// assert!(metrics.registry().gather().iter().any(|family| family.help() == "Requests that were answered, by how."));
/// ```
#[macro_export]
macro_rules! define_metrics {
    (
        $(#[$outer:meta])*
        pub struct $name:ident {
            $( $(#[doc = $help:literal])+ pub $field:ident: $kind:ty = $metric:literal $(, $shape:expr)?; )+
        }
    ) => {
        $(#[$outer])*
        #[derive(Clone, Debug)]
        pub struct $name {
            registry: prometheus::Registry,
            $( $(#[doc = $help])+ pub $field: $kind, )+
        }

        impl $name {
            /// New ones, at zero, beside the figures of the process.
            pub fn new() -> Self {
                let registry = $crate::monitoring::registry_of_process();
                Self {
                    $( $field: $crate::monitoring::define(
                        &registry, $metric, concat!($($help),+).trim(), ($($shape)?)
                    ), )+
                    registry,
                }
            }

            /// For those who ask for all of them.
            pub fn registry(&self) -> &prometheus::Registry {
                &self.registry
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self::new()
            }
        }
    };
}
