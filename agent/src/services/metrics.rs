//! Numbers of Services, under the names that users of kube-proxy know where they mean the same.

use crate::metrics::Register;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets, linear_buckets};
use prometheus_client::registry::Registry;

use crate::maps::Room;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Map {
    map: &'static str,
}

/// The numbers; cheap to clone, all clones are the same.
#[derive(Clone, Debug)]
pub struct Metrics {
    pub(super) sync_seconds: Histogram,
    pub(super) programming_seconds: Histogram,
    pub(super) service_changes: Counter,
    pub(super) endpoint_changes: Counter,
    pub(super) services: Gauge,
    pub(super) lacking: Gauge,
    pub(super) full: Counter,
    pub(super) failures: Counter,
    pub(super) backends: Gauge,
    pub(super) last_sync: Gauge<f64, std::sync::atomic::AtomicU64>,
    used: Family<Map, Gauge>,
    room: Family<Map, Gauge>,
}

impl Default for Metrics {
    fn default() -> Self {
        let programming = linear_buckets(0.25, 0.25, 2)
            .chain(linear_buckets(1.0, 1.0, 59))
            .chain(linear_buckets(60.0, 5.0, 12))
            .chain(linear_buckets(120.0, 30.0, 7));
        Self {
            sync_seconds: Histogram::new(exponential_buckets(0.001, 2.0, 15)),
            programming_seconds: Histogram::new(programming),
            service_changes: Counter::default(),
            endpoint_changes: Counter::default(),
            services: Gauge::default(),
            lacking: Gauge::default(),
            full: Counter::default(),
            failures: Counter::default(),
            backends: Gauge::default(),
            last_sync: Gauge::default(),
            used: Family::default(),
            room: Family::default(),
        }
    }
}

impl Register for Metrics {
    fn register(&self, registry: &mut Registry) {
        registry.register(
            "kubeproxy_sync_proxy_rules_duration_seconds",
            "How long it takes to bring the kernel in step with what changed",
            self.sync_seconds.clone(),
        );
        registry.register(
            "kubeproxy_network_programming_duration_seconds",
            "From a change of a pod or Service until the kernel obeys it",
            self.programming_seconds.clone(),
        );
        // The library adds `_total`.
        registry.register(
            "kubeproxy_sync_proxy_rules_service_changes",
            "Changes of Services",
            self.service_changes.clone(),
        );
        registry.register(
            "kubeproxy_sync_proxy_rules_endpoint_changes",
            "Changes of EndpointSlices",
            self.endpoint_changes.clone(),
        );
        registry.register(
            "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
            "When the kernel was last brought in step",
            self.last_sync.clone(),
        );
        registry.register(
            "xebec_services",
            "Services that have frontends",
            self.services.clone(),
        );
        registry.register(
            "xebec_services_lacking_room",
            "Services that do not fit into the kernel's maps",
            self.lacking.clone(),
        );
        registry.register(
            "xebec_services_dataplane_full",
            "How often a Service did not fit",
            self.full.clone(),
        );
        registry.register(
            "xebec_services_write_failures",
            "Writes to the kernel's maps that failed",
            self.failures.clone(),
        );
        registry.register(
            "xebec_backends",
            "Backends of all Services, each counted once",
            self.backends.clone(),
        );
        registry.register(
            "xebec_services_map_entries",
            "Entries in use of the maps of Services",
            self.used.clone(),
        );
        registry.register(
            "xebec_services_map_capacity",
            "Entries that the maps of Services have room for",
            self.room.clone(),
        );
    }
}

impl Metrics {
    /// Notes how full the maps are.
    pub(super) fn set_room(&self, used: Room, room: Room) {
        let all = |room: Room| {
            [
                ("frontends", room.frontends),
                ("slots", room.chunks),
                ("backends", room.backends),
                ("ranges", room.ranges),
            ]
        };
        for (family, room) in [(&self.used, used), (&self.room, room)] {
            for (map, count) in all(room) {
                family.get_or_create(&Map { map }).set(i64::from(count));
            }
        }
    }
}
