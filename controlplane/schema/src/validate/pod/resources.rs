//! Validation of what containers and pods ask for and may use at most.

use super::super::at::{At, Errors};
use super::super::names;
use crate::quantity::Quantity;

const OVERCOMMIT: &[&str] = &["cpu", "memory", "ephemeral-storage"];

fn parse(amount: &At<'_, '_>) -> Option<Quantity> {
    Quantity::parse(amount.text()).ok()
}

/// Resources of a vendor: a domain that is not the project's own.
fn is_extended(name: &str) -> bool {
    name.split_once('/')
        .is_some_and(|(domain, _)| !domain.ends_with("kubernetes.io") && domain != "requests")
}

/// Kinds of which a node can promise more than it has.
fn can_overcommit(name: &str) -> bool {
    OVERCOMMIT.contains(&name) || name.contains('/') && !is_extended(name)
}

/// One amount: not negative, and whole where it counts things.
fn amount(name: &str, amount: &At<'_, '_>, errors: &mut Errors) {
    let Some(quantity) = parse(amount) else {
        return;
    };
    if quantity.nano_value() < 0 {
        amount.invalid("must be greater than or equal to 0", errors);
    }
    if is_extended(name) && quantity.nano_value() % 1_000_000_000 != 0 {
        amount.invalid("must be an integer", errors);
    }
}

/// Amounts by resource name.
pub(super) fn amounts(list: &At<'_, '_>, errors: &mut Errors) {
    for (name, value) in list.entries() {
        for message in names::qualified_name(name) {
            value.invalid_as(serde_json::json!(name), &message, errors);
        }
        amount(name, &value, errors);
    }
}

fn container_resource(name: &str, at: &At<'_, '_>, errors: &mut Errors) {
    let shown = serde_json::json!(name);
    for message in names::qualified_name(name) {
        at.invalid_as(&shown, &message, errors);
    }
    let standard = OVERCOMMIT.contains(&name) || name.starts_with("hugepages-");
    if !name.contains('/') && !standard {
        let detail = "must be a standard resource for containers";
        at.invalid_as(&shown, detail, errors);
    }
}

/// `resources` of a container; `claims` are those that its pod has.
pub(super) fn of_container(resources: &At<'_, '_>, claims: &At<'_, '_>, errors: &mut Errors) {
    requirements(resources, container_resource, errors);
    for claim in resources.field("claims").items() {
        let name = claim.field("name");
        if !name.required(errors)
            || claims
                .items()
                .any(|one| one.field("name").text() == name.text())
        {
            continue;
        }
        let empty = if claims.len() == 0 {
            " which is empty"
        } else {
            ""
        };
        let detail = format!("must be one of the names in pod.spec.resourceClaims{empty}");
        claim.showing(name.value).not_found(&detail, errors);
    }
}

fn requirements(
    resources: &At<'_, '_>,
    name_rule: fn(&str, &At<'_, '_>, &mut Errors),
    errors: &mut Errors,
) {
    let (limits, requests) = (resources.field("limits"), resources.field("requests"));
    for (name, limit) in limits.entries() {
        name_rule(name, &limit, errors);
        amount(name, &limit, errors);
    }
    for (name, request) in requests.entries() {
        name_rule(name, &request, errors);
        amount(name, &request, errors);
        let limit = limits.key(name);
        match (parse(&request), parse(&limit)) {
            (Some(asked), Some(most)) => {
                let must = if asked != most && !can_overcommit(name) {
                    "must be equal to"
                } else if asked > most {
                    "must be less than or equal to"
                } else {
                    continue;
                };
                let detail = format!("{must} {name} limit of {}", limit.text());
                requests.invalid_as(request.value, &detail, errors);
            }
            (Some(_), None) if !can_overcommit(name) => {
                let detail = "Limit must be set for non overcommitable resources";
                limits.missing(detail, errors);
            }
            _ => {}
        }
    }
    let any = |wanted: fn(&str) -> bool| {
        limits
            .entries()
            .chain(requests.entries())
            .any(|(name, _)| wanted(name))
    };
    if any(|name| name.starts_with("hugepages-")) && !any(|name| matches!(name, "cpu" | "memory")) {
        resources.forbidden("HugePages require cpu or memory", errors);
    }
}

/// `resources` of a pod as a whole, which its containers share.
pub(super) fn pod_level(spec: &At<'_, '_>, errors: &mut Errors) {
    let resources = spec.field("resources");
    if !resources.is_set() {
        return;
    }
    let known = |name: &str, at: &At<'_, '_>, errors: &mut Errors| {
        let standard = matches!(name, "cpu" | "memory") || name.starts_with("hugepages-");
        if !standard {
            let shown = serde_json::json!(name);
            let known = ["cpu", "hugepages-", "memory"];
            at.showing(&shown).not_supported(&known, errors);
        }
    };
    requirements(&resources, known, errors);
    for (name, most) in resources.field("limits").entries() {
        let Some(most_quantity) = parse(&most) else {
            continue;
        };
        // The containers are told of below the pod's resources, as the real server has it.
        let told = resources.field("containers");
        let told = told.showing(spec.field("containers").value);
        for container in told.items() {
            let limit = &container.value["resources"]["limits"][name];
            let told = container.key(name);
            let told = told.field("limits");
            let limit = told.showing(limit);
            if parse(&limit).is_some_and(|limit| limit > most_quantity) {
                let detail = format!(
                    "must be less than or equal to pod limits of {}",
                    most.text()
                );
                limit.invalid(&detail, errors);
            }
        }
    }
}
