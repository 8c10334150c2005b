//! Services as rows for the command line, made when they are asked for.

use std::net::{IpAddr, SocketAddr};

use serde_json::{Value, json};
use xebec_dataplane_common::service::{
    DIRECT_RETURN, DROP_INSIDE, DROP_OUTSIDE, EXTERNAL, FrontendKey, HASH_INSIDE, HASH_OUTSIDE,
    KEEP_SOURCE, SOURCE_RANGES, THIS_NODE,
};

use super::pool::LOCAL;
use super::select::TERMINATING;
use super::tables::{Entry, Source, Tables};
use super::unit::{Unit, target};
use super::view::protocol_name;
use super::wanted::{Front, Wanted};
use crate::maps::ServiceKernel;

/// Address, port and protocol as text.
pub fn frontend_text(key: &FrontendKey) -> String {
    let address = SocketAddr::new(IpAddr::from(key.address), u16::from_be(key.port));
    format!("{address}/{}", protocol_name(key.protocol))
}

fn flag_names(flags: u32) -> Vec<&'static str> {
    [
        (HASH_INSIDE, "hash-inside"),
        (HASH_OUTSIDE, "hash-outside"),
        (SOURCE_RANGES, "source-ranges"),
        (KEEP_SOURCE, "keep-source"),
        (DROP_INSIDE, "drop-inside"),
        (DROP_OUTSIDE, "drop-outside"),
        (EXTERNAL, "external"),
        (DIRECT_RETURN, "direct-return"),
        (THIS_NODE, "this-node"),
    ]
    .into_iter()
    .filter(|(flag, _)| flags & flag != 0)
    .map(|(_, name)| name)
    .collect()
}

impl<K: ServiceKernel> Tables<K> {
    /// One row a frontend, and one for each Service that has faults.
    pub fn rows(&self) -> Vec<Value> {
        let mut entries: Vec<&Entry> = self.entries.iter().map(|(_, entry)| entry).collect();
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        let mut rows = Vec::new();
        for entry in entries {
            for wanted in entry.wanted(&self.places) {
                let unit = entry.units.iter().find(|unit| unit.is_of(&wanted));
                for front in &wanted.fronts {
                    rows.push(self.row(entry, &wanted, unit, front));
                }
            }
            let slices = entry
                .slices
                .iter()
                .filter_map(|(_, slice)| slice.problems.as_deref());
            let own = entry
                .service()
                .map_or(&[][..], |view| &view.extra().problems);
            for problem in own.iter().chain(slices.flatten()) {
                rows.push(json!({
                    "service": entry.name, "port": "", "type": "", "frontend": "", "number": 0,
                    "algorithm": {"inside": "", "outside": ""}, "affinity_seconds": 0, "flags": [],
                    "inside": [], "outside": [], "state": format!("invalid: {problem}"),
                }));
            }
        }
        rows
    }

    fn row(&self, entry: &Entry, wanted: &Wanted, unit: Option<&Unit>, front: &Front) -> Value {
        let port = match &entry.source {
            Source::Service(view) => &*view.ports[usize::from(wanted.port)].name,
            _ => "",
        };
        let held = unit.and_then(|unit| {
            let mut held = unit.held.iter();
            held.find(|held| held.front.key == front.key)
        });
        let state = match held {
            Some(held) if !held.owned => "conflict",
            _ if entry.full => "full",
            Some(_) => "ok",
            None => "pending",
        };
        let run = |index: u8| &wanted.runs[usize::from(index)];
        json!({
            "service": entry.name,
            "port": port,
            "type": front.kind.name(),
            "frontend": frontend_text(&front.key),
            "number": unit.map_or(0, |unit| unit.number),
            "algorithm": {
                "inside": run(front.inside).algorithm.name(),
                "outside": run(front.outside).algorithm.name(),
            },
            "affinity_seconds": wanted.affinity,
            "flags": flag_names(front.flags),
            "inside": self.backend_rows(wanted, front.inside),
            "outside": self.backend_rows(wanted, front.outside),
            "state": state,
        })
    }

    /// Backends of a run, and those that only keep their connections.
    fn backend_rows(&self, wanted: &Wanted, run: u8) -> Vec<Value> {
        let members = &wanted.runs[usize::from(run)].members;
        let mut weights: Vec<Option<u16>> = vec![None; wanted.ends.len()];
        for (index, weight) in members {
            weights[*index as usize] = Some(*weight);
        }
        let all = wanted.ends.iter().zip(weights);
        all.filter_map(|(end, weight)| {
            let ends = end.traits & TERMINATING != 0;
            let target = target(end, wanted);
            let number = self.backends.find(&target);
            if weight.is_none() && !(ends && number.is_some()) {
                return None;
            }
            let place = self.places.get(end.place);
            Some(json!({
                "backend": target.text(),
                "number": number.unwrap_or(0),
                "state": if ends { "terminating" } else { "active" },
                "weight": weight.unwrap_or(0),
                "node": place.and_then(|place| place.node.as_deref()).unwrap_or(""),
                "zone": place.and_then(|place| place.zone.as_deref()).unwrap_or(""),
                "local": end.traits & LOCAL != 0,
            }))
        })
        .collect()
    }
}
