//! Server-side apply, and who owns which field (`metadata.managedFields`).

use serde_json::{Map, Value, json};

use crate::Object;
use crate::fieldset::{Comparison, FieldSet, Shape, merge};
use crate::shape;
use crate::table::{self, Kind, Resource, TypeId};

/// A field that another manager has with another value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// The other manager.
    pub manager: String,
    /// Such as `.spec.replicas`.
    pub field_path: String,
    /// The version it wrote with; empty for one that applied.
    pub api_version: String,
    /// The subresource it wrote through; empty for the object itself.
    pub subresource: String,
}

impl Conflict {
    /// How messages name the other: `"kubectl" with subresource "scale" using apps/v1`.
    pub fn who(&self) -> String {
        let mut who = format!("{:?}", self.manager);
        if !self.subresource.is_empty() {
            who += &format!(" with subresource {:?}", self.subresource);
        }
        if !self.api_version.is_empty() {
            who += &format!(" using {}", self.api_version);
        }
        who
    }
}

/// Why a configuration was not applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ApplyError {
    /// Others own what it would change (409); by manager, then path.
    Conflicts(Vec<Conflict>),
    /// It can't be applied (400).
    Invalid(String),
}

impl std::fmt::Display for ApplyError {
    /// The message of the Status that the API answers with.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Invalid(message) => f.write_str(message),
            Self::Conflicts(conflicts) => {
                let plural = if conflicts.len() == 1 { "" } else { "s" };
                write!(
                    f,
                    "Apply failed with {} conflict{plural}: ",
                    conflicts.len()
                )?;
                let mut at = 0;
                while let Some(first) = conflicts.get(at) {
                    let same: Vec<_> = conflicts[at..]
                        .iter()
                        .take_while(|one| one.who() == first.who())
                        .collect();
                    let lead = if at == 0 { "" } else { "\n" };
                    match same.as_slice() {
                        [one] => {
                            write!(f, "{lead}conflict with {}: {}", one.who(), one.field_path)?
                        }
                        many => {
                            write!(f, "{lead}conflicts with {}:", first.who())?;
                            many.iter()
                                .try_for_each(|one| write!(f, "\n- {}", one.field_path))?;
                        }
                    }
                    at += same.len();
                }
                Ok(())
            }
        }
    }
}

impl std::error::Error for ApplyError {}

/// Who writes, how and when.
#[derive(Clone, Copy, Debug)]
pub struct ApplyOptions<'a> {
    /// `?fieldManager=`, or what stands for it.
    pub manager: &'a str,
    /// Take fields away from others.
    pub force: bool,
    /// The version of the request's object.
    pub api_version: &'a str,
    /// The subresource it goes through; empty for none.
    pub subresource: &'a str,
    /// Now, in RFC 3339.
    pub now: &'a str,
}

/// One entry of `metadata.managedFields`.
#[derive(Clone, Debug, PartialEq)]
struct Manager {
    manager: String,
    applies: bool,
    api_version: String,
    subresource: String,
    time: Option<String>,
    fields: FieldSet,
}

impl Manager {
    fn new(o: &ApplyOptions, applies: bool) -> Self {
        Self {
            manager: o.manager.to_owned(),
            applies,
            api_version: o.api_version.to_owned(),
            subresource: o.subresource.to_owned(),
            time: None,
            fields: FieldSet::default(),
        }
    }

    /// One manager has one entry per operation, subresource and, for updates, version.
    fn is(&self, other: &Self) -> bool {
        self.manager == other.manager
            && self.applies == other.applies
            && self.subresource == other.subresource
            && (self.applies || self.api_version == other.api_version)
    }

    fn read(entry: &Value) -> Option<Self> {
        let text = |key: &str| entry[key].as_str().unwrap_or_default().to_owned();
        Some(Self {
            manager: text("manager"),
            applies: match entry["operation"].as_str()? {
                "Apply" => true,
                "Update" => false,
                _ => return None,
            },
            api_version: text("apiVersion"),
            subresource: text("subresource"),
            time: entry["time"].as_str().map(str::to_owned),
            fields: FieldSet::from_fields_v1(&entry["fieldsV1"]),
        })
    }

    fn write(&self) -> Value {
        let mut entry = json!({
            "apiVersion": self.api_version,
            "fieldsType": "FieldsV1",
            "fieldsV1": self.fields.to_fields_v1(),
            "manager": self.manager,
            "operation": if self.applies { "Apply" } else { "Update" },
        });
        if !self.subresource.is_empty() {
            entry["subresource"] = self.subresource.as_str().into();
        }
        if let Some(time) = &self.time {
            entry["time"] = time.as_str().into();
        }
        entry
    }
}

/// The managers of an object; none where one entry can't be read.
fn read_managers(object: &Object) -> Option<Vec<Manager>> {
    object["metadata"]["managedFields"]
        .as_array()
        .into_iter()
        .flatten()
        .map(Manager::read)
        .collect()
}

fn write_managers(object: &mut Object, mut managers: Vec<Manager>) {
    managers.retain(|one| !one.fields.is_empty());
    let order = |one: &Manager| {
        (
            !one.applies,
            one.time.clone(),
            one.manager.clone(),
            one.api_version.clone(),
            one.subresource.clone(),
        )
    };
    managers.sort_by_key(order);
    let Some(metadata) = object["metadata"].as_object_mut() else {
        return;
    };
    if managers.is_empty() {
        metadata.remove("managedFields");
    } else {
        metadata.insert(
            "managedFields".into(),
            managers.iter().map(Manager::write).collect(),
        );
    }
}

fn without_managers(object: &Object) -> Object {
    let mut object = object.clone();
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
    }
    object
}

/// Managers that update and have an entry of their own; the oldest beyond them are counted together.
const MOST_UPDATERS: usize = 10;
/// The manager under which they are counted.
const ANCIENT: &str = "ancient-changes";
/// What an object without managers is counted to before something is applied to it.
const BEFORE_FIRST_APPLY: &str = "before-first-apply";
/// Where `kubectl apply` without `--server-side` keeps what it applied.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Takes out what nobody is said to own.
fn strip(set: &mut FieldSet, ty: TypeId, subresource: &str) {
    for field in ["apiVersion", "kind"] {
        set.without(&[field]);
    }
    for field in [
        "name",
        "namespace",
        "creationTimestamp",
        "selfLink",
        "uid",
        "generation",
        "managedFields",
        "resourceVersion",
    ] {
        set.without(&["metadata", field]);
    }
    set.without_member("metadata");
    strip_other_half(set, table::resource_of(ty), subresource);
}

/// Takes out what a request through this subresource can't set.
fn strip_other_half(set: &mut FieldSet, resource: Option<&Resource>, subresource: &str) {
    // A writer of the object can't set its status, nor one of the status the rest.
    if resource.is_some_and(|resource| resource.subresource("status").is_some()) {
        match subresource {
            "" => {
                set.without(&["status"]);
                // A signing request's spec is written once and owned by nobody.
                if resource.is_some_and(|resource| resource.kind == "CertificateSigningRequest") {
                    set.without(&["spec"]);
                }
            }
            "status" => {
                set.without(&["spec"]);
                if resource.is_some_and(|resource| resource.kind == "Deployment") {
                    set.without(&["metadata", "labels"]);
                }
                if resource.is_some_and(|resource| resource.group == "resource.k8s.io") {
                    set.without(&["metadata"]);
                }
            }
            _ => {}
        }
    }
}

/// What a request through this subresource changes from one object to the other.
fn compare(before: &Object, after: &Object, ty: TypeId, subresource: &str) -> Comparison {
    let mut compared = Comparison::of(before, after, ty);
    let resource = table::resource_of(ty);
    for set in [
        &mut compared.added,
        &mut compared.modified,
        &mut compared.removed,
    ] {
        strip_other_half(set, resource, subresource);
    }
    compared
}

/// Takes from each manager but `except` what changed, and what is gone.
fn take_from_others(managers: &mut [Manager], except: Option<&Manager>, compared: &Comparison) {
    let changed = compared.modified.union(&compared.added);
    for other in managers
        .iter_mut()
        .filter(|other| !except.is_some_and(|one| one.is(other)))
    {
        other.fields = other
            .fields
            .difference(&other.fields.intersection(&changed))
            .difference(&compared.removed);
    }
}

/// After a create, update or patch: notes in `metadata.managedFields` what changed and through whom.
///
/// To be called once the object has its defaults and before admission and `strategy::prepare_*`: what those set is
/// nobody's. `old` is the stored object; `new` is the one to be stored, with defaults, and possibly with managed fields of the
/// client's own.
pub fn track_update(old: Option<&Object>, new: &mut Object, ty: TypeId, o: &ApplyOptions) {
    let given = &new["metadata"]["managedFields"];
    let reset = given
        .as_array()
        .is_some_and(|all| all.len() == 1 && all[0].as_object().is_some_and(Map::is_empty));
    let stored = || old.and_then(read_managers).unwrap_or_default();
    let managers = match read_managers(new) {
        _ if reset => Vec::new(),
        Some(given) if !given.is_empty() && o.subresource.is_empty() => given,
        _ => stored(),
    };
    // An object whose managers were cleared stays without until something is applied to it.
    if old.is_some() && managers.is_empty() {
        return write_managers(new, managers);
    }
    let before = old.map_or_else(|| shape::empty(ty), without_managers);
    let managers = update(&before, &without_managers(new), ty, managers, o);
    write_managers(new, managers);
}

fn update(
    before: &Object,
    after: &Object,
    ty: TypeId,
    mut managers: Vec<Manager>,
    o: &ApplyOptions,
) -> Vec<Manager> {
    let compared = compare(before, after, ty, o.subresource);
    if compared.is_same() {
        return managers;
    }
    take_from_others(&mut managers, None, &compared);
    let mut own = compared.added.union(&compared.modified);
    strip(&mut own, ty, o.subresource);
    if !own.is_empty() {
        let mut entry = Manager::new(o, false);
        entry.fields = own;
        entry.time = Some(o.now.to_owned());
        if let Some(at) = managers.iter().position(|one| one.is(&entry)) {
            entry.fields = entry.fields.union(&managers[at].fields);
            managers.remove(at);
        }
        managers.push(entry);
    }
    managers.retain(|one| !one.fields.is_empty());
    cap(&mut managers);
    managers
}

/// Counts the oldest updaters together once there are too many.
fn cap(managers: &mut Vec<Manager>) {
    let mut updaters: Vec<Manager> = managers
        .iter()
        .filter(|one| !one.applies)
        .cloned()
        .collect();
    if updaters.len() <= MOST_UPDATERS {
        return;
    }
    updaters.sort_by_key(|one| (one.time.clone(), one.manager.clone()));
    managers.retain(|one| one.applies);
    let mut left = updaters.len();
    let mut ancient: Vec<Manager> = Vec::new();
    for mut one in updaters {
        if left + ancient.len() <= MOST_UPDATERS && one.manager != ANCIENT {
            managers.push(one);
            continue;
        }
        left -= 1;
        one.manager = ANCIENT.to_owned();
        match ancient.iter_mut().find(|other| other.is(&one)) {
            Some(bucket) => {
                bucket.fields = bucket.fields.union(&one.fields);
                bucket.time = one.time;
            }
            None => ancient.push(one),
        }
    }
    managers.extend(ancient);
}

/// Applies a configuration: returns the merged object with its managed fields, before defaults.
///
/// `config` has been brought into the type's shape; `live` is none where the object is to be created.
pub fn apply(
    live: Option<&Object>,
    config: &Object,
    ty: TypeId,
    o: &ApplyOptions,
) -> Result<Object, ApplyError> {
    if config["metadata"].get("managedFields").is_some() {
        return Err(ApplyError::Invalid(
            "metadata.managedFields must be nil".into(),
        ));
    }
    let mut merged = match apply_once(live, config, ty, o) {
        Err(ApplyError::Conflicts(conflicts)) if only_with_client_side(live, config, ty, o) => {
            let forced = ApplyOptions { force: true, ..*o };
            debug_assert!(!conflicts.is_empty());
            apply_once(live, config, ty, &forced)?
        }
        result => result?,
    };
    // `kubectl apply` with and without --server-side can follow one another.
    if o.manager == "kubectl"
        && merged["metadata"]["annotations"]
            .get(LAST_APPLIED)
            .is_some()
    {
        let mut applied = config.clone();
        if let Some(annotations) = applied["metadata"]
            .get_mut("annotations")
            .and_then(Value::as_object_mut)
        {
            annotations.remove(LAST_APPLIED);
        }
        merged["metadata"]["annotations"][LAST_APPLIED] = format!("{applied}\n").into();
    }
    Ok(merged)
}

/// The first value that is not of its field's type, in the words of the library that merges typed values.
pub fn mistyped(config: &Object, ty: TypeId) -> Option<String> {
    let fields = &table::get(ty).fields;
    config.as_object()?.iter().find_map(|(name, value)| {
        let field = fields.iter().find(|field| field.name == name)?;
        mistyped_value(value, &field.kind, &format!(".{name}"))
    })
}

fn mistyped_value(value: &Value, kind: &Kind, path: &str) -> Option<String> {
    let expected = match (kind, value) {
        (_, Value::Null) => return None,
        (Kind::String | Kind::Bytes, value) if !value.is_string() => "string",
        (Kind::Boolean, value) if !value.is_boolean() => "boolean",
        (Kind::Int32 | Kind::Int64 | Kind::Double, value) if !value.is_number() => {
            "numeric (int or float)"
        }
        (Kind::List(inner), Value::Array(items)) => {
            return items
                .iter()
                .enumerate()
                .find_map(|(at, item)| mistyped_value(item, inner, &format!("{path}[{at}]")));
        }
        (Kind::List(_), _) => "list",
        (Kind::Map(inner), Value::Object(map)) => {
            return map
                .iter()
                .find_map(|(key, item)| mistyped_value(item, inner, &format!("{path}.{key}")));
        }
        (Kind::Struct(ty), Value::Object(map)) => {
            return map.iter().find_map(|(key, item)| {
                let field = table::get(*ty).field(key)?;
                mistyped_value(item, &field.kind, &format!("{path}.{key}"))
            });
        }
        (Kind::Map(_) | Kind::Struct(_), _) => "map",
        _ => return None,
    };
    Some(format!(
        "{path}: expected {expected}, got &value.valueUnstructured{{Value:{value}}}"
    ))
}

/// Whether all that conflicts was applied by the same user on the client's side before.
fn only_with_client_side(
    live: Option<&Object>,
    config: &Object,
    ty: TypeId,
    o: &ApplyOptions,
) -> bool {
    let Some(live) = live.filter(|_| o.manager == "kubectl") else {
        return false;
    };
    let Some(text) = live["metadata"]["annotations"][LAST_APPLIED].as_str() else {
        return false;
    };
    let Ok(mut last) = serde_json::from_str::<Value>(text) else {
        return false;
    };
    let Ok(last) = crate::decode::conform(&mut last, ty)
        .map_err(|e| e.0)
        .and_then(|_| FieldSet::of(&last, ty))
    else {
        return false;
    };
    let merged = merge(live, config, Shape::Struct(ty));
    let compared = compare(live, &merged, ty, o.subresource);
    let changed = compared.modified.union(&compared.added);
    read_managers(live)
        .unwrap_or_default()
        .iter()
        .filter(|one| !(one.applies && one.manager == o.manager))
        .all(|one| {
            one.fields
                .intersection(&changed)
                .difference(&last)
                .is_empty()
        })
}

fn apply_once(
    live: Option<&Object>,
    config: &Object,
    ty: TypeId,
    o: &ApplyOptions,
) -> Result<Object, ApplyError> {
    let start = live.map_or_else(|| shape::empty(ty), without_managers);
    let mut managers = live.and_then(read_managers).unwrap_or_default();
    if live.is_some() && managers.is_empty() {
        let before = ApplyOptions {
            manager: BEFORE_FIRST_APPLY,
            subresource: "",
            ..*o
        };
        managers = update(&shape::empty(ty), &start, ty, managers, &before);
    }
    let mut own = Manager::new(o, true);
    own.fields = FieldSet::of(config, ty).map_err(ApplyError::Invalid)?;
    strip(&mut own.fields, ty, o.subresource);
    let at = managers.iter().position(|one| one.is(&own));
    let last = at.map(|at| managers.remove(at));
    own.time = last.as_ref().and_then(|last| last.time.clone());

    let base = live.map_or_else(|| json!({}), without_managers);
    let mut merged = merge(&base, config, Shape::Struct(ty));
    if let Some(last) = last.filter(|last| !last.fields.is_empty()) {
        merged = prune(&merged, &last.fields, managers.iter().chain([&own]), ty)
            .map_err(ApplyError::Invalid)?;
    }
    let compared = compare(&base, &merged, ty, o.subresource);
    let changed = compared.modified.union(&compared.added);
    let mut conflicts = Vec::new();
    for other in &managers {
        conflicts.extend(other.fields.intersection(&changed).paths().into_iter().map(
            |field_path| Conflict {
                manager: other.manager.clone(),
                field_path,
                api_version: if other.applies {
                    String::new()
                } else {
                    other.api_version.clone()
                },
                subresource: other.subresource.clone(),
            },
        ));
    }
    if !conflicts.is_empty() && !o.force {
        conflicts.sort_by_key(|one| (one.who(), one.field_path.clone()));
        return Err(ApplyError::Conflicts(conflicts));
    }
    take_from_others(&mut managers, Some(&own), &compared);
    if !compared.is_same() {
        own.time = Some(o.now.to_owned());
    }
    managers.push(own);
    write_managers(&mut merged, managers);
    Ok(merged)
}

/// Removes what the manager applied before, does not apply now, and nobody else has.
fn prune<'a>(
    merged: &Object,
    last: &FieldSet,
    owners: impl Iterator<Item = &'a Manager>,
    ty: TypeId,
) -> Result<Object, String> {
    let shape = Shape::Struct(ty);
    let cut = |set: &FieldSet| set.remove_from(merged, shape).unwrap_or_else(|| json!({}));
    let last = last.with_parents();
    let all = FieldSet::of(merged, ty)?.with_parents();
    let owned = owners
        .fold(FieldSet::default(), |owned, one| owned.union(&one.fields))
        .with_parents();
    let bare = FieldSet::of(&cut(&last), ty)?.with_parents();
    let with_owned = cut(&all.difference(&bare.union(&owned)));
    let kept = FieldSet::of(&with_owned, ty)?.with_parents();
    Ok(cut(&all.difference(&kept).intersection(&last)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: &str = "2026-01-01T00:00:00Z";

    fn ty(name: &str) -> TypeId {
        table::type_by_name(name).unwrap()
    }

    fn by<'a>(manager: &'a str) -> ApplyOptions<'a> {
        ApplyOptions {
            manager,
            force: false,
            api_version: "v1",
            subresource: "",
            now: NOW,
        }
    }

    fn config_map(data: Value) -> Object {
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "cm"}, "data": data})
    }

    #[test]
    fn fields_no_longer_applied_are_removed_unless_shared() {
        let cm = ty("io.k8s.api.core.v1.ConfigMap");
        let first = apply(
            None,
            &config_map(json!({"a": "1", "b": "2"})),
            cm,
            &by("m1"),
        )
        .unwrap();
        let shared = apply(Some(&first), &config_map(json!({"b": "2"})), cm, &by("m2")).unwrap();
        let less = apply(Some(&shared), &config_map(json!({})), cm, &by("m1")).unwrap();
        assert_eq!(less["data"], json!({"b": "2"}));
        let owner = json!({"f:data": {"f:b": {}}});
        let m2 = less["metadata"]["managedFields"]
            .as_array()
            .unwrap()
            .iter()
            .find(|one| one["manager"] == "m2")
            .unwrap();
        assert_eq!((&m2["fieldsV1"], m2.get("time")), (&owner, None));
    }

    #[test]
    fn conflicts_are_told_and_can_be_forced() {
        let cm = ty("io.k8s.api.core.v1.ConfigMap");
        let mut live = config_map(json!({"k": "v"}));
        track_update(None, &mut live, cm, &by("updater"));
        assert_eq!(
            live["metadata"]["managedFields"][0]["fieldsV1"],
            json!({"f:data": {".": {}, "f:k": {}}})
        );
        let other = config_map(json!({"k": "other"}));
        let error = apply(Some(&live), &other, cm, &by("m1")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "Apply failed with 1 conflict: conflict with \"updater\" using v1: .data.k"
        );
        let forced = apply(
            Some(&live),
            &other,
            cm,
            &ApplyOptions {
                force: true,
                ..by("m1")
            },
        )
        .unwrap();
        assert_eq!(
            forced["metadata"]["managedFields"][1]["fieldsV1"],
            json!({"f:data": {}})
        );
        assert_eq!(forced["data"]["k"], "other");
    }

    #[test]
    fn too_many_updaters_are_counted_together() {
        let cm = ty("io.k8s.api.core.v1.ConfigMap");
        let mut live = config_map(json!({}));
        live["data"] = Value::Null;
        for n in 0..15 {
            let mut next = live.clone();
            next["data"][format!("k{n}")] = "v".into();
            let (name, now) = (format!("m{n:02}"), format!("2026-01-01T00:00:{n:02}Z"));
            track_update(
                (n > 0).then_some(&live),
                &mut next,
                cm,
                &ApplyOptions {
                    now: &now,
                    ..by(&name)
                },
            );
            live = next;
        }
        let managers = live["metadata"]["managedFields"].as_array().unwrap();
        assert_eq!(managers.len(), MOST_UPDATERS);
        assert_eq!(
            managers
                .iter()
                .filter(|one| one["manager"] == ANCIENT)
                .count(),
            1
        );
    }
}
