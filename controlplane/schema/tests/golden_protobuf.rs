//! Decodes each kind's example in protobuf and compares it with the same example in JSON.
//!
//! Skipped with a line where the examples are not there.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::path::Path;

use serde_json::Value;
use xebec_schema::protobuf::{self, ProtobufError};
use xebec_schema::{decode, table};

#[test]
fn every_kind_says_the_same_in_protobuf_as_in_json() {
    let folder = Path::new("../../../shared/golden/kubernetes-api/v1.36.0");
    let Ok(files) = std::fs::read_dir(folder) else {
        println!("skipped: no examples");
        return;
    };
    let (mut same, mut other, mut refused) = (0, Vec::new(), Vec::new());
    for path in files.flatten().map(|file| file.path()) {
        if path.extension().is_none_or(|end| end != "pb") {
            continue;
        }
        let json: Value =
            serde_json::from_slice(&std::fs::read(path.with_extension("json")).unwrap()).unwrap();
        let (version, kind) = decode::gvk_of(&json);
        let (group, number) = version.split_once('/').unwrap_or(("", &version));
        let Some(ty) = table::type_of_kind(group, number, &kind) else {
            continue;
        };
        let body = std::fs::read(&path).unwrap();
        let envelope = protobuf::open(&body).unwrap();
        assert_eq!((&envelope.api_version, &envelope.kind), (&version, &kind));
        let mut wanted = json.clone();
        decode::conform(&mut wanted, ty).unwrap();
        let mut got = match protobuf::decode(envelope.raw, ty) {
            Ok(got) => got,
            // Refused whole: nothing of it is lost unseen.
            Err(ProtobufError::Unnumbered(name, number)) => {
                refused.push(format!("{version} {kind}: {name} {number}"));
                continue;
            }
            Err(error) => panic!("{version} {kind}: {error}"),
        };
        got["apiVersion"] = version.clone().into();
        got["kind"] = kind.clone().into();
        decode::conform(&mut got, ty).unwrap();
        xebec_schema::shape::complete(&mut wanted, ty);
        xebec_schema::shape::complete(&mut got, ty);
        if wanted == got {
            same += 1;
        } else {
            other.push(format!("{version} {kind}"));
        }
    }
    assert!(
        other.is_empty(),
        "{same} are the same, others not: {other:?}"
    );
    println!("{same} are the same; refused: {refused:#?}");
    assert!(same >= 94, "only {same} examples are the same");
}
