//! SchedulingGates: a pod with gates waits until they are taken off (KEP-3521).

use crate::framework::{Plugin, PreEnqueue, Refusal};
use crate::view::PodView;

/// Holds pods that have `spec.schedulingGates`.
pub struct SchedulingGates;

impl Plugin for SchedulingGates {
    fn name(&self) -> &'static str {
        "SchedulingGates"
    }
}

impl PreEnqueue for SchedulingGates {
    fn pre_enqueue(&self, pod: &PodView) -> Result<(), Refusal> {
        if pod.gated {
            Err(Refusal::unresolvable("waiting for scheduling gates"))
        } else {
            Ok(())
        }
    }
}
