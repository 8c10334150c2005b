//! Ownership: which objects a controller's selector claims, by adopting or releasing them.

use std::fmt::Debug;
use std::sync::Arc;

use anyhow::Context;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};
use kube::api::{Patch, PatchParams};
use kube::core::NamespaceResourceScope;
use kube::core::{Selector, SelectorExt};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::cluster::is_code;
use crate::informer::Informer;

/// The reference by which a controller owns what it makes.
pub(crate) fn controller_ref<K: Resource<DynamicType = ()>>(owner: &K) -> OwnerReference {
    OwnerReference {
        api_version: K::api_version(&()).into_owned(),
        kind: K::kind(&()).into_owned(),
        name: owner.meta().name.clone().unwrap_or_default(),
        uid: owner.meta().uid.clone().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// The one owner that controls the object.
pub(crate) fn controller_of(meta: &ObjectMeta) -> Option<&OwnerReference> {
    meta.owner_references
        .iter()
        .flatten()
        .find(|owner| owner.controller == Some(true))
}

/// Whether this object controls that one.
pub(crate) fn controls<K: Resource>(owner: &K, meta: &ObjectMeta) -> bool {
    controller_of(meta).is_some_and(|reference| Some(&reference.uid) == owner.meta().uid.as_ref())
}

/// A selector that can be matched; an empty one selects nothing, as in upstream's controllers.
pub(crate) fn selector(selector: &LabelSelector) -> anyhow::Result<Option<Selector>> {
    let parsed = Selector::try_from(selector.clone()).context("the selector can't be parsed")?;
    Ok((!parsed.selects_all()).then_some(parsed))
}

/// Whether the selector matches the object's labels.
pub(crate) fn matches(selector: &Selector, meta: &ObjectMeta) -> bool {
    let none = Default::default();
    selector.matches(meta.labels.as_ref().unwrap_or(&none))
}

/// The objects that the owner controls, after adopting orphans that match its selector and
/// releasing its own that no longer do.
pub(crate) async fn claim<Owner, K>(
    client: &Client,
    owner: &Owner,
    selector: &Selector,
    informer: &Informer<K>,
    can_adopt: impl Fn(&K) -> bool,
) -> anyhow::Result<Vec<Arc<K>>>
where
    Owner: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + DeserializeOwned
        + Debug,
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + DeserializeOwned
        + Debug
        + Send
        + Sync
        + 'static,
{
    let namespace = owner.meta().namespace.clone().unwrap_or_default();
    let api = Api::<K>::namespaced(client.clone(), &namespace);
    let mut claimed = Vec::new();
    let mut may_adopt = None;
    for object in informer.in_namespace(&namespace) {
        let meta = object.meta();
        let fits = matches(selector, meta);
        match controller_of(meta) {
            Some(_) if controls(owner, meta) => {
                if fits {
                    claimed.push(object);
                } else if owner.meta().deletion_timestamp.is_none() {
                    release(&api, owner, &object, informer).await?;
                }
            }
            Some(_) => {}
            None if !fits
                || meta.deletion_timestamp.is_some()
                || owner.meta().deletion_timestamp.is_some()
                || !can_adopt(&object) => {}
            None => {
                // The cache may be behind: an owner that is being deleted must not adopt.
                if may_adopt.is_none() {
                    let name = owner.meta().name.clone().unwrap_or_default();
                    let live = Api::<Owner>::namespaced(client.clone(), &namespace)
                        .get_opt(&name)
                        .await?;
                    may_adopt = Some(live.is_some_and(|live| {
                        live.meta().uid == owner.meta().uid
                            && live.meta().deletion_timestamp.is_none()
                    }));
                }
                if may_adopt == Some(true)
                    && let Some(adopted) = adopt(&api, owner, &object).await?
                {
                    informer.note(adopted.clone());
                    claimed.push(Arc::new(adopted));
                }
            }
        }
    }
    Ok(claimed)
}

async fn adopt<Owner, K>(api: &Api<K>, owner: &Owner, object: &K) -> anyhow::Result<Option<K>>
where
    Owner: Resource<DynamicType = ()>,
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug,
{
    let name = object.meta().name.clone().unwrap_or_default();
    // The uid in the patch makes it fail on another object of the same name.
    let patch =
        json!({"metadata": {"ownerReferences": [controller_ref(owner)], "uid": object.meta().uid}});
    match api
        .patch(&name, &PatchParams::default(), &Patch::Strategic(patch))
        .await
    {
        Ok(adopted) => Ok(Some(adopted)),
        Err(error) if is_code(&error, 404) => Ok(None),
        Err(error) => {
            Err(error).with_context(|| format!("could not adopt {} {name}", K::kind(&())))
        }
    }
}

async fn release<Owner, K>(
    api: &Api<K>,
    owner: &Owner,
    object: &K,
    informer: &Informer<K>,
) -> anyhow::Result<()>
where
    Owner: Resource<DynamicType = ()>,
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    let name = object.meta().name.clone().unwrap_or_default();
    let reference = json!({"$patch": "delete", "uid": owner.meta().uid});
    let patch = json!({"metadata": {"ownerReferences": [reference], "uid": object.meta().uid}});
    match api
        .patch(&name, &PatchParams::default(), &Patch::Strategic(patch))
        .await
    {
        Ok(released) => informer.note(released),
        // Gone, or another by now: there is nothing to release.
        Err(error) if is_code(&error, 404) || is_code(&error, 422) => {}
        Err(error) => {
            return Err(error)
                .with_context(|| format!("could not release {} {name}", K::kind(&())));
        }
    }
    Ok(())
}
