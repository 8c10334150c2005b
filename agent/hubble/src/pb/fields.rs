// Fields of `flow.Flow` and what is inside it; written by agent/hubble/codegen.
use crate::mask::Field;
static AGGREGATE: &[Field] = &[
    Field { name: "ingress_flow_count", number: 1, inside: &[] },
    Field { name: "egress_flow_count", number: 2, inside: &[] },
    Field { name: "unknown_direction_flow_count", number: 3, inside: &[] },
];
static CILIUM_EVENT_TYPE: &[Field] = &[
    Field { name: "type", number: 1, inside: &[] },
    Field { name: "sub_type", number: 2, inside: &[] },
];
static DNS: &[Field] = &[
    Field { name: "query", number: 1, inside: &[] },
    Field { name: "ips", number: 2, inside: &[] },
    Field { name: "ttl", number: 3, inside: &[] },
    Field { name: "cnames", number: 4, inside: &[] },
    Field { name: "observation_source", number: 5, inside: &[] },
    Field { name: "rcode", number: 6, inside: &[] },
    Field { name: "qtypes", number: 7, inside: &[] },
    Field { name: "rrtypes", number: 8, inside: &[] },
];
static EMITTER: &[Field] = &[
    Field { name: "name", number: 1, inside: &[] },
    Field { name: "version", number: 2, inside: &[] },
];
static ENDPOINT: &[Field] = &[
    Field { name: "ID", number: 1, inside: &[] },
    Field { name: "identity", number: 2, inside: &[] },
    Field { name: "cluster_name", number: 7, inside: &[] },
    Field { name: "namespace", number: 3, inside: &[] },
    Field { name: "labels", number: 4, inside: &[] },
    Field { name: "pod_name", number: 5, inside: &[] },
    Field { name: "workloads", number: 6, inside: WORKLOAD },
];
static ETHERNET: &[Field] = &[
    Field { name: "source", number: 1, inside: &[] },
    Field { name: "destination", number: 2, inside: &[] },
];
static FILE_INFO: &[Field] = &[
    Field { name: "name", number: 1, inside: &[] },
    Field { name: "line", number: 2, inside: &[] },
];
pub(crate) static FLOW: &[Field] = &[
    Field { name: "time", number: 1, inside: &[] },
    Field { name: "uuid", number: 34, inside: &[] },
    Field { name: "emitter", number: 41, inside: EMITTER },
    Field { name: "verdict", number: 2, inside: &[] },
    Field { name: "drop_reason", number: 3, inside: &[] },
    Field { name: "drop_reason_desc", number: 25, inside: &[] },
    Field { name: "auth_type", number: 35, inside: &[] },
    Field { name: "ethernet", number: 4, inside: ETHERNET },
    Field { name: "IP", number: 5, inside: IP },
    Field { name: "l4", number: 6, inside: LAYER4 },
    Field { name: "tunnel", number: 39, inside: TUNNEL },
    Field { name: "l7", number: 15, inside: LAYER7 },
    Field { name: "source", number: 8, inside: ENDPOINT },
    Field { name: "destination", number: 9, inside: ENDPOINT },
    Field { name: "source_names", number: 13, inside: &[] },
    Field { name: "destination_names", number: 14, inside: &[] },
    Field { name: "source_service", number: 20, inside: SERVICE },
    Field { name: "destination_service", number: 21, inside: SERVICE },
    Field { name: "Type", number: 10, inside: &[] },
    Field { name: "event_type", number: 19, inside: CILIUM_EVENT_TYPE },
    Field { name: "node_name", number: 11, inside: &[] },
    Field { name: "node_labels", number: 37, inside: &[] },
    Field { name: "traffic_direction", number: 22, inside: &[] },
    Field { name: "is_reply", number: 26, inside: &[] },
    Field { name: "reply", number: 16, inside: &[] },
    Field { name: "trace_observation_point", number: 24, inside: &[] },
    Field { name: "trace_reason", number: 36, inside: &[] },
    Field { name: "file", number: 38, inside: FILE_INFO },
    Field { name: "ip_trace_id", number: 40, inside: IPTRACE_ID },
    Field { name: "debug_capture_point", number: 27, inside: &[] },
    Field { name: "interface", number: 28, inside: NETWORK_INTERFACE },
    Field { name: "proxy_port", number: 29, inside: &[] },
    Field { name: "trace_context", number: 30, inside: TRACE_CONTEXT },
    Field { name: "sock_xlate_point", number: 31, inside: &[] },
    Field { name: "socket_cookie", number: 32, inside: &[] },
    Field { name: "cgroup_id", number: 33, inside: &[] },
    Field { name: "policy_match_type", number: 23, inside: &[] },
    Field { name: "egress_allowed_by", number: 21001, inside: POLICY },
    Field { name: "ingress_allowed_by", number: 21002, inside: POLICY },
    Field { name: "egress_denied_by", number: 21004, inside: POLICY },
    Field { name: "ingress_denied_by", number: 21005, inside: POLICY },
    Field { name: "policy_log", number: 21006, inside: &[] },
    Field { name: "aggregate", number: 21007, inside: AGGREGATE },
    Field { name: "Summary", number: 100000, inside: &[] },
    Field { name: "extensions", number: 150000, inside: &[] },
];
static HTTP: &[Field] = &[
    Field { name: "code", number: 1, inside: &[] },
    Field { name: "method", number: 2, inside: &[] },
    Field { name: "url", number: 3, inside: &[] },
    Field { name: "protocol", number: 4, inside: &[] },
    Field { name: "headers", number: 5, inside: HTTPHEADER },
];
static HTTPHEADER: &[Field] = &[
    Field { name: "key", number: 1, inside: &[] },
    Field { name: "value", number: 2, inside: &[] },
];
static ICMPV4: &[Field] = &[
    Field { name: "type", number: 1, inside: &[] },
    Field { name: "code", number: 2, inside: &[] },
];
static ICMPV6: &[Field] = &[
    Field { name: "type", number: 1, inside: &[] },
    Field { name: "code", number: 2, inside: &[] },
];
static IGMP: &[Field] = &[
    Field { name: "type", number: 1, inside: &[] },
    Field { name: "group_address", number: 2, inside: &[] },
];
static IP: &[Field] = &[
    Field { name: "source", number: 1, inside: &[] },
    Field { name: "source_xlated", number: 5, inside: &[] },
    Field { name: "destination", number: 2, inside: &[] },
    Field { name: "ipVersion", number: 3, inside: &[] },
    Field { name: "encrypted", number: 4, inside: &[] },
];
static IPTRACE_ID: &[Field] = &[
    Field { name: "trace_id", number: 1, inside: &[] },
    Field { name: "ip_option_type", number: 2, inside: &[] },
];
static LAYER4: &[Field] = &[
    Field { name: "TCP", number: 1, inside: TCP },
    Field { name: "UDP", number: 2, inside: UDP },
    Field { name: "ICMPv4", number: 3, inside: ICMPV4 },
    Field { name: "ICMPv6", number: 4, inside: ICMPV6 },
    Field { name: "SCTP", number: 5, inside: SCTP },
    Field { name: "VRRP", number: 6, inside: VRRP },
    Field { name: "IGMP", number: 7, inside: IGMP },
];
static LAYER7: &[Field] = &[
    Field { name: "type", number: 1, inside: &[] },
    Field { name: "latency_ns", number: 2, inside: &[] },
    Field { name: "dns", number: 100, inside: DNS },
    Field { name: "http", number: 101, inside: HTTP },
];
static NETWORK_INTERFACE: &[Field] = &[
    Field { name: "index", number: 1, inside: &[] },
    Field { name: "name", number: 2, inside: &[] },
];
static POLICY: &[Field] = &[
    Field { name: "name", number: 1, inside: &[] },
    Field { name: "namespace", number: 2, inside: &[] },
    Field { name: "labels", number: 3, inside: &[] },
    Field { name: "revision", number: 4, inside: &[] },
    Field { name: "kind", number: 5, inside: &[] },
];
static SCTP: &[Field] = &[
    Field { name: "source_port", number: 1, inside: &[] },
    Field { name: "destination_port", number: 2, inside: &[] },
];
static SERVICE: &[Field] = &[
    Field { name: "name", number: 1, inside: &[] },
    Field { name: "namespace", number: 2, inside: &[] },
];
static TCP: &[Field] = &[
    Field { name: "source_port", number: 1, inside: &[] },
    Field { name: "destination_port", number: 2, inside: &[] },
    Field { name: "flags", number: 3, inside: TCPFLAGS },
];
static TCPFLAGS: &[Field] = &[
    Field { name: "FIN", number: 1, inside: &[] },
    Field { name: "SYN", number: 2, inside: &[] },
    Field { name: "RST", number: 3, inside: &[] },
    Field { name: "PSH", number: 4, inside: &[] },
    Field { name: "ACK", number: 5, inside: &[] },
    Field { name: "URG", number: 6, inside: &[] },
    Field { name: "ECE", number: 7, inside: &[] },
    Field { name: "CWR", number: 8, inside: &[] },
    Field { name: "NS", number: 9, inside: &[] },
];
static TRACE_CONTEXT: &[Field] = &[
    Field { name: "parent", number: 1, inside: TRACE_PARENT },
];
static TRACE_PARENT: &[Field] = &[
    Field { name: "trace_id", number: 1, inside: &[] },
];
static TUNNEL: &[Field] = &[
    Field { name: "protocol", number: 1, inside: &[] },
    Field { name: "IP", number: 2, inside: IP },
    Field { name: "l4", number: 3, inside: LAYER4 },
    Field { name: "vni", number: 4, inside: &[] },
];
static UDP: &[Field] = &[
    Field { name: "source_port", number: 1, inside: &[] },
    Field { name: "destination_port", number: 2, inside: &[] },
];
static VRRP: &[Field] = &[
    Field { name: "type", number: 1, inside: &[] },
    Field { name: "vrid", number: 2, inside: &[] },
    Field { name: "priority", number: 3, inside: &[] },
];
static WORKLOAD: &[Field] = &[
    Field { name: "name", number: 1, inside: &[] },
    Field { name: "kind", number: 2, inside: &[] },
];
