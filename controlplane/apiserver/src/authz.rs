//! Who may do what, until RBAC is here: a short, explicit list.

use crate::authn::UserInfo;
use crate::error::ApiError;
use crate::request::ResourceRequest;

/// What the agent may write; it may read everything but Secrets.
const AGENT: &str = "system:serviceaccount:kube-system:xebec-agent";

/// Lets a request for a resource pass, or refuses it in the real server's words.
pub(crate) fn resource(user: &UserInfo, request: &ResourceRequest) -> Result<(), ApiError> {
    if is_trusted(user) || agent_may(user, request) || anyone_may(user, request) {
        return Ok(());
    }
    let resource = request.resource;
    let what = match &request.subresource {
        Some(sub) => format!("{}/{sub}", resource.plural),
        None => resource.plural.to_owned(),
    };
    let qualified = if resource.group.is_empty() {
        what.clone()
    } else {
        format!("{}.{}", what, resource.group)
    };
    let name = request
        .name
        .as_ref()
        .map(|name| format!(" {name:?}"))
        .unwrap_or_default();
    let scope = match &request.namespace {
        Some(namespace) => format!("in the namespace {namespace:?}"),
        None => "at the cluster scope".to_owned(),
    };
    Err(ApiError::forbidden(format!(
        "{qualified}{name} is forbidden: User {:?} cannot {} resource {what:?} in API group {:?} {scope}",
        user.name,
        verb(request),
        resource.group
    )))
}

/// The verb that counts: a process or a connection in a pod is made, even if a WebSocket asks for it with GET.
fn verb(request: &ResourceRequest) -> &'static str {
    match request.subresource.as_deref() {
        Some("exec" | "attach" | "portforward") => "create",
        _ => request.verb,
    }
}

/// Lets a request for another path pass: anybody may ask for health and version, those with a name for discovery.
pub(crate) fn path(user: &UserInfo, path: &str, verb: &str) -> Result<(), ApiError> {
    let public = ["/healthz", "/livez", "/readyz", "/version"];
    let discovery = ["/api", "/apis", "/openapi", "/.well-known"];
    let within = |list: &[&str]| {
        list.iter().any(|one| {
            path == *one
                || path
                    .strip_prefix(one)
                    .is_some_and(|rest| rest.starts_with('/'))
        })
    };
    if is_trusted(user)
        || within(&public)
        || user.is_in("system:authenticated") && within(&discovery)
    {
        return Ok(());
    }
    Err(ApiError::forbidden(format!(
        "forbidden: User {:?} cannot {verb} path {path:?}",
        user.name
    )))
}

/// Administrators and the cluster's own parts.
pub(crate) fn is_trusted(user: &UserInfo) -> bool {
    user.is_in("system:masters")
        || matches!(
            user.name.as_str(),
            "system:kube-scheduler" | "system:kube-controller-manager"
        )
        || user.is_in("system:nodes") && user.name.starts_with("system:node:")
}

fn agent_may(user: &UserInfo, request: &ResourceRequest) -> bool {
    let reads = matches!(verb(request), "get" | "list" | "watch");
    let events = request.resource.plural == "events"
        && matches!(request.verb, "create" | "patch" | "update");
    // By these the nodes agree on who announces a load balancer's addresses.
    let leases = request.resource.plural == "leases"
        && request.namespace.as_deref() == Some("kube-system")
        && matches!(request.verb, "create" | "patch" | "update" | "delete");
    user.name == AGENT && (reads && request.resource.plural != "secrets" || events || leases)
}

/// Everybody with a name may ask about himself.
fn anyone_may(user: &UserInfo, request: &ResourceRequest) -> bool {
    user.is_in("system:authenticated")
        && request.verb == "create"
        && matches!(
            request.resource.kind,
            "SelfSubjectAccessReview" | "SelfSubjectRulesReview" | "SelfSubjectReview"
        )
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::request::{Query, parse};

    fn may(user: &UserInfo, method: &str, path: &str) -> Result<(), String> {
        let request = parse(&method.parse().unwrap(), path, &Query::parse(None)).unwrap();
        resource(user, &request).map_err(|error| error.to_string())
    }

    #[test]
    fn who_may_only_read_may_not_run_anything_in_a_pod() {
        let agent = UserInfo::new(AGENT, &[]);
        let pod = "/api/v1/namespaces/shop/pods/web";
        may(&agent, "GET", pod).unwrap();
        may(&agent, "GET", &format!("{pod}/log")).unwrap();
        for sub in ["exec", "attach", "portforward"] {
            for method in ["GET", "POST"] {
                let why = may(&agent, method, &format!("{pod}/{sub}")).unwrap_err();
                let wanted = format!("cannot create resource \"pods/{sub}\"");
                assert!(why.contains(&wanted), "{why}");
            }
        }
    }
}
