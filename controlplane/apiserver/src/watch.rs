//! Watches: the store's changes as the events of one collection, filtered by selectors.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use xebec_schema::selector::{FieldSelector, LabelSelector};
use xebec_schema::table::Resource;
use xebec_schema::{Object, convert};
use xebec_store::{Error, KeyValue, RangeRequest, Revision, Store};

use crate::encode;
use crate::error::ApiError;
use crate::registry::prefix_range;

/// A bookmark comes about this often, so that an idle watcher's version does not grow too old.
const BOOKMARK_EVERY: Duration = Duration::from_secs(60);

/// What objects go out as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// The objects themselves.
    Whole,
    /// `meta.k8s.io/v1` PartialObjectMetadata.
    Partial,
    /// `meta.k8s.io/v1` Table.
    Table,
}

/// What a watch is about.
pub(crate) struct WatchRequest {
    pub asked: &'static Resource,
    pub stored: &'static Resource,
    pub prefix: Bytes,
    pub labels: LabelSelector,
    pub fields: FieldSelector,
    /// Begin with every object as it stands.
    pub initial: bool,
    /// End the initial events with a marked bookmark.
    pub mark_initial_end: bool,
    pub from: Option<Revision>,
    pub bookmarks: bool,
    pub timeout: Duration,
    pub shape: Shape,
}

/// Whether an object is within the selectors.
pub(crate) fn selected(labels: &LabelSelector, fields: &FieldSelector, object: &Object) -> bool {
    labels.matches(object["metadata"]["labels"].as_object()) && fields.matches(object)
}

/// Starts a watch; its events come as lines of JSON.
pub(crate) async fn start(
    store: Arc<dyn Store>,
    request: WatchRequest,
) -> Result<impl Stream<Item = Bytes> + Send + use<>, ApiError> {
    let range = prefix_range(request.prefix.clone());
    let mut initial = Vec::new();
    let from = match request.from {
        Some(from) => {
            let current = store.revision();
            if from > current {
                return Err(ApiError::too_large_version(from, current));
            }
            from
        }
        None => store.revision(),
    };
    let from = if request.initial {
        let found = store
            .range(RangeRequest {
                keys: range.clone(),
                at: None,
                limit: 0,
            })
            .await?;
        initial = found.kvs;
        found.revision
    } else {
        from
    };
    let changes = match store.watch(range, from + 1).await {
        Ok(changes) => changes,
        Err(Error::Compacted { requested, oldest }) => {
            return Err(ApiError::expired(format!(
                "too old resource version: {} ({})",
                requested - 1,
                oldest - 1
            )));
        }
        Err(error) => return Err(error.into()),
    };
    let (sender, receiver) = mpsc::channel::<Bytes>(64);
    tokio::spawn(async move {
        // The client is gone, or the time is up: either way there is nobody to tell.
        let timeout = request.timeout;
        let _ = tokio::time::timeout(
            timeout,
            pump(store, request, initial, from, changes, sender),
        )
        .await;
    });
    Ok(futures::stream::unfold(
        receiver,
        |mut receiver| async move { receiver.recv().await.map(|event| (event, receiver)) },
    ))
}

async fn pump(
    store: Arc<dyn Store>,
    request: WatchRequest,
    initial: Vec<KeyValue>,
    from: Revision,
    mut changes: futures::stream::BoxStream<'static, Result<xebec_store::WatchBatch, Error>>,
    sender: mpsc::Sender<Bytes>,
) -> Option<()> {
    for kv in initial {
        if let Some(event) = request.event("ADDED", &kv, true) {
            sender.send(event).await.ok()?;
        }
    }
    if request.mark_initial_end {
        sender.send(request.bookmark(from, true)).await.ok()?;
    }
    let mut ticks =
        tokio::time::interval_at(tokio::time::Instant::now() + BOOKMARK_EVERY, BOOKMARK_EVERY);
    loop {
        let batch = tokio::select! {
            batch = changes.next() => batch?,
            _ = ticks.tick(), if request.bookmarks => {
                // Every change up to this revision is in the stream already: drain it before saying so.
                let revision = store.revision();
                while let Some(Some(batch)) = futures::FutureExt::now_or_never(changes.next()) {
                    send(&request, batch, &sender).await?;
                }
                sender.send(request.bookmark(revision, false)).await.ok()?;
                continue;
            }
            () = sender.closed() => return None,
        };
        send(&request, batch, &sender).await?;
    }
}

async fn send(
    request: &WatchRequest,
    batch: Result<xebec_store::WatchBatch, Error>,
    sender: &mpsc::Sender<Bytes>,
) -> Option<()> {
    let batch = match batch {
        Ok(batch) => batch,
        Err(error) => {
            let status = ApiError::from(error).status();
            sender
                .send(encode::event("ERROR", status.to_string().as_bytes()))
                .await
                .ok()?;
            return None;
        }
    };
    for event in batch.events {
        // Without selectors nothing needs to be decoded to know what the event is.
        let everything = request.labels.is_everything() && request.fields.is_everything();
        let was = event
            .prev
            .as_ref()
            .is_some_and(|prev| everything || request.matches(prev));
        let is = !event.deleted && (everything || request.matches(&event.kv));
        let (kind, kv) = match (was, is) {
            (false, false) => continue,
            (false, true) => ("ADDED", event.kv),
            (true, true) => ("MODIFIED", event.kv),
            // It shows what it last was, at the version of the change that took it out.
            (true, false) => {
                let Some(prev) = event.prev else { continue };
                (
                    "DELETED",
                    KeyValue {
                        value: prev.value,
                        mod_revision: batch.revision,
                        ..event.kv
                    },
                )
            }
        };
        if let Some(line) = request.event(kind, &kv, false) {
            sender.send(line).await.ok()?;
        }
    }
    Some(())
}

impl WatchRequest {
    fn matches(&self, kv: &KeyValue) -> bool {
        encode::parse(kv).is_ok_and(|mut object| {
            convert::convert(&mut object, self.stored, self.asked);
            selected(&self.labels, &self.fields, &object)
        })
    }

    fn event(&self, kind: &str, kv: &KeyValue, filter: bool) -> Option<Bytes> {
        let plain = std::ptr::eq(self.asked, self.stored) && self.shape == Shape::Whole;
        let everything = self.labels.is_everything() && self.fields.is_everything();
        if plain && (everything || !filter) {
            return Some(encode::event(
                kind,
                &encode::with_revision(&kv.value, kv.mod_revision),
            ));
        }
        let mut object = encode::parse(kv).ok()?;
        convert::convert(&mut object, self.stored, self.asked);
        if filter && !selected(&self.labels, &self.fields, &object) {
            return None;
        }
        let object = shaped(self.asked, self.shape, object);
        Some(encode::event(kind, object.to_string().as_bytes()))
    }

    fn bookmark(&self, revision: Revision, initial_end: bool) -> Bytes {
        let mut metadata = json!({"resourceVersion": revision.to_string()});
        if initial_end {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let object = match self.shape {
            Shape::Partial => {
                json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata})
            }
            Shape::Table => {
                json!({"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": {"resourceVersion": revision.to_string()}, "columnDefinitions": null, "rows": [{"cells": null, "object": {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata}}]})
            }
            Shape::Whole => {
                json!({"kind": self.asked.kind, "apiVersion": self.asked.api_version(), "metadata": metadata})
            }
        };
        encode::event("BOOKMARK", object.to_string().as_bytes())
    }
}

/// One object in the shape that was asked for.
pub(crate) fn shaped(resource: &'static Resource, shape: Shape, object: Object) -> Value {
    match shape {
        Shape::Whole => object,
        Shape::Partial => convert::partial_metadata(&object),
        Shape::Table => table(
            resource,
            json!({"resourceVersion": object["metadata"]["resourceVersion"]}),
            &[object],
        ),
    }
}

/// A `meta.k8s.io/v1` Table of these objects.
pub(crate) fn table(resource: &'static Resource, metadata: Value, objects: &[Object]) -> Value {
    let now = time::OffsetDateTime::now_utc().unix_timestamp();
    let rows: Vec<Value> = objects
        .iter()
        .map(|object| xebec_schema::print::row(resource, object, now))
        .collect();
    json!({
        "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
        "columnDefinitions": xebec_schema::print::columns(resource), "rows": rows,
    })
}
