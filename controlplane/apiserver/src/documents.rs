//! The OpenAPI documents: made when they are asked for, kept while they are likely to be asked for again, and not sent
//! to who has them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use ring::digest;
use xebec_schema::openapi;

use crate::encode;
use crate::handler::bytes;
use crate::server::ResponseBody;

/// How long a document that was made is kept: a client asks for several soon after each other.
const KEPT: Duration = Duration::from_secs(300);

/// One document: its tag, by which clients know it again, and its text while that is kept.
struct Document {
    tag: HeaderValue,
    text: Option<Bytes>,
}

/// Documents that were asked for, by name.
#[derive(Default)]
pub(crate) struct Documents {
    known: Mutex<HashMap<String, Document>>,
}

/// The forms that documents come in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    Json,
    Yaml,
    /// Of v2 alone.
    Protobuf,
}

impl Form {
    fn media_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Yaml => "application/yaml",
            Self::Protobuf => openapi::gnostic::MEDIA_TYPE,
        }
    }
}

/// The document at `/openapi/<path>`; none where there is none.
fn make(path: &str, form: Form) -> Option<Bytes> {
    let document = match path {
        "v2" => openapi::v2(),
        "v3" => openapi::v3_index(),
        _ => openapi::v3(path.strip_prefix("v3/")?)?,
    };
    Some(match form {
        Form::Protobuf => openapi::gnostic::encode(&document).into(),
        Form::Json | Form::Yaml => encode::value(&document, form == Form::Yaml),
    })
}

impl Documents {
    fn known(&self) -> MutexGuard<'_, HashMap<String, Document>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers with the document at `/openapi/<path>`; none where there is none.
    pub(crate) fn answer(
        self: &Arc<Self>,
        path: &str,
        form: Form,
        asked: &HeaderMap,
    ) -> Option<Response<ResponseBody>> {
        let name = format!("{path} {}", form.media_type());
        // Held while the document is made: whoever asks for it meanwhile waits instead of making it, too.
        let mut known = self.known();
        let kept = known.get(&name);
        if let Some(document) = kept.filter(|document| has(asked, &document.tag)) {
            return Some(tagged(not_modified(), &document.tag));
        }
        if let Some((document, text)) = kept.and_then(|one| Some((one, one.text.clone()?))) {
            let response = bytes(StatusCode::OK, form.media_type(), text);
            return Some(tagged(response, &document.tag));
        }
        let text = make(path, form)?;
        let sum = digest::digest(&digest::SHA256, &text);
        let tag = format!("\"{}\"", URL_SAFE_NO_PAD.encode(sum.as_ref()));
        let tag = HeaderValue::from_str(&tag).ok()?;
        let document = Document {
            tag: tag.clone(),
            text: Some(text.clone()),
        };
        known.insert(name.clone(), document);
        drop(known);
        self.forget_later(name);
        if has(asked, &tag) {
            return Some(tagged(not_modified(), &tag));
        }
        let response = bytes(StatusCode::OK, form.media_type(), text);
        Some(tagged(response, &tag))
    }

    /// Lets go of a document's text after a while; its tag stays.
    fn forget_later(self: &Arc<Self>, name: String) {
        let documents = Arc::downgrade(self);
        tokio::spawn(async move {
            tokio::time::sleep(KEPT).await;
            if let Some(documents) = documents.upgrade() {
                if let Some(document) = documents.known().get_mut(&name) {
                    document.text = None;
                }
            }
        });
    }
}

/// Whether a request says that it has what bears this tag.
fn has(asked: &HeaderMap, tag: &HeaderValue) -> bool {
    let given = asked.get_all(header::IF_NONE_MATCH).iter();
    let mut tags = given
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|one| one.trim().trim_start_matches("W/"));
    tags.any(|one| tag == one)
}

fn not_modified() -> Response<ResponseBody> {
    let mut response = bytes(StatusCode::NOT_MODIFIED, "application/json", Bytes::new());
    response.headers_mut().remove(header::CONTENT_TYPE);
    response
}

fn tagged(mut response: Response<ResponseBody>, tag: &HeaderValue) -> Response<ResponseBody> {
    let headers = response.headers_mut();
    headers.insert(header::ETAG, tag.clone());
    headers.insert(header::VARY, HeaderValue::from_static("Accept"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_document_is_made_once_sent_to_who_has_it_not_and_let_go() {
        let documents = Arc::new(Documents::default());
        let ask = |headers: &HeaderMap| {
            documents
                .answer("v3/apis/apps/v1", Form::Json, headers)
                .unwrap()
        };
        let first = ask(&HeaderMap::new());
        assert_eq!(first.status(), StatusCode::OK);
        let mut headers = HeaderMap::new();
        headers.insert(header::IF_NONE_MATCH, first.headers()[header::ETAG].clone());
        assert_eq!(ask(&headers).status(), StatusCode::NOT_MODIFIED);
        let kept = || {
            let known = documents.known();
            known.values().filter(|one| one.text.is_some()).count()
        };
        assert_eq!(kept(), 1);
        tokio::task::yield_now().await;
        tokio::time::sleep(KEPT * 2).await;
        assert_eq!(kept(), 0);
        assert_eq!(ask(&headers).status(), StatusCode::NOT_MODIFIED);
        assert_eq!(kept(), 0);
        let garbage = documents.answer("v3/apis/no/v1", Form::Json, &headers);
        assert!(garbage.is_none());
        assert_eq!(documents.known().len(), 1);
    }
}
