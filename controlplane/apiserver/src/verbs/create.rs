//! Storing a whole object: create, and update, which for some kinds creates what is not there.

use http::StatusCode;
use xebec_schema::apply::{self, ApplyOptions};
use xebec_schema::table::Resource;
use xebec_schema::{Object, convert, defaults, shape, warnings};
use xebec_store::Txn;

use super::body::{agree, agree_namespace, decode_as};
use super::options::{dry_run, manager};
use super::to_stored;
use crate::authn::UserInfo;
use crate::error::ApiError;
use crate::handler::{Answer, Call, Handler, collect};
use crate::registry::{Part, now};
use crate::request::ResourceRequest;
use crate::server::RequestBody;
use crate::services::Allocator;

/// Kinds that an update creates where they are not there.
fn created_by_update(resource: &Resource) -> bool {
    match resource.group {
        "" => matches!(
            resource.kind,
            "Service" | "Endpoints" | "Event" | "LimitRange"
        ),
        "events.k8s.io" | "coordination.k8s.io" => true,
        "rbac.authorization.k8s.io" => true,
        _ => false,
    }
}

/// Who asks for a certificate is what the server knows, not what the request says.
fn sign_as_requester(request: &mut Object, user: &UserInfo) {
    let known = user.to_value();
    for field in ["username", "uid", "groups", "extra"] {
        if let Some(spec) = request["spec"].as_object_mut() {
            match known.get(field).filter(|value| !value.is_null()) {
                Some(value) => drop(spec.insert(field.to_owned(), value.clone())),
                None => drop(spec.remove(field)),
            }
        }
    }
}

impl Handler {
    pub(super) async fn create(
        &self,
        about: &ResourceRequest,
        call: &Call,
        body: RequestBody,
    ) -> Answer {
        let dry = dry_run(&call.query, "CreateOptions")?;
        let manager = manager(call, "CreateOptions")?;
        let (mut object, mut warnings) = decode_as(
            &collect(body).await?,
            &call.headers,
            about.resource,
            &call.query,
        )?;
        if about.resource.kind == "CertificateSigningRequest" {
            sign_as_requester(&mut object, &call.user);
        }
        let made = self
            .create_object(about, object, dry, Some(&manager), &mut warnings)
            .await;
        let written = made.map(|object| (StatusCode::CREATED, object));
        self.written(about, call, written, warnings)
    }

    /// Defaults, admits and stores a decoded object. `manager`: who its fields are booked to, unless they are already.
    pub(super) async fn create_object(
        &self,
        about: &ResourceRequest,
        mut object: Object,
        dry: bool,
        manager: Option<&str>,
        warnings: &mut Vec<String>,
    ) -> Result<Object, ApiError> {
        let resource = about.resource;
        if about.name.is_some() {
            agree(about, &mut object)?;
        } else {
            agree_namespace(about, &mut object)?;
        }
        if let Some(metadata) = object["metadata"].as_object_mut() {
            for field in [
                "uid",
                "creationTimestamp",
                "deletionTimestamp",
                "deletionGracePeriodSeconds",
                "selfLink",
            ] {
                metadata.remove(field);
            }
        }
        let stored = convert::storage(resource);
        let api_version = resource.api_version();
        defaults::set_defaults(resource, &mut object);
        shape::complete(&mut object, resource.type_id);
        if let Some(manager) = manager {
            // What admission and the registry fill in afterwards belongs to nobody.
            let options = ApplyOptions {
                manager,
                force: false,
                api_version: &api_version,
                subresource: "",
                now: &now(),
            };
            apply::track_update(None, &mut object, resource.type_id, &options);
        }
        if object["metadata"]["resourceVersion"]
            .as_str()
            .is_some_and(|version| !version.is_empty())
        {
            return Err(ApiError::unexplained(
                "resourceVersion should not be set on objects to be created",
            ));
        }
        convert::convert(&mut object, resource, stored);
        let name = object["metadata"]["name"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        if let Some(namespace) = &about.namespace {
            self.registry
                .admit_namespace(stored, namespace, &name)
                .await?;
        }
        self.registry.admit_create(stored, &mut object).await?;
        let found = warnings::of(stored, &object, None);
        let is_service = stored.kind == "Service" && stored.group.is_empty();
        if !is_service {
            let nothing = Txn::default();
            let made = self
                .registry
                .create(resource, object, Part::Main, nothing, dry)
                .await?;
            warnings.extend(found);
            return Ok(made);
        }
        for _ in 0..5 {
            let mut attempt = object.clone();
            self.allocator
                .assign(self.registry.store.as_ref(), None, &mut attempt, dry)
                .await?;
            let extra = Allocator::claims(None, &attempt);
            match self
                .registry
                .create(resource, attempt, Part::Main, extra, dry)
                .await
            {
                // Somebody took the same address at the same moment: choose another one.
                Err(error) if error.code == StatusCode::CONFLICT && error.is_conflict() => {}
                Ok(made) => {
                    warnings.extend(found);
                    return Ok(made);
                }
                refused => return refused,
            }
        }
        Err(ApiError::unavailable(
            "addresses are taken faster than they can be chosen; please try again",
        ))
    }

    pub(super) async fn put(
        &self,
        about: &ResourceRequest,
        call: &Call,
        body: RequestBody,
        part: Part,
    ) -> Answer {
        let dry = dry_run(&call.query, "UpdateOptions")?;
        let manager = manager(call, "UpdateOptions")?;
        let (object, mut warnings) = decode_as(
            &collect(body).await?,
            &call.headers,
            about.resource,
            &call.query,
        )?;
        let written = self
            .put_object(about, object, dry, &manager, part, &mut warnings)
            .await;
        self.written(about, call, written, warnings)
    }

    async fn put_object(
        &self,
        about: &ResourceRequest,
        mut object: Object,
        dry: bool,
        manager: &str,
        part: Part,
        warnings: &mut Vec<String>,
    ) -> Result<(StatusCode, Object), ApiError> {
        let resource = about.resource;
        agree(about, &mut object)?;
        let stored = convert::storage(resource);
        let given = object.clone();
        to_stored(&mut object, resource);
        let (api_version, time) = (resource.api_version(), now());
        let track = ApplyOptions {
            manager,
            force: false,
            api_version: &api_version,
            subresource: about.subresource.as_deref().unwrap_or_default(),
            now: &time,
        };
        let name = about.name.as_deref().unwrap_or_default();
        let mut before = None;
        let written = self
            .registry
            .update(
                resource,
                about.namespace.as_deref(),
                name,
                part,
                dry,
                Some(&track),
                |old| {
                    before = Some(old.clone());
                    Ok(object.clone())
                },
            )
            .await;
        match written {
            Err(error)
                if error.code == StatusCode::NOT_FOUND
                    && part == Part::Main
                    && created_by_update(resource) =>
            {
                let mut given = given;
                if let Some(metadata) = given["metadata"].as_object_mut() {
                    metadata.remove("resourceVersion");
                }
                let made = self
                    .create_object(about, given, dry, Some(manager), warnings)
                    .await?;
                Ok((StatusCode::CREATED, made))
            }
            Err(error) => Err(error),
            Ok(written) => {
                warnings.extend(warnings::of(stored, &written, before.as_ref()));
                Ok((StatusCode::OK, written))
            }
        }
    }
}
