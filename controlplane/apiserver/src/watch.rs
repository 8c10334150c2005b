//! Watches: the store's changes as the events of one collection, filtered by selectors.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
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

/// So many changes, if they are there already, go out in one piece.
const TOGETHER: usize = 64;

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
        Some(from) => from,
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
    changes: futures::stream::BoxStream<'static, Result<xebec_store::WatchBatch, Error>>,
    sender: mpsc::Sender<Bytes>,
) -> Option<()> {
    let mut changes = changes.ready_chunks(TOGETHER);
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
        let batches = tokio::select! {
            batches = changes.next() => batches?,
            _ = ticks.tick(), if request.bookmarks => {
                // Every change up to this revision is in the stream already: drain it before saying so.
                let revision = store.revision();
                while let Some(Some(batches)) = futures::FutureExt::now_or_never(changes.next()) {
                    send(&request, batches, &sender).await?;
                }
                sender.send(request.bookmark(revision, false)).await.ok()?;
                continue;
            }
            () = sender.closed() => return None,
        };
        send(&request, batches, &sender).await?;
    }
}

/// Sends what is left of the changes by the selectors; `None` ends the watch.
async fn send(
    request: &WatchRequest,
    batches: Vec<Result<xebec_store::WatchBatch, Error>>,
    sender: &mpsc::Sender<Bytes>,
) -> Option<()> {
    let mut out = BytesMut::new();
    let mut failed = None;
    for batch in batches {
        match batch {
            Ok(batch) => request.write(batch, &mut out),
            Err(error) => failed = Some(error),
        }
    }
    if let Some(error) = failed {
        let status = ApiError::from(error).status();
        out.extend_from_slice(&encode::event("ERROR", status.to_string().as_bytes()));
        sender.send(out.freeze()).await.ok()?;
        return None;
    }
    if !out.is_empty() {
        sender.send(out.freeze()).await.ok()?;
    }
    Some(())
}

impl WatchRequest {
    /// Writes the events that a batch is to this watch.
    fn write(&self, batch: xebec_store::WatchBatch, out: &mut BytesMut) {
        for event in batch.events {
            let was = event.prev.as_ref().is_some_and(|prev| self.matches(prev));
            let is = !event.deleted && self.matches(&event.kv);
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
            if let Some(line) = self.event(kind, &kv, false) {
                out.extend_from_slice(&line);
            }
        }
    }

    /// Whether nothing is filtered.
    fn everything(&self) -> bool {
        self.labels.is_everything() && self.fields.is_everything()
    }

    fn matches(&self, kv: &KeyValue) -> bool {
        // What the key tells needs no decoding.
        let named = self.fields.exact("metadata.name");
        if named.is_some_and(|name| !kv.key.ends_with(format!("/{name}").as_bytes())) {
            return false;
        }
        self.everything()
            || encode::parse(kv).is_ok_and(|mut object| {
                convert::convert(&mut object, self.stored, self.asked);
                selected(&self.labels, &self.fields, &object)
            })
    }

    fn event(&self, kind: &str, kv: &KeyValue, filter: bool) -> Option<Bytes> {
        if std::ptr::eq(self.asked, self.stored) && (self.everything() || !filter) {
            let plain = match self.shape {
                Shape::Whole => Some(encode::with_revision(&kv.value, kv.mod_revision)),
                Shape::Partial => encode::partial(&kv.value, kv.mod_revision),
                Shape::Table => None,
            };
            if let Some(object) = plain {
                return Some(encode::event(kind, &object));
            }
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
