//! The node agent: cluster tables to reconcilers to eBPF maps; policy, flows, CNI.
