//! The type table: what types, fields and resources the API has, read once from two committed text files.

use std::collections::HashMap;
use std::sync::LazyLock;

/// A type's place in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TypeId(u32);

/// What a value is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A string.
    String,
    /// A 32-bit integer.
    Int32,
    /// A 64-bit integer.
    Int64,
    /// A floating-point number.
    Double,
    /// A truth value.
    Boolean,
    /// Base64 text.
    Bytes,
    /// Any JSON.
    Any,
    /// `resource.Quantity`.
    Quantity,
    /// `intstr.IntOrString`.
    IntOrString,
    /// `meta/v1` Time.
    Time,
    /// `meta/v1` MicroTime.
    MicroTime,
    /// A list.
    List(Box<Kind>),
    /// A map from strings.
    Map(Box<Kind>),
    /// A struct of the table.
    Struct(TypeId),
}

/// How a list is merged by apply (`x-kubernetes-list-type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListType {
    /// Replaced as a whole.
    Atomic,
    /// A set of scalars.
    Set,
    /// Structs told apart by key fields.
    Map,
}

/// What is written for a field that was not set or has its type's zero value (`data/zeros.txt`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zero {
    /// Nothing where it was not set, the zero value where that was set.
    AsGiven,
    /// Nothing in both cases.
    Nothing,
    /// Null.
    Null,
    /// The empty string.
    Text,
    /// False.
    False,
    /// The number 0.
    Number,
    /// The quantity 0.
    Quantity,
    /// The struct, with what its own fields always have.
    Struct,
}

/// One field of a type.
#[derive(Clone, Debug)]
pub struct Field {
    /// Its JSON name.
    pub name: &'static str,
    /// Its protobuf number; 0 where it is not known.
    pub number: u32,
    /// The numbers of the messages around it that JSON does not name (Go's embedded structs), the outermost first.
    pub outer: Box<[u32]>,
    /// What it holds.
    pub kind: Kind,
    /// What stands for it when it is not set.
    pub zero: Zero,
    /// OpenAPI says that it must be there.
    pub required: bool,
    /// How its list is merged by apply.
    pub list_type: ListType,
    /// `x-kubernetes-list-map-keys`.
    pub list_keys: Vec<&'static str>,
    /// `x-kubernetes-map-type: atomic`.
    pub atomic_map: bool,
    /// `x-kubernetes-map-type: granular`, also where the field's type is atomic.
    pub granular_map: bool,
    /// `x-kubernetes-patch-merge-key`.
    pub merge_key: Option<&'static str>,
    /// `x-kubernetes-patch-strategy` has `merge`.
    pub merge: bool,
    /// `x-kubernetes-patch-strategy` has `retainKeys`.
    pub retain_keys: bool,
}

/// A type: its fields in name order.
#[derive(Debug)]
pub struct Type {
    /// The OpenAPI name, such as `io.k8s.api.core.v1.PodSpec`.
    pub name: &'static str,
    /// Fields by name.
    pub fields: Vec<Field>,
    /// Apply takes it as one value.
    pub atomic: bool,
}

impl Type {
    /// The field with exactly this name.
    pub fn field(&self, name: &str) -> Option<&Field> {
        self.fields
            .binary_search_by(|field| field.name.cmp(name))
            .ok()
            .map(|at| &self.fields[at])
    }
}

/// A resource that the API serves.
#[derive(Debug)]
pub struct Resource {
    /// API group; empty for the core group.
    pub group: &'static str,
    /// API version.
    pub version: &'static str,
    /// Name in paths.
    pub plural: &'static str,
    /// Name for one.
    pub singular: &'static str,
    /// Kind.
    pub kind: &'static str,
    /// Whether objects live in namespaces.
    pub namespaced: bool,
    /// Short names for kubectl.
    pub short_names: Vec<&'static str>,
    /// Categories such as `all`.
    pub categories: Vec<&'static str>,
    /// Verbs, sorted.
    pub verbs: Vec<&'static str>,
    /// Subresources, sorted.
    pub subresources: Vec<Subresource>,
    /// Its objects' type.
    pub type_id: TypeId,
}

impl Resource {
    /// `v1`, `apps/v1`.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.to_owned()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    /// `pods`, `deployments.apps`: how messages name it.
    pub fn qualified(&self) -> String {
        if self.group.is_empty() {
            self.plural.to_owned()
        } else {
            format!("{}.{}", self.plural, self.group)
        }
    }

    /// Its list's kind.
    pub fn list_kind(&self) -> String {
        format!("{}List", self.kind)
    }

    /// Whether it has this verb.
    pub fn has_verb(&self, verb: &str) -> bool {
        self.verbs.contains(&verb)
    }

    /// Its subresource with this name.
    pub fn subresource(&self, name: &str) -> Option<&Subresource> {
        self.subresources.iter().find(|sub| sub.name == name)
    }

    /// Whether objects of it are kept, as opposed to answered on the spot (reviews, bindings).
    pub fn is_stored(&self) -> bool {
        self.has_verb("list") && self.plural != "componentstatuses"
    }

    /// Its type.
    pub fn ty(&self) -> &'static Type {
        get(self.type_id)
    }
}

/// A subresource of a resource.
#[derive(Debug)]
pub struct Subresource {
    /// Name in paths.
    pub name: &'static str,
    /// Group of its kind; empty where it is the resource's own.
    pub group: &'static str,
    /// Version of its kind; empty where it is the resource's own.
    pub version: &'static str,
    /// Its kind.
    pub kind: &'static str,
    /// Verbs, sorted.
    pub verbs: Vec<&'static str>,
}

struct Table {
    types: Vec<Type>,
    by_name: HashMap<&'static str, TypeId>,
    by_kind: HashMap<(&'static str, &'static str, &'static str), TypeId>,
    resources: Vec<Resource>,
}

static TABLE: LazyLock<Table> = LazyLock::new(|| {
    let types = include_str!("../data/types.txt");
    let mut by_name = HashMap::new();
    for line in types.lines() {
        if let Some(rest) = line.strip_prefix("type ") {
            let id = TypeId(by_name.len() as u32);
            by_name.insert(rest.split(' ').next().unwrap_or_default(), id);
        }
    }
    let mut table = Table {
        types: Vec::new(),
        by_name,
        by_kind: HashMap::new(),
        resources: Vec::new(),
    };
    for line in types.lines() {
        table.read_type_line(line);
    }
    for line in include_str!("../data/zeros.txt").lines() {
        table.read_zero_line(line);
    }
    for line in include_str!("../data/resources.txt").lines() {
        table.read_resource_line(line);
    }
    table
});

/// A word of the files where `-` stands for nothing.
fn word(text: &'static str) -> &'static str {
    if text == "-" { "" } else { text }
}

impl Table {
    fn read_type_line(&mut self, line: &'static str) {
        let mut words = line.split(' ');
        match words.next() {
            Some("type") => {
                let name = words.next().unwrap_or_default();
                self.types.push(Type {
                    name,
                    fields: Vec::new(),
                    atomic: words.next() == Some("map=atomic"),
                });
            }
            Some("gvk") => {
                let mut next = || word(words.next().unwrap_or_default());
                let key = (next(), next(), next());
                self.by_kind
                    .insert(key, TypeId(self.types.len() as u32 - 1));
            }
            Some("") => {
                let (name, number) = (
                    words.next().unwrap_or_default(),
                    words.next().unwrap_or_default(),
                );
                let mut field = Field {
                    name,
                    number: number
                        .rsplit('.')
                        .next()
                        .and_then(|last| last.parse().ok())
                        .unwrap_or(0),
                    outer: number
                        .rsplit_once('.')
                        .iter()
                        .flat_map(|(outer, _)| outer.split('.'))
                        .filter_map(|one| one.parse().ok())
                        .collect(),
                    kind: self.kind(words.next().unwrap_or_default()),
                    zero: Zero::AsGiven,
                    required: false,
                    list_type: ListType::Atomic,
                    list_keys: Vec::new(),
                    atomic_map: false,
                    granular_map: false,
                    merge_key: None,
                    merge: false,
                    retain_keys: false,
                };
                for mark in words {
                    match mark.split_once('=') {
                        None => field.required = mark == "required",
                        Some(("list", "map")) => field.list_type = ListType::Map,
                        Some(("list", "set")) => field.list_type = ListType::Set,
                        Some(("keys", keys)) => field.list_keys = keys.split('+').collect(),
                        Some(("map", "granular")) => field.granular_map = true,
                        Some(("map", _)) => field.atomic_map = true,
                        Some(("merge", key)) => field.merge_key = Some(key),
                        Some(("strategy", strategy)) => {
                            field.merge = strategy.contains("merge");
                            field.retain_keys = strategy.contains("retainKeys");
                        }
                        Some(_) => {}
                    }
                }
                if let Some(current) = self.types.last_mut() {
                    current.fields.push(field);
                }
            }
            _ => {}
        }
    }

    fn read_zero_line(&mut self, line: &'static str) {
        let mut words = line.split(' ');
        let name = words.next().unwrap_or_default();
        let Some(ty) = self.by_name.get(name).map(|id| id.0 as usize) else {
            return;
        };
        for (name, mark) in words.filter_map(|word| word.split_once('=')) {
            let fields = &mut self.types[ty].fields;
            if let Ok(at) = fields.binary_search_by(|field| field.name.cmp(name)) {
                fields[at].zero = match mark {
                    "d" => Zero::Nothing,
                    "n" => Zero::Null,
                    "s" => Zero::Text,
                    "b" => Zero::False,
                    "i" => Zero::Number,
                    "q" => Zero::Quantity,
                    "o" => Zero::Struct,
                    _ => Zero::AsGiven,
                };
            }
        }
    }

    fn kind(&self, text: &'static str) -> Kind {
        if let Some(inner) = text
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
        {
            return Kind::List(Box::new(self.kind(inner)));
        }
        if let Some(inner) = text
            .strip_prefix('{')
            .and_then(|rest| rest.strip_suffix('}'))
        {
            return Kind::Map(Box::new(self.kind(inner)));
        }
        match text {
            "string" => Kind::String,
            "int32" => Kind::Int32,
            "int64" => Kind::Int64,
            "double" => Kind::Double,
            "boolean" => Kind::Boolean,
            "bytes" => Kind::Bytes,
            "io.k8s.apimachinery.pkg.api.resource.Quantity" => Kind::Quantity,
            "io.k8s.apimachinery.pkg.util.intstr.IntOrString" => Kind::IntOrString,
            "io.k8s.apimachinery.pkg.apis.meta.v1.Time" => Kind::Time,
            "io.k8s.apimachinery.pkg.apis.meta.v1.MicroTime" => Kind::MicroTime,
            "io.k8s.apimachinery.pkg.apis.meta.v1.FieldsV1"
            | "io.k8s.apimachinery.pkg.runtime.RawExtension"
            | "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSON"
            | "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrArray"
            | "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrBool"
            | "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrStringArray" => {
                Kind::Any
            }
            name => self
                .by_name
                .get(name)
                .map_or(Kind::Any, |id| Kind::Struct(*id)),
        }
    }

    fn read_resource_line(&mut self, line: &'static str) {
        let mut words = line.split(' ').peekable();
        let all = [
            "create",
            "delete",
            "deletecollection",
            "get",
            "list",
            "patch",
            "update",
            "watch",
        ];
        let list = |text: &'static str| -> Vec<&'static str> {
            if text == "all" {
                all.to_vec()
            } else {
                text.split('+').collect()
            }
        };
        let marks = |words: &mut dyn Iterator<Item = &'static str>| {
            let (mut shorts, mut categories, mut verbs) = (Vec::new(), Vec::new(), Vec::new());
            for mark in words {
                match mark.split_once('=') {
                    Some(("shorts", text)) => shorts = list(text),
                    // Here `all` is a category's own name.
                    Some(("categories", text)) => categories = text.split('+').collect(),
                    Some(("verbs", text)) => verbs = list(text),
                    _ => {}
                }
            }
            (shorts, categories, verbs)
        };
        match words.next() {
            Some("resource") => {
                let mut next = || word(words.next().unwrap_or_default());
                let (group, version, plural, singular, kind) =
                    (next(), next(), next(), next(), next());
                let namespaced = next() == "namespaced";
                let (short_names, categories, verbs) = marks(&mut words);
                let Some(type_id) = self.by_kind.get(&(group, version, kind)).copied() else {
                    return;
                };
                self.resources.push(Resource {
                    group,
                    version,
                    plural,
                    singular,
                    kind,
                    namespaced,
                    short_names,
                    categories,
                    verbs,
                    subresources: Vec::new(),
                    type_id,
                });
            }
            Some("") if words.next() == Some("sub") => {
                let mut next = || word(words.next().unwrap_or_default());
                let (name, group, version, kind) = (next(), next(), next(), next());
                let (_, _, verbs) = marks(&mut words);
                if let Some(resource) = self.resources.last_mut() {
                    resource.subresources.push(Subresource {
                        name,
                        group,
                        version,
                        kind,
                        verbs,
                    });
                }
            }
            _ => {}
        }
    }
}

/// A type by its place.
pub fn get(id: TypeId) -> &'static Type {
    &TABLE.types[id.0 as usize]
}

/// A type by its OpenAPI name.
pub fn type_by_name(name: &str) -> Option<TypeId> {
    TABLE.by_name.get(name).copied()
}

/// The type of a kind, whether or not it is a resource of its own (`Eviction`, `DeleteOptions`).
pub fn type_of_kind(group: &str, version: &str, kind: &str) -> Option<TypeId> {
    // The map's keys live forever; here they need only live as long as the question's.
    let by_kind: &HashMap<(&str, &str, &str), TypeId> = &TABLE.by_kind;
    by_kind.get(&(group, version, kind)).copied()
}

/// All types, in name order.
pub fn types() -> &'static [Type] {
    &TABLE.types
}

/// The group, version and kind of a type that has one.
pub fn kinds_of(id: TypeId) -> Vec<(&'static str, &'static str, &'static str)> {
    let mut kinds: Vec<_> = TABLE
        .by_kind
        .iter()
        .filter(|(_, other)| **other == id)
        .map(|(kind, _)| *kind)
        .collect();
    kinds.sort_unstable();
    kinds
}

/// All resources, in discovery's order.
pub fn resources() -> &'static [Resource] {
    &TABLE.resources
}

/// A resource by its path.
pub fn resource(group: &str, version: &str, plural: &str) -> Option<&'static Resource> {
    resources()
        .iter()
        .find(|r| r.plural == plural && r.group == group && r.version == version)
}

/// The resource whose objects are of this type.
pub fn resource_of(id: TypeId) -> Option<&'static Resource> {
    resources().iter().find(|resource| resource.type_id == id)
}

/// A resource by its kind.
pub fn resource_for_kind(group: &str, version: &str, kind: &str) -> Option<&'static Resource> {
    resources()
        .iter()
        .find(|r| r.kind == kind && r.group == group && r.version == version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_whole() {
        assert_eq!(resources().len(), 68);
        let pods = resource("", "v1", "pods").unwrap();
        assert_eq!(
            (pods.kind, pods.namespaced, pods.short_names.as_slice()),
            ("Pod", true, ["po"].as_slice())
        );
        assert_eq!(pods.categories, ["all"]);
        assert!(pods.subresource("binding").is_some());
        let spec = get(type_by_name("io.k8s.api.core.v1.PodSpec").unwrap());
        let containers = spec.field("containers").unwrap();
        assert_eq!(
            (containers.number, containers.merge_key, containers.required),
            (2, Some("name"), true)
        );
        let ports = get(type_by_name("io.k8s.api.core.v1.ServiceSpec").unwrap())
            .field("ports")
            .unwrap();
        assert_eq!(
            (ports.list_type, ports.list_keys.as_slice()),
            (ListType::Map, ["port", "protocol"].as_slice())
        );
        for ty in types() {
            assert!(
                ty.fields.windows(2).all(|pair| pair[0].name < pair[1].name),
                "{} is sorted",
                ty.name
            );
        }
    }
}
