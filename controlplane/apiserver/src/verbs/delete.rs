//! Deleting one object, or all that match.

use http::StatusCode;
use serde_json::json;
use xebec_schema::convert;
use xebec_schema::table::Resource;
use xebec_store::RangeRequest;

use super::list::list_value;
use super::options::delete_options;
use crate::encode::ListHead;
use crate::handler::{self, Answer, Call, Handler, collect};
use crate::registry::{self, orphans_by_default, prefix_range};
use crate::request::ResourceRequest;
use crate::server::RequestBody;
use crate::watch::selected;

const ORPHANED: &str = "child pods are preserved by default when jobs are deleted; set propagationPolicy=Background to remove them or set propagationPolicy=Orphan to suppress this warning";

/// Kinds whose deletion is answered with what was deleted.
fn gives_back(resource: &Resource) -> bool {
    match resource.group {
        "" => matches!(
            resource.kind,
            "Pod"
                | "PersistentVolume"
                | "PersistentVolumeClaim"
                | "PodTemplate"
                | "ResourceQuota"
                | "Service"
                | "ServiceAccount"
        ),
        "resource.k8s.io" => true,
        "storage.k8s.io" => resource.kind != "CSIStorageCapacity",
        _ => false,
    }
}

impl Handler {
    pub(super) async fn delete(
        &self,
        about: &ResourceRequest,
        call: &Call,
        body: RequestBody,
    ) -> Answer {
        let options = delete_options(&collect(body).await?, call)?;
        let stored = convert::storage(about.resource);
        let name = about.name.as_deref().unwrap_or_default();
        self.registry.admit_delete(stored, name)?;
        let warnings = if options.propagation.is_none()
            && orphans_by_default(stored)
            && stored.kind == "Job"
        {
            vec![ORPHANED.to_owned()]
        } else {
            Vec::new()
        };
        let deleted = self
            .registry
            .delete(stored, about.namespace.as_deref(), name, &options)
            .await;
        let (object, gone) = match deleted {
            Ok(deleted) => deleted,
            Err(error) => return Err(error.with_warnings(warnings)),
        };
        if !gone || gives_back(stored) {
            return self.answer(about, call, StatusCode::OK, object, &warnings);
        }
        let mut details =
            json!({"name": name, "kind": about.resource.plural, "uid": object["metadata"]["uid"]});
        if !about.resource.group.is_empty() {
            details["group"] = about.resource.group.into();
        }
        let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details});
        Ok(handler::value(
            StatusCode::OK,
            &status,
            call.negotiated.yaml,
        ))
    }

    pub(super) async fn delete_collection(
        &self,
        about: &ResourceRequest,
        call: &Call,
        body: RequestBody,
    ) -> Answer {
        let options = delete_options(&collect(body).await?, call)?;
        let stored = convert::storage(about.resource);
        let (labels, fields) = self.selectors(about, &call.query)?;
        let keys = prefix_range(registry::key(stored, about.namespace.as_deref(), None));
        let found = self
            .registry
            .store
            .range(RangeRequest {
                keys,
                at: None,
                limit: 0,
            })
            .await?;
        let mut deleted = Vec::new();
        for kv in &found.kvs {
            let mut object = registry::decode(kv)?;
            convert::convert(&mut object, stored, about.resource);
            if !selected(&labels, &fields, &object) {
                continue;
            }
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            match self
                .registry
                .delete(
                    stored,
                    object["metadata"]["namespace"].as_str(),
                    name,
                    &options,
                )
                .await
            {
                Ok((mut object, _)) => {
                    convert::convert(&mut object, stored, about.resource);
                    deleted.push(object);
                }
                // It went meanwhile, which is what was asked for.
                Err(error) if error.code == StatusCode::NOT_FOUND => {}
                Err(error) => return Err(error),
            }
        }
        let head = ListHead {
            resource: about.resource,
            revision: self.registry.store.revision(),
            next: None,
            remaining: None,
        };
        Ok(handler::value(
            StatusCode::OK,
            &list_value(&head, call.negotiated.shape, deleted),
            call.negotiated.yaml,
        ))
    }
}
