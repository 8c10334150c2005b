//! Validation: object metadata of every kind, and the specs of the kinds that the cluster itself runs on.
//!
//! Places, words and order of the errors are those of the real server, also where it is odd.

mod address;
mod at;
mod data;
mod endpoints;
mod event;
mod metadata;
pub mod names;
mod network_policy;
mod node;
mod pod;
mod policy;
mod ranges;
mod service;
mod status;
mod workload;

use at::{At, Errors};

use crate::Object;
use crate::field_error::FieldError;
use crate::table::Resource;

/// What is wrong with a new object, which is in the form in which it is stored; `resource` is how it was asked for.
pub fn validate_create(resource: &Resource, object: &Object) -> Vec<FieldError> {
    let mut errors = Errors::new();
    metadata::validate(resource, object, &mut errors);
    spec(resource, object, true, &mut errors);
    match (resource.group, resource.kind) {
        ("", "Pod") => pod::create(&At::object(object).field("spec"), &mut errors),
        ("events.k8s.io", "Event") => event::newer(object, &mut errors),
        _ => {}
    }
    errors
}

/// What is wrong with a changed object, also against what it was.
pub fn validate_update(resource: &Resource, old: &Object, new: &Object) -> Vec<FieldError> {
    let mut errors = Errors::new();
    // The real server looks at what may not change for every kind, and again for each.
    metadata::validate_update(old, new, &mut errors);
    metadata::validate(resource, new, &mut errors);
    metadata::validate_update(old, new, &mut errors);
    if (resource.group, resource.kind) == ("", "Service") {
        service::update(old, new, &mut errors);
    }
    spec(resource, new, false, &mut errors);
    match (resource.group, resource.kind) {
        ("", "Pod") => pod::update(old, new, &mut errors),
        ("", "Node") => node::update(old, new, &mut errors),
        ("", "ConfigMap") => data::update(old, new, &mut errors),
        ("", "Secret") => {
            data::update(old, new, &mut errors);
            immutable(old, new, &["type"], &mut errors);
        }
        ("events.k8s.io", "Event") => event::newer_update(old, new, &mut errors),
        ("apps", "Deployment" | "ReplicaSet" | "DaemonSet" | "StatefulSet") => {
            immutable(old, new, &["spec", "selector"], &mut errors);
        }
        ("apps", "ControllerRevision") => immutable(old, new, &["data"], &mut errors),
        ("batch", "Job") => immutable(old, new, &["spec", "completionMode"], &mut errors),
        ("rbac.authorization.k8s.io", "RoleBinding" | "ClusterRoleBinding")
            if old["roleRef"] != new["roleRef"] =>
        {
            errors.push(FieldError::invalid(
                "roleRef",
                &new["roleRef"],
                "cannot change roleRef",
            ));
        }
        ("discovery.k8s.io", "EndpointSlice") => immutable(old, new, &["addressType"], &mut errors),
        ("networking.k8s.io", "ServiceCIDR") => ranges::service_cidr_update(old, new, &mut errors),
        _ => {}
    }
    errors
}

/// What is wrong with the addresses and address families of a Service, before any are chosen for it.
pub fn service_families(object: &Object) -> Vec<FieldError> {
    let mut errors = Errors::new();
    service::families(&At::named("spec", &object["spec"]), &mut errors);
    errors
}

/// What is wrong with a changed status.
pub fn validate_status_update(resource: &Resource, old: &Object, new: &Object) -> Vec<FieldError> {
    let mut errors = Errors::new();
    metadata::validate_update(old, new, &mut errors);
    metadata::validate_update(old, new, &mut errors);
    match (resource.group, resource.kind) {
        ("", "Pod") => pod::status_update(old, new, &mut errors),
        ("", "Node") => node::status(new, &mut errors),
        ("", "Service") => service::status(new, &mut errors),
        _ => status::validate(resource, new, &mut errors),
    }
    errors
}

/// What is wrong with a pod whose ephemeral containers are changed.
pub fn validate_ephemeral_update(
    resource: &Resource,
    old: &Object,
    new: &Object,
) -> Vec<FieldError> {
    let mut errors = Errors::new();
    metadata::validate_update(old, new, &mut errors);
    metadata::validate(resource, new, &mut errors);
    spec(resource, new, false, &mut errors);
    pod::ephemeral_update(old, new, &mut errors);
    errors
}

fn immutable(old: &Object, new: &Object, path: &[&str], errors: &mut Errors) {
    let find = |object: &Object| {
        path.iter()
            .fold(object.clone(), |value, key| value[*key].clone())
    };
    let (before, after) = (find(old), find(new));
    if before != after {
        errors.push(FieldError::invalid(
            path.join("."),
            &after,
            "field is immutable",
        ));
    }
}

/// What is wrong with what an object says itself. `new`: it is not stored yet.
fn spec(resource: &Resource, object: &Object, new: bool, errors: &mut Errors) {
    match (resource.group, resource.kind) {
        ("", "Pod") => pod::spec(&At::named("spec", &object["spec"]), errors),
        ("", "PodTemplate") => {
            workload::template(&At::named("template", &object["template"]), errors);
        }
        ("", "Service") => service::validate(object, errors),
        ("", "ConfigMap") => data::config_map(object, errors),
        ("", "Secret") => data::secret(object, errors),
        ("", "Node") => node::validate(object, errors),
        ("", "Endpoints") => endpoints::endpoints(object, errors),
        ("", "Namespace") => {
            let finalizers = At::named("spec.finalizers", &object["spec"]["finalizers"]);
            for finalizer in finalizers.items() {
                for message in names::qualified_name(finalizer.text()) {
                    finalizers.invalid_as(finalizer.value, &message, errors);
                }
                metadata::finalizer_domain(&finalizer, &finalizers, errors);
            }
        }
        ("" | "events.k8s.io", "Event") => event::validate(object, errors),
        ("apps", "Deployment" | "ReplicaSet" | "DaemonSet" | "StatefulSet")
        | ("batch", "Job")
        | ("", "ReplicationController") => workload::validate(resource, object, errors),
        ("networking.k8s.io", "NetworkPolicy") => network_policy::validate(object, new, errors),
        ("discovery.k8s.io", "EndpointSlice") => endpoints::slice(object, errors),
        ("coordination.k8s.io", "Lease") => lease(object, errors),
        ("networking.k8s.io", "IPAddress") => ranges::ip_address(object, errors),
        ("networking.k8s.io", "ServiceCIDR") => ranges::service_cidr(object, errors),
        _ => policy::validate(resource, object, errors),
    }
}

fn lease(object: &Object, errors: &mut Errors) {
    let spec = At::named("spec", &object["spec"]);
    spec.field("leaseDurationSeconds").positive_if_set(errors);
    spec.field("leaseTransitions").non_negative(errors);
}
