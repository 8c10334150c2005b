//! `/metrics` in the Prometheus text format, under upstream's names.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Upper bounds of `apiserver_request_duration_seconds`, as upstream has them.
const BUCKETS: &[f64] = &[
    0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0,
    10.0, 15.0, 20.0, 30.0, 45.0, 60.0,
];

/// Labels of a request.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Labels {
    pub verb: String,
    pub group: &'static str,
    pub version: &'static str,
    pub resource: &'static str,
    pub subresource: String,
    pub scope: &'static str,
}

#[derive(Default)]
struct Histogram {
    buckets: Vec<u64>,
    sum: f64,
    count: u64,
}

/// All counters of the server.
#[derive(Default)]
pub(crate) struct Metrics {
    requests: Mutex<BTreeMap<(Labels, u16), u64>>,
    durations: Mutex<BTreeMap<Labels, Histogram>>,
    inflight_reading: AtomicI64,
    inflight_mutating: AtomicI64,
    watches: AtomicI64,
}

/// Counts one up, and down again when dropped.
pub(crate) struct Guard<'a>(&'a AtomicI64);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Metrics {
    pub(crate) fn inflight(&self, mutating: bool) -> Guard<'_> {
        let gauge = if mutating {
            &self.inflight_mutating
        } else {
            &self.inflight_reading
        };
        gauge.fetch_add(1, Ordering::Relaxed);
        Guard(gauge)
    }

    pub(crate) fn watch_started(&self) {
        self.watches.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn watch_ended(&self) {
        self.watches.fetch_sub(1, Ordering::Relaxed);
    }

    pub(crate) fn record(&self, labels: Labels, code: u16, took: Duration, long_running: bool) {
        let lock = PoisonError::into_inner;
        *self
            .requests
            .lock()
            .unwrap_or_else(lock)
            .entry((labels.clone(), code))
            .or_default() += 1;
        if long_running {
            return;
        }
        let mut durations = self
            .durations
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let histogram = durations.entry(labels).or_default();
        histogram.buckets.resize(BUCKETS.len(), 0);
        let seconds = took.as_secs_f64();
        for (bucket, bound) in histogram.buckets.iter_mut().zip(BUCKETS) {
            *bucket += u64::from(seconds <= *bound);
        }
        histogram.sum += seconds;
        histogram.count += 1;
    }

    pub(crate) fn render(&self, store_bytes: u64) -> String {
        let mut out = String::new();
        let text = |labels: &Labels| {
            format!(
                "component=\"apiserver\",group=\"{}\",resource=\"{}\",scope=\"{}\",subresource=\"{}\",verb=\"{}\",version=\"{}\"",
                labels.group,
                labels.resource,
                labels.scope,
                labels.subresource,
                labels.verb,
                labels.version
            )
        };
        // Writing to a string can't fail.
        let mut line = |line: String| writeln!(out, "{line}").unwrap_or_default();
        line("# HELP apiserver_request_total Counter of apiserver requests.\n# TYPE apiserver_request_total counter".into());
        for ((labels, code), count) in self
            .requests
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
        {
            line(format!(
                "apiserver_request_total{{code=\"{code}\",dry_run=\"\",{}}} {count}",
                text(labels)
            ));
        }
        line("# HELP apiserver_request_duration_seconds Response latency distribution in seconds.\n# TYPE apiserver_request_duration_seconds histogram".into());
        for (labels, histogram) in self
            .durations
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
        {
            for (count, bound) in histogram.buckets.iter().zip(BUCKETS) {
                line(format!(
                    "apiserver_request_duration_seconds_bucket{{dry_run=\"\",{},le=\"{bound}\"}} {count}",
                    text(labels)
                ));
            }
            line(format!(
                "apiserver_request_duration_seconds_bucket{{dry_run=\"\",{},le=\"+Inf\"}} {}",
                text(labels),
                histogram.count
            ));
            line(format!(
                "apiserver_request_duration_seconds_sum{{dry_run=\"\",{}}} {}",
                text(labels),
                histogram.sum
            ));
            line(format!(
                "apiserver_request_duration_seconds_count{{dry_run=\"\",{}}} {}",
                text(labels),
                histogram.count
            ));
        }
        line("# HELP apiserver_current_inflight_requests Requests being served now.\n# TYPE apiserver_current_inflight_requests gauge".into());
        for (kind, gauge) in [
            ("mutating", &self.inflight_mutating),
            ("readOnly", &self.inflight_reading),
        ] {
            line(format!(
                "apiserver_current_inflight_requests{{request_kind=\"{kind}\"}} {}",
                gauge.load(Ordering::Relaxed)
            ));
        }
        line("# HELP apiserver_longrunning_requests Watches and streams being served now.\n# TYPE apiserver_longrunning_requests gauge".into());
        line(format!(
            "apiserver_longrunning_requests{{component=\"apiserver\",verb=\"WATCH\"}} {}",
            self.watches.load(Ordering::Relaxed)
        ));
        line("# HELP apiserver_storage_size_bytes Size of the storage database file physically allocated in bytes.\n# TYPE apiserver_storage_size_bytes gauge".into());
        line(format!(
            "apiserver_storage_size_bytes{{storage_cluster_id=\"embedded\"}} {store_bytes}"
        ));
        out
    }
}
