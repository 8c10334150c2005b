//! How fast Services go into the kernel's real maps, and how much memory they take. Needs root; run it with
//! `CARGO_PROFILE_TEST_OPT_LEVEL=3 cargo test -p xebec-agent --lib services::tests::measure -- --ignored --nocapture`.

use std::time::Instant;

use serde_json::json;

use crate::maps::{Room, ServiceMaps};
use crate::services::objects::{EndpointSlice, Service};
use crate::services::tables::Tables;

const ENDPOINTS: usize = 10;

/// Bytes that are allocated, with what the allocator adds.
fn allocated() -> usize {
    // SAFETY: it only reads the allocator's counters.
    let info = unsafe { libc::mallinfo2() };
    info.uordblks + info.hblkhd
}

fn objects(number: usize, endpoints: usize) -> (Service, EndpointSlice) {
    let (high, low) = (number / 250, number % 250 + 1);
    let service = json!({
        "metadata": {
            "namespace": "default", "name": format!("service-{number}"),
            "uid": "0b8a2c1e-5a63-4a3b-9c52-0d3c1f0e9a11", "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {
            "clusterIPs": [format!("10.{}.{}.{low}", 96 + high / 250, high % 250)],
            "ports": [{"name": "http", "port": 80, "targetPort": 8080}],
        },
    });
    let ends = (0..endpoints).map(|at| {
        let all = number * endpoints + at;
        let ip = format!("11.{}.{}.{}", all / 62_500, all / 250 % 250, all % 250 + 1);
        json!({
            "addresses": [ip], "nodeName": format!("node-{}", all % 100), "zone": format!("z{}", all % 3),
            "conditions": {"ready": true, "serving": true, "terminating": false},
        })
    });
    let slice = json!({
        "metadata": {
            "namespace": "default", "name": format!("service-{number}-x7k2p"),
            "labels": {"kubernetes.io/service-name": format!("service-{number}")},
        },
        "addressType": "IPv4", "endpoints": ends.collect::<Vec<_>>(),
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    });
    (
        serde_json::from_value(service).unwrap(),
        serde_json::from_value(slice).unwrap(),
    )
}

#[test]
#[ignore = "needs root, and an optimised build for its numbers to mean anything"]
fn services_per_second_and_bytes() {
    let room = Room {
        frontends: 1 << 18,
        chunks: 1 << 18,
        backends: 1 << 21,
        ranges: 1024,
    };
    for count in [1_000, 10_000, 100_000] {
        let maps = ServiceMaps::standalone(room).unwrap();
        let before = allocated();
        let mut tables = Tables::new(maps, "node-1", Vec::new());
        let mut took = std::time::Duration::ZERO;
        // In parts, so that the objects, which the watch drops at once, do not count.
        for part in 0..count / 1000 {
            let all: Vec<_> = (0..1000)
                .map(|one| objects(part * 1000 + one, ENDPOINTS))
                .collect();
            let began = Instant::now();
            for (service, slice) in &all {
                tables.set_service(service);
                tables.set_slice(slice);
            }
            tables.sync(Instant::now()).unwrap();
            took += began.elapsed();
        }
        let bytes = allocated() - before;
        println!(
            "{count} Services of {ENDPOINTS} endpoints: {:.0} Services/s, {} bytes a Service",
            count as f64 / took.as_secs_f64(),
            bytes / count
        );
        assert_eq!(tables.used().frontends as usize, count);
        // One endpoint's change, with that many Services there.
        let began = Instant::now();
        for round in 0..1000 {
            let (_, slice) = objects(round % count, ENDPOINTS - 1 - round % 2);
            tables.set_slice(&slice);
            tables.sync(Instant::now()).unwrap();
        }
        println!(
            "  a change, decoded and written: {:?}",
            began.elapsed() / 1000
        );
        // What the kernel has is what was meant.
        let rows = tables.rows();
        assert_eq!(rows.len(), count);
        let backends = rows[0]["inside"].as_array().unwrap();
        let (service, _) = objects(0, 0);
        let spec = service.fields.unwrap().spec;
        let ip: std::net::IpAddr = spec.cluster_ips.unwrap()[0].parse().unwrap();
        let key = xebec_dataplane_common::service::FrontendKey {
            address: ip.into(),
            port: 80_u16.to_be(),
            protocol: 6,
            pad: 0,
        };
        let frontend = tables.kernel.frontend(key).unwrap().unwrap();
        let chunk = tables.kernel.chunk(frontend.inside.first).unwrap();
        assert_eq!(frontend.inside.count as usize, backends.len());
        for (number, row) in chunk.iter().zip(backends) {
            assert_eq!(row["number"], *number);
            let backend = tables.kernel.backend(*number).unwrap();
            let ip = std::net::IpAddr::from(backend.address);
            let text = std::net::SocketAddr::new(ip, u16::from_be(backend.port)).to_string();
            assert_eq!(row["backend"], text);
        }
    }
}
