//! The generic registry: create, get, update, delete and list of any stored resource.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Value, json};
use xebec_schema::apply::{self, ApplyOptions};
use xebec_schema::table::Resource;
use xebec_schema::{Object, convert, defaults, shape, strategy, validate};
use xebec_store::{Compare, KeyValue, Op, Store, Txn, TxnOutcome};

use crate::admission;
use crate::encode;
use crate::error::ApiError;
use crate::services::Allocator;

/// Tries before an update that others keep overtaking is given up.
const TRIES: usize = 20;

/// Objects in the store.
#[derive(Clone)]
pub(crate) struct Registry {
    pub store: Arc<dyn Store>,
    pub allocator: Arc<Allocator>,
    /// Whether volumes and claims are given the finalizers that keep them while they are used.
    pub storage_protection: bool,
}

/// Which part of an object a write is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Everything but the status.
    Main,
    /// The status.
    Status,
    /// A pod's ephemeral containers.
    Ephemeral,
    /// As given: a write of the server's own (binding, scale, finalize).
    Raw,
}

/// Options of a delete.
#[derive(Clone, Debug, Default)]
pub(crate) struct DeleteOptions {
    pub grace: Option<i64>,
    pub uid: Option<String>,
    pub resource_version: Option<String>,
    pub propagation: Option<String>,
    pub dry_run: bool,
}

pub(crate) fn now() -> String {
    time::OffsetDateTime::now_utc()
        .replace_nanosecond(0)
        .unwrap_or(time::OffsetDateTime::UNIX_EPOCH)
        .format(&time::format_description::well_known::Rfc3339)
        .unwrap_or_default()
}

/// A new uid, from a generator that is seeded by the kernel rather than asking it each time.
pub(crate) fn uid() -> String {
    uuid::Builder::from_random_bytes(rand::random())
        .into_uuid()
        .to_string()
}

/// The key of an object, or of a collection where the name is left out; collections end with a slash.
pub(crate) fn key(resource: &Resource, namespace: Option<&str>, name: Option<&str>) -> Bytes {
    let group = if resource.group.is_empty() {
        "core"
    } else {
        resource.group
    };
    let mut key = format!("/registry/{group}/{}/", resource.plural);
    if let Some(namespace) = namespace.filter(|_| resource.namespaced) {
        key.push_str(namespace);
        key.push('/');
    }
    if let Some(name) = name {
        key.push_str(name);
    }
    key.into()
}

/// All keys that begin with this one.
pub(crate) fn prefix_range(prefix: Bytes) -> std::ops::Range<Bytes> {
    let mut end = prefix.to_vec();
    // A prefix ends with '/', whose successor is '0'.
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    prefix..end.into()
}

pub(crate) fn decode(kv: &KeyValue) -> Result<Object, ApiError> {
    encode::parse(kv)
        .map_err(|error| ApiError::internal(format!("a stored object can't be read: {error}")))
}

impl Registry {
    pub(crate) async fn get(
        &self,
        resource: &Resource,
        namespace: Option<&str>,
        name: &str,
    ) -> Result<Object, ApiError> {
        decode(&self.get_stored(resource, namespace, name).await?)
    }

    pub(crate) async fn get_stored(
        &self,
        resource: &Resource,
        namespace: Option<&str>,
        name: &str,
    ) -> Result<KeyValue, ApiError> {
        let found = self
            .store
            .get(&key(resource, namespace, Some(name)))
            .await?;
        found.ok_or_else(|| ApiError::not_found(resource, name))
    }

    /// Stores a new object that is defaulted and admitted already, in the form of its storage; `asked` is the version
    /// that it was sent in. `part`: what is checked of it, which is nothing of the server's own writes (its own
    /// address may be one that endpoints of others may not have). `extra`: writes that happen with it or not at all.
    pub(crate) async fn create(
        &self,
        asked: &'static Resource,
        mut object: Object,
        part: Part,
        extra: Txn,
        dry_run: bool,
    ) -> Result<Object, ApiError> {
        let resource = convert::storage(asked);
        let metadata = &mut object["metadata"];
        metadata["uid"] = uid().into();
        metadata["creationTimestamp"] = now().into();
        let generate = metadata["generateName"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        let named = metadata["name"]
            .as_str()
            .is_some_and(|name| !name.is_empty());
        let generates = !named && !generate.is_empty();
        let mut given = object;
        for _ in 0..TRIES {
            // Only a generated name is worth a second try.
            let mut object = if generates {
                let mut object = given.clone();
                object["metadata"]["name"] = generated_name(&generate).into();
                object
            } else {
                std::mem::take(&mut given)
            };
            strategy::prepare_for_create(resource, &mut object);
            // What is read back has the defaults of what was written.
            defaults::set_defaults(resource, &mut object);
            shape::store(&mut object, resource.type_id);
            let errors = match part {
                Part::Raw => Vec::new(),
                _ => validate::validate_create(asked, &object),
            };
            let name = object["metadata"]["name"]
                .as_str()
                .unwrap_or_default()
                .to_owned();
            if !errors.is_empty() {
                return Err(ApiError::invalid(
                    resource.kind,
                    resource.group,
                    &name,
                    &errors,
                ));
            }
            let key = key(
                resource,
                object["metadata"]["namespace"].as_str(),
                Some(&name),
            );
            if dry_run {
                return match self.store.get(&key).await? {
                    Some(_) => Err(ApiError::already_exists(resource, &name)),
                    None => Ok(object),
                };
            }
            let mut txn = extra.clone();
            txn.compare.insert(
                0,
                Compare {
                    key: key.clone(),
                    mod_revision: 0,
                },
            );
            txn.ops.push(Op::Put {
                key: key.clone(),
                value: encode::store(&object),
            });
            match self.store.txn(txn).await? {
                TxnOutcome::Committed(revision) => {
                    object["metadata"]["resourceVersion"] = revision.to_string().into();
                    return Ok(object);
                }
                TxnOutcome::Conflict {
                    current: Some(kv), ..
                } if kv.key == key => {
                    if !generates {
                        return Err(ApiError::already_exists(resource, &name));
                    }
                }
                TxnOutcome::Conflict { .. } => {
                    return Err(ApiError::conflict(
                        resource,
                        &name,
                        "something it needs was taken meanwhile; please try again",
                    ));
                }
            }
        }
        Err(ApiError::internal("no free name was found"))
    }

    /// Changes an object by `change`, which sees it as it stands; tried again when others change it meanwhile,
    /// unless the new object names the version that it was made from. `asked` is the version in which it was sent.
    #[allow(
        clippy::too_many_arguments,
        reason = "each says another thing about one write"
    )]
    pub(crate) async fn update(
        &self,
        asked: &'static Resource,
        namespace: Option<&str>,
        name: &str,
        part: Part,
        dry_run: bool,
        track: Option<&ApplyOptions<'_>>,
        mut change: impl FnMut(&Object) -> Result<Object, ApiError>,
    ) -> Result<Object, ApiError> {
        let resource = convert::storage(asked);
        let key = key(resource, namespace, Some(name));
        for _ in 0..TRIES {
            let kv = self.get_stored(resource, namespace, name).await?;
            let old = decode(&kv)?;
            let mut new = change(&old)?;
            let version = new["metadata"]["resourceVersion"]
                .as_str()
                .unwrap_or_default()
                .to_owned();
            if let Err(error) = version.parse::<u64>() {
                if !version.is_empty() {
                    let why = match error.kind() {
                        std::num::IntErrorKind::PosOverflow => "value out of range",
                        _ => "invalid syntax",
                    };
                    return Err(ApiError::unexplained(format!(
                        "strconv.ParseUint: parsing {version:?}: {why}"
                    )));
                }
            }
            if !version.is_empty() && version != kv.mod_revision.to_string() {
                return Err(ApiError::modified(resource, name));
            }
            let uid = new["metadata"]["uid"].as_str().unwrap_or_default();
            if part != Part::Raw && !uid.is_empty() && uid != old["metadata"]["uid"] {
                let was = old["metadata"]["uid"].as_str().unwrap_or_default();
                return Err(ApiError::conflict(
                    resource,
                    name,
                    &format!(
                        "StorageError: invalid object, Code: 4, Key: /registry/{}/{}{name}, ResourceVersion: 0, AdditionalErrorMsg: Precondition failed: UID in precondition: {uid}, UID in object meta: {was}",
                        resource.plural,
                        namespace.map(|one| format!("{one}/")).unwrap_or_default()
                    ),
                ));
            }
            if let Some(track) = track {
                // What is filled in or put back from here on belongs to nobody.
                apply::track_update(Some(&old), &mut new, resource.type_id, track);
            }
            keep_system_fields(&old, &mut new);
            let claims = is_service(resource) && part == Part::Main;
            if claims {
                // Before anything else looks at them, addresses and ports are what they will be.
                defaults::set_defaults(resource, &mut new);
                self.allocator
                    .assign(self.store.as_ref(), Some(&old), &mut new, dry_run)
                    .await?;
            }
            match part {
                Part::Main => {
                    admission::admit_update(resource, &mut new);
                    strategy::prepare_for_update(resource, &old, &mut new);
                }
                Part::Status => strategy::prepare_for_status_update(resource, &old, &mut new),
                Part::Ephemeral => strategy::prepare_for_ephemeral_update(&old, &mut new),
                Part::Raw => {}
            }
            defaults::set_defaults(resource, &mut new);
            shape::store(&mut new, resource.type_id);
            let errors = match part {
                Part::Main => validate::validate_update(asked, &old, &new),
                Part::Status => validate::validate_status_update(resource, &old, &new),
                Part::Ephemeral => validate::validate_ephemeral_update(resource, &old, &new),
                Part::Raw => Vec::new(),
            };
            if !errors.is_empty() {
                return Err(ApiError::invalid(
                    resource.kind,
                    resource.group,
                    name,
                    &errors,
                ));
            }
            let mut txn = if claims {
                Allocator::claims(Some(&old), &new)
            } else {
                Txn::default()
            };
            let gone = is_released(resource, &new);
            if gone && is_service(resource) {
                txn = Allocator::release(&old);
            }
            let value = encode::store(&new);
            if value == kv.value && !gone || dry_run {
                new["metadata"]["resourceVersion"] = kv.mod_revision.to_string().into();
                return Ok(new);
            }
            let op = if gone {
                Op::Delete { key: key.clone() }
            } else {
                Op::Put {
                    key: key.clone(),
                    value,
                }
            };
            txn.compare.insert(
                0,
                Compare {
                    key: key.clone(),
                    mod_revision: kv.mod_revision,
                },
            );
            txn.ops.push(op);
            match self.store.txn(txn).await? {
                TxnOutcome::Committed(revision) => {
                    // What went with this write is shown as it last was in the store.
                    let revision = if gone { kv.mod_revision } else { revision };
                    new["metadata"]["resourceVersion"] = revision.to_string().into();
                    return Ok(new);
                }
                TxnOutcome::Conflict { current: None, .. } => {
                    return Err(ApiError::not_found(resource, name));
                }
                // What it claims may have been taken meanwhile, too: then the next try says so, or takes another.
                TxnOutcome::Conflict {
                    current: Some(kv), ..
                } if kv.key == key && !version.is_empty() => {
                    return Err(ApiError::modified(resource, name));
                }
                TxnOutcome::Conflict { .. } => {}
            }
        }
        Err(ApiError::modified(resource, name))
    }

    /// Deletes an object, or marks it where finalizers or a grace period hold it. True: it is gone.
    pub(crate) async fn delete(
        &self,
        resource: &'static Resource,
        namespace: Option<&str>,
        name: &str,
        options: &DeleteOptions,
    ) -> Result<(Object, bool), ApiError> {
        let key = key(resource, namespace, Some(name));
        for _ in 0..TRIES {
            let kv = self.get_stored(resource, namespace, name).await?;
            let old = decode(&kv)?;
            preconditions(resource, name, &old, options)?;
            let mut new = old.clone();
            let held = mark_deleted(resource, &mut new, options);
            if options.dry_run {
                return Ok((new, !held));
            }
            let op = if held {
                if encode::store(&new) == kv.value {
                    return Ok((old, false));
                }
                Op::Put {
                    key: key.clone(),
                    value: encode::store(&new),
                }
            } else {
                Op::Delete { key: key.clone() }
            };
            let mut txn = if !held && is_service(resource) {
                Allocator::release(&old)
            } else {
                Txn::default()
            };
            txn.compare.insert(
                0,
                Compare {
                    key: key.clone(),
                    mod_revision: kv.mod_revision,
                },
            );
            txn.ops.push(op);
            match self.store.txn(txn).await? {
                TxnOutcome::Committed(revision) => {
                    new["metadata"]["resourceVersion"] = revision.to_string().into();
                    return Ok((new, !held));
                }
                TxnOutcome::Conflict { current: None, .. } => {
                    return Err(ApiError::not_found(resource, name));
                }
                TxnOutcome::Conflict { .. } => {}
            }
        }
        Err(ApiError::modified(resource, name))
    }
}

fn is_service(resource: &Resource) -> bool {
    resource.group.is_empty() && resource.kind == "Service"
}

/// What the server alone writes stays as it was.
fn keep_system_fields(old: &Object, new: &mut Object) {
    let metadata = &mut new["metadata"];
    for field in [
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generateName",
        "name",
        "namespace",
    ] {
        let given = metadata
            .get(field)
            .is_some_and(|value| !value.is_null() && value != "");
        // When it was made is not the client's to say.
        let given = given && field != "creationTimestamp";
        match old["metadata"].get(field) {
            // An immutable field that was given another value is for validation to refuse.
            Some(value) if !given => metadata[field] = value.clone(),
            None if field.starts_with("deletion") => {
                if let Some(metadata) = metadata.as_object_mut() {
                    metadata.remove(field);
                }
            }
            _ => {}
        }
    }
    if let Some(metadata) = metadata.as_object_mut() {
        metadata.remove("selfLink");
        if metadata
            .get("finalizers")
            .and_then(Value::as_array)
            .is_some_and(Vec::is_empty)
        {
            metadata.remove("finalizers");
        }
    }
}

/// An object on its way out whose last finalizer went with this write.
fn is_released(resource: &Resource, object: &Object) -> bool {
    let metadata = &object["metadata"];
    let empty = |value: &Value| value.as_array().is_none_or(Vec::is_empty);
    if metadata["deletionTimestamp"].is_null() || !empty(&metadata["finalizers"]) {
        return false;
    }
    match (resource.group, resource.kind) {
        ("", "Namespace") => empty(&object["spec"]["finalizers"]),
        // A pod goes when its kubelet deletes it with grace 0.
        ("", "Pod") => metadata["deletionGracePeriodSeconds"] == 0,
        _ => true,
    }
}

fn preconditions(
    resource: &Resource,
    name: &str,
    object: &Object,
    options: &DeleteOptions,
) -> Result<(), ApiError> {
    // Kinds that are emptied before they go have their own way of saying it.
    let emptied = matches!(resource.kind, "Namespace" | "CustomResourceDefinition");
    let check = |what: &str, wanted: &Option<String>, actual: &Value| match wanted {
        Some(wanted) if emptied && actual != wanted.as_str() => Err(ApiError::conflict(
            resource,
            name,
            &format!(
                "Precondition failed: {what} in precondition: {wanted}, {what} in object meta: {}",
                actual.as_str().unwrap_or_default()
            ),
        )),
        Some(wanted) if actual != wanted.as_str() => Err(ApiError::conflict_of_kind(
            resource,
            name,
            &format!(
                "the {what} in the precondition ({wanted}) does not match the {what} in record ({}). The object might have been deleted and then recreated",
                actual.as_str().unwrap_or_default()
            ),
        )),
        _ => Ok(()),
    };
    check("UID", &options.uid, &object["metadata"]["uid"])?;
    check(
        "ResourceVersion",
        &options.resource_version,
        &object["metadata"]["resourceVersion"],
    )
}

/// Marks an object as deleted; true where something still holds it.
fn mark_deleted(resource: &Resource, object: &mut Object, options: &DeleteOptions) -> bool {
    let finalizer = match options.propagation.as_deref() {
        Some("Foreground") => Some("foregroundDeletion"),
        Some("Orphan") => Some("orphan"),
        None if orphans_by_default(resource) => Some("orphan"),
        _ => None,
    };
    let is_namespace = resource.group.is_empty() && resource.kind == "Namespace";
    let metadata = &mut object["metadata"];
    if let Some(finalizer) = finalizer {
        match metadata["finalizers"].as_array_mut() {
            Some(all) if !all.iter().any(|one| one == finalizer) => all.push(finalizer.into()),
            Some(_) => {}
            None => metadata["finalizers"] = json!([finalizer]),
        }
    }
    let is_pod = resource.group.is_empty() && resource.kind == "Pod";
    let grace = if is_pod {
        pod_grace(object, options)
    } else {
        0
    };
    let metadata = &mut object["metadata"];
    let finalizers = metadata["finalizers"]
        .as_array()
        .is_some_and(|all| !all.is_empty());
    let namespace_held = is_namespace
        && object["spec"]["finalizers"]
            .as_array()
            .is_some_and(|all| !all.is_empty());
    if !finalizers && !namespace_held && grace == 0 {
        if is_pod {
            stamp_deletion(object, 0);
        }
        return false;
    }
    let metadata = &mut object["metadata"];
    let shorter = metadata["deletionGracePeriodSeconds"]
        .as_i64()
        .is_none_or(|before| grace < before);
    if metadata["deletionTimestamp"].is_null() || shorter && !is_namespace && grace > 0 {
        stamp_deletion(object, grace);
    } else if shorter {
        metadata["deletionGracePeriodSeconds"] = grace.into();
    }
    if is_namespace {
        object["status"]["phase"] = "Terminating".into();
        if let Some(metadata) = object["metadata"].as_object_mut() {
            metadata.remove("deletionGracePeriodSeconds");
        }
    }
    true
}

/// Kinds whose dependents stay where a delete does not say.
pub(crate) fn orphans_by_default(resource: &Resource) -> bool {
    matches!(
        (resource.group, resource.kind),
        ("", "ReplicationController") | ("batch", "Job")
    )
}

fn stamp_deletion(object: &mut Object, grace: i64) {
    let end = time::OffsetDateTime::now_utc() + time::Duration::seconds(grace);
    let end = end.replace_nanosecond(0).unwrap_or(end);
    let metadata = &mut object["metadata"];
    let again = !metadata["deletionTimestamp"].is_null();
    metadata["deletionTimestamp"] = end
        .format(&time::format_description::well_known::Rfc3339)
        .unwrap_or_default()
        .into();
    metadata["deletionGracePeriodSeconds"] = grace.into();
    if let Some(generation) = metadata["generation"].as_i64().filter(|_| !again) {
        metadata["generation"] = (generation + 1).into();
    }
}

/// Seconds that a pod may take to end: none where no kubelet has it, or it has ended.
fn pod_grace(pod: &Object, options: &DeleteOptions) -> i64 {
    let spec = &pod["spec"];
    let unscheduled = spec["nodeName"].as_str().unwrap_or_default().is_empty();
    let ended = matches!(
        pod["status"]["phase"].as_str(),
        Some("Succeeded" | "Failed")
    );
    let asked = options
        .grace
        .or(spec["terminationGracePeriodSeconds"].as_i64())
        .unwrap_or(30)
        .max(0);
    if unscheduled || ended { 0 } else { asked }
}

/// A generated name: the base, cut to fit, and five characters that make no words.
fn generated_name(base: &str) -> String {
    const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let base: String = base.chars().take(58).collect();
    let suffix: String = (0..5)
        .map(|_| LETTERS[rand::random_range(0..LETTERS.len())] as char)
        .collect();
    format!("{base}{suffix}")
}
