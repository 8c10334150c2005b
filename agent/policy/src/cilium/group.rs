//! CiliumCIDRGroup: address blocks that policies name together.

use ipnet::IpNet;
use serde_json::Value;

use super::peers::read_block;
use crate::object::list;
use crate::places::Group;

/// Reads a CiliumCIDRGroup. Blocks that can't be understood are errors; until then, what denies it denies everybody
/// outside of the cluster.
pub fn read(group: &Value) -> (Group, Vec<String>) {
    let mut errors = Vec::new();
    let mut told = |error: String| {
        errors.push(format!(
            "spec.{error}; rules that allow do not mean it, rules that deny it deny all outside of the cluster"
        ));
    };
    let all = list(&group["spec"], "externalCIDRs").and_then(|all| {
        all.ok_or_else(|| "externalCIDRs: is not there; write a list of address blocks".to_owned())
    });
    let all = all.unwrap_or_else(|error| {
        told(error);
        &[]
    });
    let mut blocks: Vec<IpNet> = Vec::new();
    for (at, one) in all.iter().enumerate() {
        match read_block(one) {
            Ok(block) => blocks.push(block),
            Err(error) => told(format!("externalCIDRs[{at}]: {error}")),
        }
    }
    let whole = errors.is_empty();
    (Group { blocks, whole }, errors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn blocks_and_addresses_are_read_and_the_rest_is_told() {
        let (group, errors) =
            read(&json!({"spec": {"externalCIDRs": ["10.1.2.3/8", "192.0.2.1", "::/0"]}}));
        assert_eq!((group.whole, errors.len()), (true, 0));
        let blocks: Vec<String> = group.blocks.iter().map(ToString::to_string).collect();
        assert_eq!(blocks, ["10.0.0.0/8", "192.0.2.1/32", "::/0"]);
        for (spec, left, words) in [
            (
                json!({"externalCIDRs": ["10.0.0.0/8", "ten"]}),
                1,
                "spec.externalCIDRs[1]: \"ten\" is no address block",
            ),
            (json!({"externalCIDRs": "::/0"}), 0, "is no list"),
            (json!({}), 0, "spec.externalCIDRs: is not there"),
        ] {
            let (group, errors) = read(&json!({"spec": spec}));
            assert_eq!((group.whole, group.blocks.len()), (false, left));
            assert!(errors[0].contains(words), "{errors:?}");
        }
    }
}
