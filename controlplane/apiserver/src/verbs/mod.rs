//! The verbs of every stored resource: which function serves which, and how one object is answered.

mod body;
mod create;
mod delete;
mod include;
mod list;
mod options;
mod patch;

pub(crate) use body::{decode_as, decode_kind, media_type};
pub(crate) use options::{dry_run, manager};
pub(crate) use patch::{PATCH_TYPES, apply_error, patch_manager};

use body::PROTOBUF;
use http::StatusCode;
use include::Include;
use xebec_schema::table::Resource;
use xebec_schema::{Object, convert, defaults, shape, warnings};

use crate::encode;
use crate::error::ApiError;
use crate::handler::{self, Answer, Call, Handler};
use crate::registry::{self, Part};
use crate::request::ResourceRequest;
use crate::server::RequestBody;
use crate::watch::{Shape, shaped};

impl Handler {
    /// Serves a request for a resource whose answer is one object, a list or a watch.
    pub(crate) async fn resource(
        &self,
        about: &ResourceRequest,
        call: &Call,
        body: RequestBody,
    ) -> Answer {
        if media_type(&call.headers) == PROTOBUF {
            let (call, body) = body::from_protobuf(about, call, body).await?;
            return Box::pin(self.resource(about, &call, body)).await;
        }
        let deprecated = warnings::deprecated(about.resource).map(str::to_owned);
        match self.dispatch(about, call, body).await {
            // That the kind is deprecated comes before what is said of the object.
            Ok(response) => Ok(handler::warn_first(response, deprecated.as_slice())),
            Err(mut error) => {
                error.warnings.splice(0..0, deprecated);
                Err(error.seen_as(convert::storage(about.resource), about.resource))
            }
        }
    }

    async fn dispatch(&self, about: &ResourceRequest, call: &Call, body: RequestBody) -> Answer {
        let known = match &about.subresource {
            Some(name) => {
                let Some(sub) = about.resource.subresource(name) else {
                    return Err(ApiError::no_resource());
                };
                sub.verbs.contains(&about.verb)
            }
            None => about.resource.has_verb(about.verb),
        };
        // Across all namespaces things can be read, not written.
        let everywhere =
            about.resource.namespaced && about.namespace.is_none() && about.resource.is_stored();
        if everywhere && about.name.is_some() {
            return Err(ApiError::no_resource());
        }
        if !known || everywhere && !matches!(about.verb, "list" | "watch") {
            return Err(ApiError::method_not_allowed());
        }
        match about.subresource.as_deref() {
            Some("status") => self.object(about, call, body, Part::Status).await,
            Some("ephemeralcontainers") => self.object(about, call, body, Part::Ephemeral).await,
            Some(_) => self.subresource(about, call, body).await,
            None if !about.resource.is_stored() => self.virtual_kind(about, call, body).await,
            None => self.object(about, call, body, Part::Main).await,
        }
    }

    async fn object(
        &self,
        about: &ResourceRequest,
        call: &Call,
        body: RequestBody,
        part: Part,
    ) -> Answer {
        match about.verb {
            "get" => {
                let name = about.name.as_deref().unwrap_or_default();
                let stored = convert::storage(about.resource);
                options::present_version(&call.query, self.registry.store.revision())?;
                let kv = self
                    .registry
                    .get_stored(stored, about.namespace.as_deref(), name)
                    .await?;
                if std::ptr::eq(stored, about.resource)
                    && call.negotiated.shape == Shape::Whole
                    && !call.negotiated.yaml
                {
                    return Ok(handler::bytes(
                        StatusCode::OK,
                        "application/json",
                        encode::with_revision(&kv.value, kv.mod_revision),
                    ));
                }
                self.answer(about, call, StatusCode::OK, registry::decode(&kv)?, &[])
            }
            "list" => self.list(about, call).await,
            "watch" => self.watch(about, call).await,
            "create" => self.create(about, call, body).await,
            "update" => self.put(about, call, body, part).await,
            "patch" => self.patch(about, call, body, part).await,
            "delete" => self.delete(about, call, body).await,
            "deletecollection" => self.delete_collection(about, call, body).await,
            _ => Err(ApiError::method_not_allowed()),
        }
    }

    /// The answer to a write, with what came up on the way, whether it was done or refused.
    pub(crate) fn written(
        &self,
        about: &ResourceRequest,
        call: &Call,
        written: Result<(StatusCode, Object), ApiError>,
        warnings: Vec<String>,
    ) -> Answer {
        match written {
            Ok((status, object)) => self.answer(about, call, status, object, &warnings),
            Err(error) => Err(error.with_warnings(warnings)),
        }
    }

    /// A stored object as an answer.
    pub(crate) fn answer(
        &self,
        about: &ResourceRequest,
        call: &Call,
        status: StatusCode,
        mut object: Object,
        warnings: &[String],
    ) -> Answer {
        convert::convert(
            &mut object,
            convert::storage(about.resource),
            about.resource,
        );
        let include = Include::of(call)?;
        let whole = (include == Include::Whole).then(|| vec![object.clone()]);
        let mut object = shaped(about.resource, call.negotiated.shape, object);
        include.place(&mut object, whole.as_deref());
        Ok(handler::warn(
            handler::value(status, &object, call.negotiated.yaml),
            warnings,
        ))
    }
}

/// Gives an object that was sent its defaults and its type's shape, and brings it into the form of its storage.
fn to_stored(object: &mut Object, asked: &'static Resource) {
    defaults::set_defaults(asked, object);
    shape::complete(object, asked.type_id);
    convert::convert(object, asked, convert::storage(asked));
}
