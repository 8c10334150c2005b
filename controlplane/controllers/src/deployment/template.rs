//! Pod templates: are two the same, and which hash names one.

use k8s_openapi::api::core::v1::PodTemplateSpec;

/// The label that tells the pods of one revision from those of another.
pub(super) const HASH_LABEL: &str = "pod-template-hash";

/// Whether two templates make the same pods, but for the hash label.
pub(super) fn equal(a: &PodTemplateSpec, b: &PodTemplateSpec) -> bool {
    let plain = |template: &PodTemplateSpec| {
        let mut template = template.clone();
        if let Some(meta) = &mut template.metadata {
            if let Some(labels) = &mut meta.labels {
                labels.remove(HASH_LABEL);
            }
            meta.labels = meta.labels.take().filter(|labels| !labels.is_empty());
            meta.annotations = meta.annotations.take().filter(|notes| !notes.is_empty());
            meta.creation_timestamp = None;
        }
        template
    };
    plain(a) == plain(b)
}

/// A short name for the template in the alphabet of Kubernetes' generated names; another
/// `collisions` gives another.
pub(super) fn hash(template: &PodTemplateSpec, collisions: i32) -> anyhow::Result<String> {
    // FNV-1a, 32 bit.
    let mut hash: u32 = 0x811c_9dc5;
    let mut take = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
        }
    };
    // Through a value, so that the order of keys is fixed.
    take(serde_json::to_value(template)?.to_string().as_bytes());
    if collisions > 0 {
        take(&collisions.to_le_bytes());
    }
    const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let letter = |digit: u8| char::from(ALPHABET[usize::from(digit) % ALPHABET.len()]);
    Ok(hash.to_string().bytes().map(letter).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn template(image: &str, labels: serde_json::Value) -> PodTemplateSpec {
        serde_json::from_value(json!({
            "metadata": {"labels": labels},
            "spec": {"containers": [{"name": "c", "image": image}]},
        }))
        .unwrap()
    }

    #[test]
    fn only_the_hash_label_may_differ() {
        let a = template("i:1", json!({"app": "web"}));
        assert!(equal(
            &a,
            &template("i:1", json!({"app": "web", "pod-template-hash": "x"}))
        ));
        assert!(!equal(&a, &template("i:2", json!({"app": "web"}))));
        assert!(!equal(
            &a,
            &template("i:1", json!({"app": "web", "tier": "x"}))
        ));
    }

    #[test]
    fn the_hash_tells_templates_and_collisions_apart_and_reads_like_upstreams() {
        let a = template("i:1", json!({"app": "web"}));
        let first = hash(&a, 0).unwrap();
        assert_eq!(first, hash(&a.clone(), 0).unwrap());
        assert_ne!(first, hash(&a, 1).unwrap());
        assert_ne!(
            first,
            hash(&template("i:2", json!({"app": "web"})), 0).unwrap()
        );
        assert!(
            first.len() <= 10
                && first
                    .bytes()
                    .all(|c| b"bcdfghjklmnpqrstvwxz2456789".contains(&c))
        );
    }
}
