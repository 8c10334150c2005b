//! Validation of volumes.

use super::super::at::{At, Errors};
use super::super::names;
use super::container::Volumes;
use super::env;
use crate::quantity::Quantity;

/// Sources in the order in which a second one is found out.
const SOURCES: &[&str] = &[
    "emptyDir",
    "hostPath",
    "gitRepo",
    "gcePersistentDisk",
    "awsElasticBlockStore",
    "secret",
    "nfs",
    "iscsi",
    "glusterfs",
    "flocker",
    "persistentVolumeClaim",
    "rbd",
    "cinder",
    "cephfs",
    "quobyte",
    "downwardAPI",
    "fc",
    "azureFile",
    "configMap",
    "vsphereVolume",
    "photonPersistentDisk",
    "portworxVolume",
    "azureDisk",
    "storageos",
    "projected",
    "scaleIO",
    "csi",
    "ephemeral",
    "image",
];
const HOST_PATHS: &[&str] = &[
    "",
    "BlockDevice",
    "CharDevice",
    "Directory",
    "DirectoryOrCreate",
    "File",
    "FileOrCreate",
    "Socket",
];

/// Checks volumes, and gives those that can be mounted.
pub(super) fn volumes<'v>(volumes: &At<'_, 'v>, errors: &mut Errors) -> Volumes<'v> {
    let mut found = Volumes::new();
    for volume in volumes.items() {
        let before = errors.len();
        source(&volume, errors);
        let name = volume.field("name");
        name.required_name(names::dns1123_label, errors);
        if found.contains_key(name.text()) {
            name.duplicate(name.value, errors);
        }
        if errors.len() == before {
            found.insert(name.text(), volume.value);
        }
    }
    found
}

fn source(volume: &At<'_, '_>, errors: &mut Errors) {
    let mut given = 0;
    for name in SOURCES {
        let source = volume.field(name);
        if !source.is_set() {
            continue;
        }
        given += 1;
        if given > 1 {
            source.forbidden("may not specify more than 1 volume type", errors);
            continue;
        }
        match *name {
            "emptyDir" => {
                let limit = source.field("sizeLimit");
                if Quantity::parse(limit.text()).is_ok_and(|limit| limit.nano_value() < 0) {
                    let detail = "SizeLimit field must be a valid resource quantity";
                    limit.forbidden(detail, errors);
                }
            }
            "hostPath" => {
                let path = source.field("path");
                if path.required(errors) {
                    path.no_backsteps(errors);
                    source.field("type").one_of_if_set(HOST_PATHS, errors);
                }
            }
            "secret" => {
                source.field("secretName").required(errors);
                keys(&source, errors);
            }
            "configMap" => {
                source.field("name").required(errors);
                keys(&source, errors);
            }
            "nfs" => {
                source.field("server").required(errors);
                let path = source.field("path");
                if path.required(errors) && !path.text().starts_with('/') {
                    path.invalid("must be an absolute path", errors);
                }
            }
            "persistentVolumeClaim" => drop(source.field("claimName").required(errors)),
            "downwardAPI" => {
                mode(&source.field("defaultMode"), errors);
                for file in source.field("items").items() {
                    env::downward_file(&file, &source, errors);
                }
            }
            "csi" => drop(source.field("driver").required(errors)),
            "projected" => projected(&source, errors),
            _ => {}
        }
    }
    if given == 0 {
        volume.missing("must specify a volume type", errors);
    }
}

/// `defaultMode` and `items` of what is made of keys.
fn keys(source: &At<'_, '_>, errors: &mut Errors) {
    mode(&source.field("defaultMode"), errors);
    for item in source.field("items").items() {
        item.field("key").required(errors);
        file_path(&item.field("path"), errors);
        mode(&item.field("mode"), errors);
    }
}

/// Permission bits of a file.
pub(super) fn mode(mode: &At<'_, '_>, errors: &mut Errors) {
    if mode.is_set() && !(0..=0o777).contains(&mode.number()) {
        let detail = "must be a number between 0 and 0777 (octal), both inclusive";
        mode.invalid(detail, errors);
    }
}

/// The path of a file in a volume; names that begin with two dots are the kubelet's.
pub(super) fn file_path(path: &At<'_, '_>, errors: &mut Errors) {
    if !path.required(errors) {
        return;
    }
    let before = errors.len();
    path.local_path(errors);
    if errors.len() == before && path.text().starts_with("..") {
        path.invalid("must not start with '..'", errors);
    }
}

fn projected(volume: &At<'_, '_>, errors: &mut Errors) {
    mode(&volume.field("defaultMode"), errors);
    for source in volume.field("sources").items() {
        let mut given = 0;
        for name in [
            "secret",
            "configMap",
            "downwardAPI",
            "serviceAccountToken",
            "clusterTrustBundle",
            "podCertificate",
        ] {
            let part = source.field(name);
            if !part.is_set() {
                continue;
            }
            given += 1;
            if given > 1 {
                let detail = "may not specify more than 1 volume type per source";
                source.forbidden(detail, errors);
                continue;
            }
            match name {
                "secret" | "configMap" => {
                    part.field("name").required(errors);
                    keys(&part, errors);
                }
                "downwardAPI" => {
                    for file in part.field("items").items() {
                        env::downward_file(&file, &part, errors);
                    }
                }
                "serviceAccountToken" => token(volume, &part, errors),
                _ => {}
            }
        }
    }
}

fn token(volume: &At<'_, '_>, token: &At<'_, '_>, errors: &mut Errors) {
    let expiration = token.field("expirationSeconds");
    let seconds = expiration.number();
    if expiration.is_set() && seconds < 600 {
        let detail = "may not specify a duration less than 10 minutes";
        expiration.invalid(detail, errors);
    }
    if seconds > 1 << 32 {
        let detail = "may not specify a duration larger than 2^32 seconds";
        expiration.invalid(detail, errors);
    }
    // The real server names the volume's path, not the token's.
    let path = token.field("path");
    file_path(&volume.field("path").showing(path.value), errors);
}
