//! What the process itself costs, under the names that all Prometheus clients use.

use std::fmt::Error;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

/// Read from /proc when somebody asks.
#[derive(Debug)]
pub(super) struct Process;

/// What /proc/self/stat and its neighbours tell.
#[derive(Debug, Default, PartialEq)]
struct Usage {
    cpu_seconds: f64,
    start_seconds: f64,
    virtual_bytes: u64,
    resident_bytes: u64,
}

/// Of the numbers in /proc/self/stat; `boot` is when the machine started, in seconds of the epoch.
fn usage(stat: &str, boot: f64, ticks: f64, page: u64) -> Option<Usage> {
    // The second field is the name in parentheses, which may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    // The first of these is the third of proc_pid_stat(5).
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    Some(Usage {
        cpu_seconds: (number(14)? + number(15)?) as f64 / ticks,
        start_seconds: boot + number(22)? as f64 / ticks,
        virtual_bytes: number(23)?,
        resident_bytes: number(24)? * page,
    })
}

fn read() -> Option<Usage> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let all = std::fs::read_to_string("/proc/stat").ok()?;
    let boot = all.lines().find_map(|line| line.strip_prefix("btime "))?;
    let of = |name| nix::unistd::sysconf(name).ok().flatten();
    let ticks = of(nix::unistd::SysconfVar::CLK_TCK)? as f64;
    let page = u64::try_from(of(nix::unistd::SysconfVar::PAGE_SIZE)?).ok()?;
    usage(&stat, boot.trim().parse().ok()?, ticks, page)
}

fn max_fds() -> Option<u64> {
    let limits = std::fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), Error> {
        let mut gauge = |name: &str, help: &str, value: f64| {
            let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            ConstGauge::new(value).encode(metric)
        };
        if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
            let open = open.count() as f64;
            gauge("process_open_fds", "Number of open file descriptors", open)?;
        }
        if let Some(most) = max_fds() {
            let help = "Maximum number of open file descriptors";
            gauge("process_max_fds", help, most as f64)?;
        }
        let Some(usage) = read() else {
            return Ok(());
        };
        let resident = usage.resident_bytes as f64;
        gauge(
            "process_resident_memory_bytes",
            "Resident memory size in bytes",
            resident,
        )?;
        let size = usage.virtual_bytes as f64;
        gauge(
            "process_virtual_memory_bytes",
            "Virtual memory size in bytes",
            size,
        )?;
        let start = usage.start_seconds;
        let help = "Start time of the process since unix epoch in seconds";
        gauge("process_start_time_seconds", help, start)?;
        let help = "Total user and system CPU time spent in seconds";
        let metric =
            encoder.encode_descriptor("process_cpu_seconds", help, None, MetricType::Counter)?;
        ConstCounter::new(usage.cpu_seconds).encode(metric)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_a_strange_name_is_read() {
        let stat = "7 (a) b) (c) S 1 7 7 0 -1 4194560 100 0 0 0 150 50 0 0 20 0 4 0 1000 4096000 25 18446744073709551615 1";
        let found = usage(stat, 1_000.0, 100.0, 4_096).unwrap();
        assert_eq!(
            found,
            Usage {
                cpu_seconds: 2.0,
                start_seconds: 1_010.0,
                virtual_bytes: 4_096_000,
                resident_bytes: 102_400,
            }
        );
        assert_eq!(usage("no stat", 0.0, 100.0, 1), None);
        let mut registry = prometheus_client::registry::Registry::default();
        registry.register_collector(Box::new(Process));
        let text = super::super::encode(&registry).unwrap();
        for name in [
            "process_cpu_seconds_total ",
            "process_resident_memory_bytes ",
            "process_open_fds ",
        ] {
            assert!(text.contains(&format!("\n{name}")), "{text}");
        }
        assert!(read().unwrap().resident_bytes > 0 && max_fds().is_some());
    }
}
