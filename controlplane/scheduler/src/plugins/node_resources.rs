//! NodeResourcesFit: a node must have what the pod asks for; the least allocated is preferred.

use crate::framework::{Filter, MAX_NODE_SCORE, Plugin, Refusal, Score};
use crate::view::{NodeInfo, PodView, Resources};

/// What a container without requests counts as when scoring, so that such pods spread too (upstream's values).
const DEFAULT_MILLI_CPU: i64 = 100;
const DEFAULT_MEMORY: i64 = 200 * 1024 * 1024;

/// Fit by requests, and the `LeastAllocated` scoring strategy over CPU and memory.
pub struct NodeResourcesFit;

impl Plugin for NodeResourcesFit {
    fn name(&self) -> &'static str {
        "NodeResourcesFit"
    }
}

impl Filter for NodeResourcesFit {
    fn filter(&self, pod: &PodView, info: &NodeInfo) -> Result<(), Refusal> {
        let mut lacking = Vec::new();
        if info.pods + 1 > info.node.max_pods {
            lacking.push("Too many pods".to_owned());
        }
        let (want, used, have) = (&pod.requests, &info.requested, &info.node.allocatable);
        let mut check = |name: &str, want: i64, used: i64, have: i64| {
            if want > 0 && want > have - used {
                lacking.push(format!("Insufficient {name}"));
            }
        };
        check("cpu", want.milli_cpu, used.milli_cpu, have.milli_cpu);
        check("memory", want.memory, used.memory, have.memory);
        check(
            "ephemeral-storage",
            want.ephemeral_storage,
            used.ephemeral_storage,
            have.ephemeral_storage,
        );
        for (name, want) in &want.scalar {
            let amount = |of: &Resources| of.scalar.get(name).copied().unwrap_or(0);
            check(name, *want, amount(used), amount(have));
        }
        if lacking.is_empty() {
            Ok(())
        } else {
            Err(Refusal::new(lacking.join(", ")))
        }
    }
}

impl Score for NodeResourcesFit {
    fn score(&self, pod: &PodView, info: &NodeInfo) -> i64 {
        let or_default = |want: i64, default: i64| if want == 0 { default } else { want };
        let free = |want: i64, used: i64, have: i64| {
            if have <= 0 || used + want > have {
                0
            } else {
                (have - used - want) * MAX_NODE_SCORE / have
            }
        };
        let (used, have) = (&info.requested, &info.node.allocatable);
        let cpu = free(
            or_default(pod.requests.milli_cpu, DEFAULT_MILLI_CPU),
            used.milli_cpu,
            have.milli_cpu,
        );
        let memory = free(
            or_default(pod.requests.memory, DEFAULT_MEMORY),
            used.memory,
            have.memory,
        );
        (cpu + memory) / 2
    }
}
