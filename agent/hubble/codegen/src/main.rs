//! Generates `src/pb` of `xebec-hubble` from `proto`: messages, gRPC, and their JSON; without protoc.
//!
//! Usage: `cargo run -- ../proto ../src/pb`

use std::path::Path;

use anyhow::{Context, bail};
use prost::Message;

const PACKAGES: [&str; 4] = ["flow", "observer", "peer", "relay"];
/// What people read as JSON.
const JSON: [&str; 3] = [".flow", ".observer", ".relay"];

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [proto, out] = args.as_slice() else {
        bail!("usage: xebec-hubble-codegen PROTO_DIR OUT_DIR");
    };
    let mut compiler = protox::Compiler::new([Path::new(proto)])?;
    compiler.include_imports(true).include_source_info(false);
    for package in PACKAGES {
        compiler.open_file(format!("{package}/{package}.proto"))?;
    }
    let set = compiler.file_descriptor_set();
    let tmp = std::env::temp_dir().join(format!("xebec-hubble-{}", std::process::id()));
    std::fs::create_dir_all(&tmp)?;
    tonic_prost_build::configure()
        .out_dir(&tmp)
        .compile_well_known_types(true)
        .extern_path(".google.protobuf", "crate::wkt")
        .compile_fds(set.clone())?;
    pbjson_build::Builder::new()
        .register_descriptors(&set.encode_to_vec())?
        .out_dir(&tmp)
        .preserve_proto_field_names()
        .ignore_unknown_fields()
        .build(&JSON)?;
    for package in PACKAGES {
        let read = |name: String| {
            std::fs::read_to_string(tmp.join(&name)).with_context(|| format!("there is no {name}"))
        };
        let code = read(format!("{package}.rs"))?;
        // A package without JSON has an empty file, or none.
        let json = read(format!("{package}.serde.rs")).unwrap_or_default();
        std::fs::write(
            Path::new(out).join(format!("{package}.rs")),
            format!(
                "// Hubble's package `{package}`; written by agent/hubble/codegen.\n{code}\n{json}"
            ),
        )?;
    }
    std::fs::remove_dir_all(&tmp)?;
    std::fs::write(Path::new(out).join("fields.rs"), fields(&set)?)?;
    Ok(())
}

/// Names and numbers of the fields of `flow.Flow` and of what is inside it, for field masks.
fn fields(set: &prost_types::FileDescriptorSet) -> anyhow::Result<String> {
    let flow = set.file.iter().find(|file| file.package() == "flow");
    let flow = flow.context("there is no package flow")?;
    let message = |name: &str| flow.message_type.iter().find(|one| one.name() == name);
    let mut waiting = vec!["Flow".to_owned()];
    let mut done = std::collections::BTreeMap::new();
    while let Some(name) = waiting.pop() {
        if done.contains_key(&name) {
            continue;
        }
        let fields = &message(&name).with_context(|| format!("there is no {name}"))?.field;
        let mut table = String::new();
        for field in fields {
            let inside = field.type_name().strip_prefix(".flow.");
            let inside = inside.filter(|name| message(name).is_some());
            let table_name = match inside {
                Some(inside) => {
                    waiting.push(inside.to_owned());
                    constant(inside)
                }
                None => "&[]".to_owned(),
            };
            table += &format!(
                "    Field {{ name: {:?}, number: {}, inside: {table_name} }},\n",
                field.name(),
                field.number()
            );
        }
        done.insert(name, table);
    }
    let mut code = "// Fields of `flow.Flow` and what is inside it; written by agent/hubble/codegen.\n\
        use crate::mask::Field;\n"
        .to_owned();
    for (name, table) in done {
        let public = if name == "Flow" { "pub(crate) " } else { "" };
        let name = constant(&name);
        code += &format!("{public}static {}: &[Field] = &[\n{table}];\n", name);
    }
    Ok(code)
}

fn constant(message: &str) -> String {
    let mut name = String::new();
    let mut before = '_';
    for letter in message.chars() {
        if letter.is_uppercase() && before.is_lowercase() {
            name.push('_');
        }
        name.extend(letter.to_uppercase());
        before = letter;
    }
    name
}
