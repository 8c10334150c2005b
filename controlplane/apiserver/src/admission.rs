//! Admission: what is filled in and refused between defaulting and storing.

use serde_json::{Value, json};
use xebec_schema::Object;
use xebec_schema::table::{self, Resource};

use crate::error::ApiError;
use crate::registry::{self, Registry};

/// Namespaces that can't be deleted.
const PROTECTED: &[&str] = &["default", "kube-system", "kube-public"];
/// Seconds that pods stay on a node that is not ready or not reachable, by default.
const TOLERATION_SECONDS: i64 = 300;

impl Registry {
    /// The namespace must be there and not be on its way out (NamespaceLifecycle).
    pub(crate) async fn admit_namespace(
        &self,
        resource: &'static Resource,
        namespace: &str,
        name: &str,
    ) -> Result<(), ApiError> {
        let Some(namespaces) = table::resource("", "v1", "namespaces") else {
            return Ok(());
        };
        let stored = self.get_stored(namespaces, None, namespace).await?;
        // Asked for every new object: what does not even name the field needs no decoding.
        const FIELD: &[u8] = b"\"deletionTimestamp\"";
        if !stored.value.windows(FIELD.len()).any(|word| word == FIELD)
            || registry::decode(&stored)?["metadata"]["deletionTimestamp"].is_null()
        {
            return Ok(());
        }
        let why = format!(
            "unable to create new content in namespace {namespace} because it is being terminated"
        );
        let cause = json!({
            "reason": "NamespaceTerminating", "field": "metadata.namespace",
            "message": format!("namespace {namespace} is being terminated"),
        });
        Err(ApiError::forbidden_object(resource, name, &why).with_causes(json!([cause])))
    }

    /// What a new object is given by admission.
    pub(crate) async fn admit_create(
        &self,
        resource: &'static Resource,
        object: &mut Object,
    ) -> Result<(), ApiError> {
        if resource.group.is_empty() && resource.kind == "Pod" {
            self.admit_pod_account(resource, object).await?;
            self.admit_priority(resource, object).await?;
            admit_overhead(resource, object)?;
            default_tolerations(object);
        }
        if resource.group.is_empty() && resource.kind == "Node" {
            taint_until_ready(object);
        }
        if self.storage_protection {
            protect_in_use(resource, object);
        }
        Ok(())
    }

    /// ServiceAccount: the pod's account must exist, and its token is mounted.
    async fn admit_pod_account(
        &self,
        resource: &'static Resource,
        pod: &mut Object,
    ) -> Result<(), ApiError> {
        let namespace = pod["metadata"]["namespace"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        let pod_name = pod["metadata"]["name"]
            .as_str()
            .or(pod["metadata"]["generateName"].as_str())
            .unwrap_or_default()
            .to_owned();
        // A static pod's mirror has none.
        if pod["metadata"]["annotations"]
            .get("kubernetes.io/config.mirror")
            .is_some()
        {
            return Ok(());
        }
        if pod["spec"]["serviceAccountName"]
            .as_str()
            .unwrap_or_default()
            .is_empty()
        {
            pod["spec"]["serviceAccountName"] = "default".into();
        }
        let account_name = pod["spec"]["serviceAccountName"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        pod["spec"]["serviceAccount"] = account_name.clone().into();
        let Some(accounts) = table::resource("", "v1", "serviceaccounts") else {
            return Ok(());
        };
        let account = self.get(accounts, Some(&namespace), &account_name).await.map_err(|_| {
            let why = format!("error looking up service account {namespace}/{account_name}: serviceaccount {account_name:?} not found");
            ApiError::forbidden_object(resource, &pod_name, &why)
        })?;
        let choice = |value: &Value| value.as_bool();
        let mount = choice(&pod["spec"]["automountServiceAccountToken"])
            .or(choice(&account["automountServiceAccountToken"]))
            .unwrap_or(true);
        if mount {
            mount_token(&mut pod["spec"]);
        }
        if pod["spec"]["imagePullSecrets"].is_null() && account["imagePullSecrets"].is_array() {
            pod["spec"]["imagePullSecrets"] = account["imagePullSecrets"].clone();
        }
        Ok(())
    }

    /// Priority: a class's name becomes its number.
    async fn admit_priority(
        &self,
        resource: &'static Resource,
        pod: &mut Object,
    ) -> Result<(), ApiError> {
        let class_name = pod["spec"]["priorityClassName"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        let (mut priority, mut policy) = (0, json!("PreemptLowerPriority"));
        if !class_name.is_empty() {
            let Some(classes) = table::resource("scheduling.k8s.io", "v1", "priorityclasses")
            else {
                return Ok(());
            };
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            let class = self.get(classes, None, &class_name).await.map_err(|_| {
                ApiError::forbidden_object(
                    resource,
                    name,
                    &format!("no PriorityClass with name {class_name} was found"),
                )
            })?;
            priority = class["value"].as_i64().unwrap_or(0);
            policy = class["preemptionPolicy"].clone();
        }
        if let Some(given) = pod["spec"]["priority"]
            .as_i64()
            .filter(|given| *given != priority)
        {
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            let why = format!(
                "the integer value of priority ({given}) must not be provided in pod spec; priority admission controller computed {priority} from the given PriorityClass name"
            );
            return Err(ApiError::forbidden_object(resource, name, &why));
        }
        pod["spec"]["priority"] = priority.into();
        if pod["spec"]["preemptionPolicy"].is_null() {
            pod["spec"]["preemptionPolicy"] = policy;
        }
        Ok(())
    }

    /// Whether an object may be deleted at all.
    pub(crate) fn admit_delete(&self, resource: &Resource, name: &str) -> Result<(), ApiError> {
        if resource.group.is_empty() && resource.kind == "Namespace" && PROTECTED.contains(&name) {
            return Err(ApiError::forbidden_object(
                resource,
                name,
                "this namespace may not be deleted",
            ));
        }
        Ok(())
    }
}

/// The projected volume `kube-api-access-…` with token, authority and namespace, mounted into every container.
fn mount_token(spec: &mut Value) {
    const PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
    let mounts_it = |container: &Value| {
        container["volumeMounts"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|m| m["mountPath"] == PATH)
    };
    let volume = token_volume_name();
    let mut used = false;
    for list in ["initContainers", "containers"] {
        for container in spec[list].as_array_mut().into_iter().flatten() {
            if mounts_it(container) {
                continue;
            }
            let mount = json!({"name": volume, "mountPath": PATH, "readOnly": true});
            match container["volumeMounts"].as_array_mut() {
                Some(mounts) => mounts.push(mount),
                None => container["volumeMounts"] = json!([mount]),
            }
            used = true;
        }
    }
    if !used {
        return;
    }
    let source = json!({"name": volume, "projected": {"defaultMode": 0o644, "sources": [
        {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}},
    ]}});
    match spec["volumes"].as_array_mut() {
        Some(volumes) => volumes.push(source),
        None => spec["volumes"] = json!([source]),
    }
}

fn token_volume_name() -> String {
    const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let suffix: String = (0..5)
        .map(|_| LETTERS[rand::random_range(0..LETTERS.len())] as char)
        .collect();
    format!("kube-api-access-{suffix}")
}

/// A new node takes no pods before its kubelet says that it is ready (TaintNodesByCondition).
fn taint_until_ready(node: &mut Object) {
    const KEY: &str = "node.kubernetes.io/not-ready";
    let taint = json!({"key": KEY, "effect": "NoSchedule"});
    match node["spec"]["taints"].as_array_mut() {
        Some(all) => {
            if !all
                .iter()
                .any(|one| one["key"] == KEY && one["effect"] == "NoSchedule")
            {
                all.push(taint);
            }
        }
        None => node["spec"]["taints"] = json!([taint]),
    }
}

/// StorageObjectInUseProtection.
fn protect_in_use(resource: &Resource, object: &mut Object) {
    let finalizer = match (resource.group, resource.kind) {
        ("", "PersistentVolume") => "kubernetes.io/pv-protection",
        ("", "PersistentVolumeClaim") => "kubernetes.io/pvc-protection",
        ("storage.k8s.io", "VolumeAttributesClass") => "kubernetes.io/vac-protection",
        _ => return,
    };
    match object["metadata"]["finalizers"].as_array_mut() {
        Some(all) if all.iter().any(|one| one == finalizer) => {}
        Some(all) => all.push(finalizer.into()),
        None => object["metadata"]["finalizers"] = json!([finalizer]),
    }
}

/// What a changed object is given by admission.
pub(crate) fn admit_update(resource: &Resource, object: &mut Object) {
    if resource.group.is_empty() && resource.kind == "Pod" {
        default_tolerations(object);
    }
}

/// RuntimeClass: what running a pod costs besides is its class's to say.
fn admit_overhead(resource: &Resource, pod: &Object) -> Result<(), ApiError> {
    let spec = &pod["spec"];
    let costs = spec["overhead"]
        .as_object()
        .is_some_and(|overhead| !overhead.is_empty());
    if !costs || spec["runtimeClassName"].is_string() {
        return Ok(());
    }
    let why = "pod rejected: Pod Overhead set without corresponding RuntimeClass defined Overhead";
    let name = pod["metadata"]["name"].as_str().unwrap_or_default();
    Err(ApiError::forbidden_object(resource, name, why))
}

/// DefaultTolerationSeconds.
fn default_tolerations(pod: &mut Object) {
    for taint in [
        "node.kubernetes.io/not-ready",
        "node.kubernetes.io/unreachable",
    ] {
        let covered = pod["spec"]["tolerations"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|toleration| {
                let key = toleration["key"].as_str().unwrap_or_default();
                let effect = toleration["effect"].as_str().unwrap_or_default();
                (key == taint || key.is_empty()) && (effect == "NoExecute" || effect.is_empty())
            });
        if covered {
            continue;
        }
        let toleration = json!({"key": taint, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": TOLERATION_SECONDS});
        match pod["spec"]["tolerations"].as_array_mut() {
            Some(all) => all.push(toleration),
            None => pod["spec"]["tolerations"] = json!([toleration]),
        }
    }
}
