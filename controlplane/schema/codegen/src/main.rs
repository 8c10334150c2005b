//! Writes `data/types.txt`: every type of the Kubernetes API with its fields, from two packages of the registries.
//!
//! - PyPI `kubernetes-validate`: the OpenAPI definitions with their `x-kubernetes-*` marks;
//! - crates.io `k8s-pb`: the protobuf field numbers.
//!
//! `--check` compares instead of writing.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// The release whose types are served, as the PyPI package numbers it.
const KUBERNETES: &str = "1.36.0";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("codegen: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Our package's folder in the clone that runs us; several may share one target folder.
fn manifest_dir() -> Result<PathBuf> {
    std::env::var_os("CARGO_MANIFEST_DIR")
        .map(PathBuf::from)
        .context("CARGO_MANIFEST_DIR is not set: run `cargo xtask codegen`")
}

fn run() -> Result<()> {
    let check = match std::env::args().nth(1).as_deref() {
        None => false,
        Some("--check") => true,
        Some(other) => bail!("{other:?} is not known; only --check is"),
    };
    let table = render(&definitions()?, &field_numbers()?)?;
    let path = manifest_dir()?.join("../data/types.txt");
    if !check {
        return std::fs::write(&path, table)
            .with_context(|| format!("could not write {}", path.display()));
    }
    let committed = std::fs::read_to_string(&path)
        .with_context(|| format!("could not read {}", path.display()))?;
    if committed != table {
        bail!(
            "{} is not what the packages say; run `cargo xtask codegen` and commit it",
            path.display()
        );
    }
    println!("the committed type table is what the packages say");
    Ok(())
}

/// The OpenAPI definitions, by name.
fn definitions() -> Result<BTreeMap<String, Value>> {
    let dir = std::env::temp_dir().join(format!("xebec-codegen-{}", std::process::id()));
    std::fs::create_dir_all(&dir).with_context(|| format!("could not make {}", dir.display()))?;
    let read = || -> Result<BTreeMap<String, Value>> {
        let package = format!("kubernetes-validate=={KUBERNETES}");
        command(
            "python3",
            &[
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--dest",
                &dir.to_string_lossy(),
                &package,
            ],
        )?;
        let wheel = std::fs::read_dir(&dir)?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
            .with_context(|| format!("pip brought no wheel of {package}"))?;
        command(
            "python3",
            &[
                "-m",
                "zipfile",
                "-e",
                &wheel.to_string_lossy(),
                &dir.to_string_lossy(),
            ],
        )?;
        let path = dir.join(format!(
            "kubernetes_validate/kubernetes-json-schema/v{KUBERNETES}-local/_definitions.json"
        ));
        let text =
            std::fs::read(&path).with_context(|| format!("the wheel has no {}", path.display()))?;
        let mut document: Value =
            serde_json::from_slice(&text).context("the definitions are no JSON")?;
        serde_json::from_value(document["$defs"].take()).context("the definitions have no $defs")
    };
    let definitions = read();
    let _ = std::fs::remove_dir_all(&dir);
    definitions
}

fn command(program: &str, args: &[&str]) -> Result<()> {
    let status = Command::new(program)
        .args(args)
        .status()
        .with_context(|| format!("could not start {program}"))?;
    if !status.success() {
        bail!("`{program} {}` failed: {status}", args.join(" "));
    }
    Ok(())
}

/// Fields that are newer than the declarations, each the only one of its type: their numbers as encoded objects of
/// this release show them.
const NEWER: &[(&str, &str, u32)] = &[
    (
        "io.k8s.api.certificates.v1beta1.PodCertificateRequestSpec",
        "stubPKCS10Request",
        12,
    ),
    ("io.k8s.api.core.v1.PodSchedulingGroup", "podGroupName", 1),
    ("io.k8s.api.core.v1.PodSpec", "schedulingGroup", 43),
    (
        "io.k8s.api.storage.v1.CSIDriverSpec",
        "preventPodSchedulingIfMissing",
        11,
    ),
    (
        "io.k8s.apimachinery.pkg.apis.meta.v1.ListMeta",
        "shardInfo",
        5,
    ),
    (
        "io.k8s.apimachinery.pkg.apis.meta.v1.ShardInfo",
        "selector",
        1,
    ),
];

/// A field's number, and the message that it holds.
struct Declared {
    number: u32,
    message: Option<String>,
}

/// Fields by type and name, both in lower case without separators: prost and Go spell them differently.
type Numbers = HashMap<String, HashMap<String, Declared>>;

fn field_numbers() -> Result<Numbers> {
    let metadata = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args([
            "metadata",
            "--format-version=1",
            "--features",
            "xebec-codegen/field-numbers",
        ])
        .current_dir(manifest_dir()?)
        .output()
        .context("could not start cargo")?;
    if !metadata.status.success() {
        bail!(
            "cargo metadata failed: {}",
            String::from_utf8_lossy(&metadata.stderr)
        );
    }
    let metadata: Value =
        serde_json::from_slice(&metadata.stdout).context("cargo metadata gave no JSON")?;
    let manifest = metadata["packages"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|package| package["name"] == "k8s-pb")
        .and_then(|package| package["manifest_path"].as_str())
        .context("cargo knows no k8s-pb")?;
    let source = Path::new(manifest).with_file_name("src");
    let mut numbers = Numbers::new();
    read_sources(&source, &mut Vec::new(), &mut numbers)?;
    Ok(numbers)
}

fn read_sources(dir: &Path, modules: &mut Vec<String>, numbers: &mut Numbers) -> Result<()> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(dir)
        .with_context(|| format!("could not list {}", dir.display()))?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    paths.sort();
    for path in paths {
        let name = path
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if path.is_dir() {
            modules.push(name);
            read_sources(&path, modules, numbers)?;
            modules.pop();
        } else if name == "mod" {
            let text = std::fs::read_to_string(&path)
                .with_context(|| format!("could not read {}", path.display()))?;
            read_structs(&text, modules, numbers);
        }
    }
    Ok(())
}

/// Reads `pub struct Name {` with its `#[prost(…, tag = "N")]` fields.
fn read_structs(text: &str, modules: &[String], numbers: &mut Numbers) {
    let module = modules.join("");
    let (mut current, mut tag) = (String::new(), None);
    for line in text.lines().map(str::trim) {
        if let Some(name) = line
            .strip_prefix("pub struct ")
            .and_then(|rest| rest.split([' ', '{']).next())
        {
            current = plain(&format!("{module}{name}"));
        } else if line.starts_with("#[prost(") || line.contains("tag = \"") {
            tag = line
                .split("tag = \"")
                .nth(1)
                .and_then(|rest| rest.split('"').next()?.parse::<u32>().ok());
        } else if let (Some((name, kind)), Some(number)) = (
            line.strip_prefix("pub ")
                .and_then(|rest| rest.split_once(':')),
            tag,
        ) {
            let declared = Declared {
                number,
                message: message_of(kind, modules),
            };
            numbers
                .entry(current.clone())
                .or_default()
                .insert(plain(name.trim_start_matches("r#")), declared);
            tag = None;
        }
    }
}

/// The key of the message that a single field of this Rust type holds.
fn message_of(kind: &str, modules: &[String]) -> Option<String> {
    let path = kind
        .trim()
        .strip_prefix("::core::option::Option<")?
        .trim_end_matches(',')
        .strip_suffix('>')?;
    if path.starts_with("::") {
        return None;
    }
    let mut modules = modules.to_vec();
    for part in path.split("::") {
        if part == "super" {
            modules.pop();
        } else {
            modules.push(part.to_owned());
        }
    }
    Some(plain(&modules.join("")))
}

/// Where a JSON field stands in a message: its number, after those of the messages that JSON writes without a
/// name of their own (Go's embedded structs), such as a volume's source.
fn path_of(
    numbers: &Numbers,
    message: &str,
    field: &str,
    named: &dyn Fn(&str) -> bool,
) -> Option<Vec<u32>> {
    let fields = numbers.get(message)?;
    if let Some(declared) = fields.get(field) {
        return Some(vec![declared.number]);
    }
    fields
        .iter()
        .filter(|(name, _)| !named(name))
        .find_map(|(_, declared)| {
            let inner = path_of(numbers, declared.message.as_ref()?, field, &|_| false)?;
            Some([&[declared.number][..], &inner].concat())
        })
}

/// The key of a type's message: of a version that the declarations do not have, that of another version of the
/// same group, since numbers stay when a type moves on.
fn message_key(numbers: &Numbers, name: &str) -> Option<String> {
    let key = numbers_key(name);
    if numbers.contains_key(&key) {
        return Some(key);
    }
    let (rest, kind) = name.rsplit_once('.')?;
    let (group, _) = rest.rsplit_once('.')?;
    [
        "v1", "v1beta2", "v1beta1", "v1alpha3", "v1alpha2", "v1alpha1",
    ]
    .iter()
    .map(|version| numbers_key(&format!("{group}.{version}.{kind}")))
    .find(|key| numbers.contains_key(key))
}

fn plain(name: &str) -> String {
    name.chars()
        .filter(char::is_ascii_alphanumeric)
        .map(|c| c.to_ascii_lowercase())
        .collect()
}

/// The key of an OpenAPI name in `Numbers`: `io.k8s.api.core.v1.PodSpec` is `apicorev1podspec` there.
fn numbers_key(name: &str) -> String {
    plain(name.strip_prefix("io.k8s.").unwrap_or(name))
}

fn render(definitions: &BTreeMap<String, Value>, numbers: &Numbers) -> Result<String> {
    let mut out = format!(
        "# Types of the Kubernetes {KUBERNETES} API; generated by `cargo xtask codegen`, not edited by hand.\n\
         # Derived from the Kubernetes OpenAPI definitions and protobuf declarations (Apache-2.0).\n\
         # NUMBER: of the field in protobuf, after those of the messages that JSON does not name; 0 if not known\n\
         # type NAME / gvk GROUP VERSION KIND / FIELD NUMBER TYPE [required] [list=…] [keys=…] [merge=…] [strategy=…] [map=…]\n\
         # TYPE: string int32 int64 double boolean bytes any, [T] a list, {{T}} a map, else a type's name\n"
    );
    let mut unnumbered = Vec::new();
    for (name, definition) in definitions {
        writeln!(out, "type {name}{}", kind_of(definition))?;
        for gvk in definition["x-kubernetes-group-version-kind"]
            .as_array()
            .into_iter()
            .flatten()
        {
            let text = |key: &str| {
                gvk[key]
                    .as_str()
                    .filter(|text| !text.is_empty())
                    .unwrap_or("-")
            };
            writeln!(
                out,
                "gvk {} {} {}",
                text("group"),
                text("version"),
                text("kind")
            )?;
        }
        let required: Vec<&str> = definition["required"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let message = message_key(numbers, name);
        let names: Vec<String> = definition["properties"]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(field, _)| plain(field))
            .collect();
        for (field, schema) in definition["properties"].as_object().into_iter().flatten() {
            let path = message.as_ref().and_then(|message| {
                let named = |name: &str| names.iter().any(|one| one == name);
                path_of(numbers, message, &plain(field), &named)
            });
            let newer = || {
                NEWER
                    .iter()
                    .find(|(of, newer, _)| of == name && newer == field)
                    .map(|(_, _, number)| vec![*number])
            };
            let path = path.or_else(newer);
            if path.is_none() && !matches!(field.as_str(), "kind" | "apiVersion") {
                unnumbered.push(format!("{name}.{field}"));
            }
            write!(
                out,
                " {field} {} {}",
                path.map_or_else(
                    || "0".to_owned(),
                    |path| path
                        .iter()
                        .map(u32::to_string)
                        .collect::<Vec<_>>()
                        .join(".")
                ),
                type_of(schema)?
            )?;
            if required.contains(&field.as_str()) {
                out.push_str(" required");
            }
            for (mark, key) in [
                ("x-kubernetes-list-type", "list"),
                ("x-kubernetes-map-type", "map"),
                ("x-kubernetes-patch-merge-key", "merge"),
                ("x-kubernetes-patch-strategy", "strategy"),
            ] {
                if let Some(value) = schema[mark].as_str() {
                    write!(out, " {key}={value}")?;
                }
            }
            if let Some(keys) = schema["x-kubernetes-list-map-keys"].as_array() {
                let keys: Vec<&str> = keys.iter().filter_map(Value::as_str).collect();
                write!(out, " keys={}", keys.join("+"))?;
            }
            out.push('\n');
        }
    }
    eprintln!(
        "{} types; {} fields have no protobuf number of their own",
        definitions.len(),
        unnumbered.len()
    );
    Ok(out)
}

/// What a type without properties is on the wire, and a mark for atomic structs.
fn kind_of(definition: &Value) -> &'static str {
    if definition["x-kubernetes-map-type"] == "atomic" {
        " map=atomic"
    } else {
        ""
    }
}

fn type_of(schema: &Value) -> Result<String> {
    if let Some(reference) = schema["$ref"].as_str() {
        return Ok(reference.trim_start_matches("#/$defs/").to_owned());
    }
    // The package makes everything nullable: the type is the one that is not null.
    let kind = match &schema["type"] {
        Value::Array(kinds) => kinds
            .iter()
            .filter_map(Value::as_str)
            .find(|kind| *kind != "null"),
        kind => kind.as_str(),
    };
    Ok(match (kind, schema["format"].as_str()) {
        (Some("string"), Some("byte")) => "bytes".into(),
        (Some("integer"), Some(format)) => format.into(),
        (Some("integer"), None) => "int64".into(),
        (Some("number"), _) => "double".into(),
        (Some("array"), _) => format!("[{}]", type_of(&schema["items"])?),
        (Some("object"), _) if schema["additionalProperties"].is_object() => {
            format!("{{{}}}", type_of(&schema["additionalProperties"])?)
        }
        (Some("object") | None, _) => "any".into(),
        (Some(kind), _) => kind.into(),
    })
}
