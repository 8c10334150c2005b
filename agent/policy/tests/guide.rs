//! The recipes of the guide are policies that can be enforced.
#![allow(clippy::unwrap_used, reason = "tests")]

use serde::Deserialize;
use serde_json::Value;
use xebec_policy::read::read;
use xebec_policy::rule::Source;

#[test]
fn the_recipes_are_understood() {
    let guide = include_str!("../../../docs/policies.md");
    let mut blocks = guide.split("```yaml\n").skip(1).peekable();
    assert!(blocks.peek().is_some());
    for block in blocks {
        let (yaml, _) = block.split_once("```").unwrap();
        for document in serde_yaml_ng::Deserializer::from_str(yaml) {
            let object = Value::deserialize(document).unwrap();
            let text = |field: &str| object[field].as_str().unwrap_or_default();
            let source = Source::of(text("apiVersion"), text("kind"));
            let source = source.unwrap_or_else(|| panic!("it is no policy: {yaml}"));
            assert_eq!(read(source, &object).1, [""; 0], "{yaml}");
        }
    }
}
