//! Sets of field paths as server-side apply keeps them (`FieldsV1`), and what walks typed objects with them.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::table::{self, Field, Kind, ListType, TypeId};

/// A set of paths. Path elements are kept in their `FieldsV1` spelling: `f:name`, `k:{"name":"c"}`, `v:"x"`, `i:0`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldSet {
    nodes: BTreeMap<String, Node>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Node {
    member: bool,
    children: FieldSet,
}

impl FieldSet {
    /// Reads `fieldsV1`; what is not of its form is left out.
    pub fn from_fields_v1(fields: &Value) -> Self {
        let mut set = Self::default();
        for (key, value) in fields
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(key, _)| *key != ".")
        {
            let children = Self::from_fields_v1(value);
            let member = children.nodes.is_empty() || value.get(".").is_some();
            set.nodes.insert(key.clone(), Node { member, children });
        }
        set
    }

    /// Writes `fieldsV1`.
    pub fn to_fields_v1(&self) -> Value {
        let entries = self.nodes.iter().map(|(key, node)| {
            let mut value = node.children.to_fields_v1();
            if let (true, Some(map)) = (
                node.member && !node.children.nodes.is_empty(),
                value.as_object_mut(),
            ) {
                map.insert(".".into(), Value::Object(Map::new()));
            }
            (key.clone(), value)
        });
        Value::Object(entries.collect())
    }

    /// Whether it has no path.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    fn put(&mut self, key: &str, node: Node) {
        if node.member || !node.children.is_empty() {
            self.nodes.insert(key.to_owned(), node);
        }
    }

    /// The paths of either.
    pub fn union(&self, other: &Self) -> Self {
        let mut set = self.clone();
        for (key, node) in &other.nodes {
            let mine = set.nodes.entry(key.clone()).or_default();
            mine.member |= node.member;
            mine.children = mine.children.union(&node.children);
        }
        set
    }

    /// The paths of both.
    pub fn intersection(&self, other: &Self) -> Self {
        let mut set = Self::default();
        for (key, node) in &self.nodes {
            if let Some(theirs) = other.nodes.get(key) {
                let children = node.children.intersection(&theirs.children);
                set.put(
                    key,
                    Node {
                        member: node.member && theirs.member,
                        children,
                    },
                );
            }
        }
        set
    }

    /// The paths of this one that are not the other's.
    pub fn difference(&self, other: &Self) -> Self {
        let mut set = Self::default();
        for (key, node) in &self.nodes {
            match other.nodes.get(key) {
                None => set.put(key, node.clone()),
                Some(theirs) => {
                    let children = node.children.difference(&theirs.children);
                    set.put(
                        key,
                        Node {
                            member: node.member && !theirs.member,
                            children,
                        },
                    );
                }
            }
        }
        set
    }

    /// The set without a path of fields and all that is below it.
    pub fn without(&mut self, path: &[&str]) {
        let Some((first, rest)) = path.split_first() else {
            return;
        };
        let key = format!("f:{first}");
        if rest.is_empty() {
            self.nodes.remove(&key);
        } else if let Some(node) = self.nodes.get_mut(&key) {
            node.children.without(rest);
            if !node.member && node.children.is_empty() {
                self.nodes.remove(&key);
            }
        }
    }

    /// Takes one field at the top out of the set without what is below it.
    pub fn without_member(&mut self, field: &str) {
        let key = format!("f:{field}");
        if let Some(node) = self.nodes.get_mut(&key) {
            node.member = false;
            if node.children.is_empty() {
                self.nodes.remove(&key);
            }
        }
    }

    /// The set with every path that leads to a member a member too.
    pub fn with_parents(&self) -> Self {
        let nodes = self.nodes.iter().map(|(key, node)| {
            (
                key.clone(),
                Node {
                    member: true,
                    children: node.children.with_parents(),
                },
            )
        });
        Self {
            nodes: nodes.collect(),
        }
    }

    /// Its paths as messages say them: `.spec.containers[name="c"].image`.
    pub fn paths(&self) -> Vec<String> {
        let mut paths = Vec::new();
        self.collect_paths("", &mut paths);
        paths
    }

    fn collect_paths(&self, prefix: &str, paths: &mut Vec<String>) {
        for (key, node) in &self.nodes {
            let path = format!("{prefix}{}", spoken(key));
            if node.member {
                paths.push(path.clone());
            }
            node.children.collect_paths(&path, paths);
        }
    }

    /// Every path of an object, as an applied configuration owns it.
    pub fn of(object: &Value, ty: TypeId) -> Result<Self, String> {
        let mut set = Self::default();
        set.add(object, Shape::Struct(ty), "")?;
        Ok(set)
    }

    /// Adds what is below `value`; true where the value is a member by itself.
    fn add(&mut self, value: &Value, shape: Shape, path: &str) -> Result<bool, String> {
        match (shape, value) {
            (Shape::Struct(_) | Shape::Map(_), Value::Object(map)) => {
                for (name, value) in map {
                    let inner = shape.of_key(name);
                    let mut node = Node::default();
                    let leaf = node.children.add(value, inner, &format!("{path}.{name}"))?;
                    let empty = value.is_null() || value.as_object().is_some_and(Map::is_empty);
                    node.member = leaf || empty || matches!(shape, Shape::Map(_));
                    self.put(&format!("f:{name}"), node);
                }
                Ok(false)
            }
            (Shape::Keyed(inner, _) | Shape::Set(inner), Value::Array(items)) => {
                for (at, item) in items.iter().enumerate() {
                    let key = shape.item_key(item).ok_or_else(|| {
                        format!("{path}: element {at}: associative list with keys has an element that omits key field")
                    })?;
                    let mut node = Node {
                        member: true,
                        children: Self::default(),
                    };
                    // Items with the same key are owned together, not by their fields.
                    if self.nodes.contains_key(&key) {
                        self.put(&key, node);
                        continue;
                    }
                    node.children.add(
                        item,
                        Shape::of_kind(inner),
                        &format!("{path}{}", spoken(&key)),
                    )?;
                    self.put(&key, node);
                }
                Ok(false)
            }
            (Shape::Leaf, _) => Ok(true),
            (_, Value::Null) => Ok(false),
            _ => Ok(true),
        }
    }

    /// The value without the set's paths; nothing where nothing is left of it.
    pub fn remove_from(&self, value: &Value, shape: Shape) -> Option<Value> {
        let cut = |key: &str, value: &Value, inner: Shape| match self.nodes.get(key) {
            None => Some(value.clone()),
            Some(node) if node.member => None,
            Some(node) => node.children.remove_from(value, inner),
        };
        match (shape, value) {
            (Shape::Struct(_) | Shape::Map(_), Value::Object(map)) => {
                let kept: Map<String, Value> = map
                    .iter()
                    .filter_map(|(name, value)| {
                        Some((
                            name.clone(),
                            cut(&format!("f:{name}"), value, shape.of_key(name))?,
                        ))
                    })
                    .collect();
                (!kept.is_empty() || map.is_empty()).then_some(Value::Object(kept))
            }
            (Shape::Keyed(inner, _) | Shape::Set(inner), Value::Array(items)) => {
                let kept: Vec<Value> = items
                    .iter()
                    .filter_map(|item| match shape.item_key(item) {
                        Some(key) => cut(&key, item, Shape::of_kind(inner)),
                        None => Some(item.clone()),
                    })
                    .collect();
                (!kept.is_empty() || items.is_empty()).then_some(Value::Array(kept))
            }
            _ => Some(value.clone()),
        }
    }
}

/// A path element as messages say it.
fn spoken(key: &str) -> String {
    match key.split_once(':') {
        Some(("f", name)) => format!(".{name}"),
        Some(("k", fields)) => {
            let fields: Map<String, Value> = serde_json::from_str(fields).unwrap_or_default();
            let parts: Vec<String> = fields
                .iter()
                .map(|(name, value)| format!("{name}={value}"))
                .collect();
            format!("[{}]", parts.join(","))
        }
        Some(("v", value)) => format!("[={value}]"),
        Some((_, index)) => format!("[{index}]"),
        None => key.to_owned(),
    }
}

/// How apply takes a value apart.
#[derive(Clone, Copy, Debug)]
pub enum Shape {
    /// Not at all.
    Leaf,
    /// By the fields of a type.
    Struct(TypeId),
    /// By keys.
    Map(&'static Kind),
    /// A list by key fields of its items.
    Keyed(&'static Kind, &'static [&'static str]),
    /// A list by its scalars.
    Set(&'static Kind),
}

impl Shape {
    fn of_field(field: &'static Field) -> Self {
        match &field.kind {
            Kind::List(inner) => match field.list_type {
                ListType::Atomic => Shape::Leaf,
                ListType::Set => Shape::Set(inner),
                ListType::Map => Shape::Keyed(inner, &field.list_keys),
            },
            _ if field.atomic_map => Shape::Leaf,
            Kind::Struct(id) if field.granular_map => Shape::Struct(*id),
            kind => Self::of_kind(kind),
        }
    }

    fn of_kind(kind: &'static Kind) -> Self {
        match kind {
            Kind::Map(inner) => Shape::Map(inner),
            Kind::Struct(id) if !table::get(*id).atomic && !table::get(*id).fields.is_empty() => {
                Shape::Struct(*id)
            }
            _ => Shape::Leaf,
        }
    }

    fn of_key(self, name: &str) -> Self {
        match self {
            Shape::Struct(ty) => table::get(ty)
                .field(name)
                .map_or(Shape::Leaf, Self::of_field),
            Shape::Map(inner) => Self::of_kind(inner),
            _ => Shape::Leaf,
        }
    }

    /// The path element of a list's item; none for an item without its keys.
    fn item_key(self, item: &Value) -> Option<String> {
        match self {
            Shape::Set(_) => Some(format!("v:{item}")),
            Shape::Keyed(_, keys) => {
                let mut found = Map::new();
                for key in keys {
                    match item.get(*key) {
                        Some(value) => drop(found.insert((*key).to_owned(), value.clone())),
                        // The only key field of the API that has a default.
                        None if *key == "protocol" => {
                            drop(found.insert("protocol".into(), "TCP".into()))
                        }
                        None => {}
                    }
                }
                (!found.is_empty()).then(|| format!("k:{}", Value::Object(found)))
            }
            _ => None,
        }
    }
}

/// What differs between two objects.
#[derive(Debug, Default)]
pub struct Comparison {
    /// Only the second has it.
    pub added: FieldSet,
    /// Both have it, with different values.
    pub modified: FieldSet,
    /// Only the first has it.
    pub removed: FieldSet,
}

#[derive(Default)]
struct Difference {
    added: Node,
    modified: Node,
    removed: Node,
}

impl Comparison {
    /// Compares two objects of a type.
    pub fn of(old: &Value, new: &Value, ty: TypeId) -> Self {
        let difference = compare(Some(old), Some(new), Shape::Struct(ty));
        Self {
            added: difference.added.children,
            modified: difference.modified.children,
            removed: difference.removed.children,
        }
    }

    /// Whether nothing differs.
    pub fn is_same(&self) -> bool {
        self.added.is_empty() && self.modified.is_empty() && self.removed.is_empty()
    }
}

fn compare(old: Option<&Value>, new: Option<&Value>, shape: Shape) -> Difference {
    let mut found = Difference::default();
    if old == new {
        return found;
    }
    let empty = |value: Option<&Value>| match value {
        None | Some(Value::Null) => true,
        Some(Value::Object(map)) => map.is_empty(),
        Some(Value::Array(items)) => items.is_empty(),
        Some(_) => false,
    };
    let mut inner = |key: &str, old: Option<&Value>, new: Option<&Value>, shape: Shape| {
        let below = compare(old, new, shape);
        found.added.children.put(key, below.added);
        found.modified.children.put(key, below.modified);
        found.removed.children.put(key, below.removed);
    };
    let mut leaf = empty(old) && empty(new);
    match shape {
        _ if leaf => {}
        Shape::Struct(_) | Shape::Map(_) => {
            let (before, after) = (
                old.and_then(Value::as_object),
                new.and_then(Value::as_object),
            );
            for (name, value) in before.into_iter().flatten() {
                inner(
                    &format!("f:{name}"),
                    Some(value),
                    after.and_then(|map| map.get(name)),
                    shape.of_key(name),
                );
            }
            for (name, value) in after.into_iter().flatten() {
                if !before.is_some_and(|map| map.contains_key(name)) {
                    inner(&format!("f:{name}"), None, Some(value), shape.of_key(name));
                }
            }
        }
        Shape::Keyed(kind, _) | Shape::Set(kind) => {
            // Items with the same key are compared together, as a whole.
            let by_key = |list: Option<&Value>| -> BTreeMap<String, Vec<Value>> {
                let mut found: BTreeMap<String, Vec<Value>> = BTreeMap::new();
                for item in list.and_then(Value::as_array).into_iter().flatten() {
                    if let Some(key) = shape.item_key(item) {
                        found.entry(key).or_default().push(item.clone());
                    }
                }
                found
            };
            let (before, after) = (by_key(old), by_key(new));
            let mut one = |key: &str, old: Option<&Vec<Value>>, new: Option<&Vec<Value>>| {
                let many = |items: Option<&Vec<Value>>| items.is_some_and(|all| all.len() > 1);
                if many(old) || many(new) {
                    let whole =
                        |items: Option<&Vec<Value>>| items.map(|all| Value::from(all.clone()));
                    let (old, new) = (whole(old), whole(new));
                    return inner(key, old.as_ref(), new.as_ref(), Shape::Leaf);
                }
                let single =
                    |items: Option<&'_ Vec<Value>>| items.and_then(|all| all.first().cloned());
                let (old, new) = (single(old), single(new));
                inner(key, old.as_ref(), new.as_ref(), Shape::of_kind(kind));
            };
            for (key, items) in &before {
                one(key, Some(items), after.get(key));
            }
            for (key, items) in after.iter().filter(|(key, _)| !before.contains_key(*key)) {
                one(key, None, Some(items));
            }
        }
        Shape::Leaf => leaf = true,
    }
    match (old, new) {
        (None, _) => found.added.member = true,
        (_, None) => found.removed.member = true,
        _ => found.modified.member = leaf,
    }
    found
}

/// Merges an applied configuration into an object: what it does not name stays.
pub fn merge(live: &Value, config: &Value, shape: Shape) -> Value {
    match (shape, live, config) {
        (Shape::Struct(_) | Shape::Map(_), Value::Object(old), Value::Object(new)) => {
            let mut merged = old.clone();
            for (name, value) in new {
                let value = old.get(name).map_or_else(
                    || value.clone(),
                    |old| merge(old, value, shape.of_key(name)),
                );
                merged.insert(name.clone(), value);
            }
            Value::Object(merged)
        }
        (Shape::Keyed(kind, _) | Shape::Set(kind), Value::Array(old), Value::Array(new)) => {
            merge_list(old, new, shape, Shape::of_kind(kind))
        }
        _ => config.clone(),
    }
}

/// Both lists' items; those that both have come in the configuration's order.
fn merge_list(old: &[Value], new: &[Value], shape: Shape, inner: Shape) -> Value {
    let keys = |list: &[Value]| -> Vec<Option<String>> {
        list.iter().map(|item| shape.item_key(item)).collect()
    };
    let (old_keys, new_keys) = (keys(old), keys(new));
    let mut shared = new_keys
        .iter()
        .filter(|key| old_keys.contains(key))
        .peekable();
    let (mut at_old, mut at_new, mut merged) = (0, 0, Vec::new());
    while at_old < old.len() || at_new < new.len() {
        if let Some(key) = old_keys.get(at_old) {
            if !new_keys.contains(key) {
                merged.push(old[at_old].clone());
                at_old += 1;
                continue;
            }
            // It comes where the configuration has it; the one that is next there takes both along.
            if at_new >= new.len() || shared.peek().is_none_or(|next| *next != key) {
                at_old += 1;
                continue;
            }
        }
        let Some(key) = new_keys.get(at_new) else {
            break;
        };
        match old_keys.iter().position(|one| one == key) {
            Some(at) => {
                merged.push(merge(&old[at], &new[at_new], inner));
                shared.next();
                if at == at_old {
                    at_old += 1;
                }
            }
            None => merged.push(new[at_new].clone()),
        }
        at_new += 1;
    }
    Value::Array(merged)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn deployment() -> TypeId {
        table::type_by_name("io.k8s.api.apps.v1.Deployment").unwrap()
    }

    #[test]
    fn sets_go_there_and_back() {
        let fields = json!({"f:a": {".": {}, "f:b": {}}, "f:c": {"k:{\"name\":\"x\"}": {".": {}, "f:name": {}}}});
        let set = FieldSet::from_fields_v1(&fields);
        assert_eq!(set.to_fields_v1(), fields);
        assert_eq!(
            set.paths(),
            [".a", ".a.b", ".c[name=\"x\"]", ".c[name=\"x\"].name"]
        );
        let less = FieldSet::from_fields_v1(&json!({"f:a": {"f:b": {}}}));
        assert_eq!(set.difference(&less).intersection(&set).union(&less), set);
        assert!(set.difference(&set).is_empty());
    }

    #[test]
    fn lists_merge_in_the_configurations_order() {
        let item = |name: &str| json!({"name": name});
        let pod = table::type_by_name("io.k8s.api.core.v1.PodSpec").unwrap();
        for (live, config, want) in [
            ("abc", "ca", "bca"),
            ("ab", "bxa", "bxa"),
            ("", "ab", "ab"),
            ("ab", "c", "abc"),
            ("abc", "b", "abc"),
        ] {
            let list = |names: &str| json!({"containers": names.chars().map(|c| item(&c.to_string())).collect::<Vec<_>>()});
            assert_eq!(
                merge(&list(live), &list(config), Shape::Struct(pod)),
                list(want),
                "{live} {config}"
            );
        }
    }

    #[test]
    fn comparing_tells_added_from_modified() {
        let old = json!({"spec": {"replicas": 1, "paused": true}});
        let new =
            json!({"spec": {"replicas": 2, "template": {"metadata": {"labels": {"a": "b"}}}}});
        let found = Comparison::of(&old, &new, deployment());
        assert_eq!(found.modified.paths(), [".spec.replicas"]);
        assert_eq!(found.removed.paths(), [".spec.paused"]);
        assert_eq!(
            found.added.paths().last().unwrap(),
            ".spec.template.metadata.labels.a"
        );
        assert!(Comparison::of(&old, &old, deployment()).is_same());
    }
}
