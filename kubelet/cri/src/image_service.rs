//! The CRI ImageService: messages in, messages out.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures::{Stream, stream};
use tonic::{Request, Response, Status};
use xebec_cri_api::v1;
use xebec_cri_api::v1::image_service_server::ImageService;

use crate::images::{self, Auth, ImageRecord, ImageStore, PullError, PullOptions};
use crate::runtime::Runtime;
use crate::stats;

/// The service; all work is done by [`Runtime`].
pub struct Service(pub Arc<Runtime>);

type Answer<T> = Result<Response<T>, Status>;

fn unknown(err: anyhow::Error) -> Status {
    Status::unknown(format!("{err:#}"))
}

/// Runs disk work away from the async threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> Result<T, Status> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|err| Status::internal(err.to_string()))?
        .map_err(unknown)
}

fn message(store: &ImageStore, image: &ImageRecord) -> v1::Image {
    let user = store
        .config(image)
        .map(|c| c.config.user)
        .unwrap_or_default();
    let user = user.split(':').next().unwrap_or_default();
    let (uid, username) = match (user.is_empty(), user.parse()) {
        (true, _) => (Some(v1::Int64Value { value: 0 }), String::new()),
        (_, Ok(value)) => (Some(v1::Int64Value { value }), String::new()),
        (_, Err(_)) => (None, user.to_owned()),
    };
    v1::Image {
        id: image.id.clone(),
        repo_tags: image.tags.clone(),
        repo_digests: image.digests.clone(),
        size: image.size,
        uid,
        username,
        spec: None,
        pinned: false,
    }
}

async fn list(
    store: ImageStore,
    wanted: Option<v1::ImageFilter>,
) -> Result<Vec<v1::Image>, Status> {
    let name = wanted
        .and_then(|f| f.image)
        .map(|i| i.image)
        .unwrap_or_default();
    blocking(move || {
        let images = if name.is_empty() {
            store.list()?
        } else {
            store.find(&name)?.into_iter().collect()
        };
        Ok(images.iter().map(|i| message(&store, i)).collect())
    })
    .await
}

#[tonic::async_trait]
impl ImageService for Service {
    async fn list_images(
        &self,
        request: Request<v1::ListImagesRequest>,
    ) -> Answer<v1::ListImagesResponse> {
        let images = list(self.0.images.clone(), request.into_inner().filter).await?;
        Ok(Response::new(v1::ListImagesResponse { images }))
    }

    type StreamImagesStream =
        Pin<Box<dyn Stream<Item = Result<v1::StreamImagesResponse, Status>> + Send>>;

    async fn stream_images(
        &self,
        request: Request<v1::StreamImagesRequest>,
    ) -> Answer<Self::StreamImagesStream> {
        let images = list(self.0.images.clone(), request.into_inner().filter).await?;
        let message = v1::StreamImagesResponse { images };
        Ok(Response::new(Box::pin(stream::once(async { Ok(message) }))))
    }

    async fn image_status(
        &self,
        request: Request<v1::ImageStatusRequest>,
    ) -> Answer<v1::ImageStatusResponse> {
        let request = request.into_inner();
        let name = request.image.unwrap_or_default().image;
        let store = self.0.images.clone();
        let verbose = request.verbose;
        let (image, info) = blocking(move || {
            let mut info = HashMap::new();
            let found = store.find(&name)?;
            if let (Some(image), true) = (&found, verbose) {
                info.insert(
                    "info".to_owned(),
                    serde_json::to_string(&serde_json::json!({
                        "chain": image.chain,
                        "imageSpec": store.config(image)?,
                    }))?,
                );
            }
            Ok((found.map(|i| message(&store, &i)), info))
        })
        .await?;
        Ok(Response::new(v1::ImageStatusResponse { image, info }))
    }

    async fn pull_image(
        &self,
        request: Request<v1::PullImageRequest>,
    ) -> Answer<v1::PullImageResponse> {
        let request = request.into_inner();
        let name = request.image.unwrap_or_default().image;
        let image = self.0.pull(&name, request.auth).await?;
        Ok(Response::new(v1::PullImageResponse { image_ref: image }))
    }

    async fn remove_image(
        &self,
        request: Request<v1::RemoveImageRequest>,
    ) -> Answer<v1::RemoveImageResponse> {
        let name = request.into_inner().image.unwrap_or_default().image;
        let store = self.0.images.clone();
        let in_use = self.0.chains_in_use();
        blocking(move || store.remove(&name, &in_use)).await?;
        Ok(Response::new(v1::RemoveImageResponse {}))
    }

    async fn image_fs_info(
        &self,
        _: Request<v1::ImageFsInfoRequest>,
    ) -> Answer<v1::ImageFsInfoResponse> {
        let root = self.0.config.root.clone();
        let (images, containers) = blocking(move || {
            Ok((
                stats::directory(&root.join("snapshots")),
                stats::directory(&root.join("containers")),
            ))
        })
        .await?;
        Ok(Response::new(v1::ImageFsInfoResponse {
            image_filesystems: vec![images],
            container_filesystems: vec![containers],
        }))
    }
}

impl Runtime {
    /// Pulls an image; returns its id.
    async fn pull(
        self: &Arc<Self>,
        name: &str,
        auth: Option<v1::AuthConfig>,
    ) -> Result<String, Status> {
        let options = PullOptions {
            auth: credentials(auth.unwrap_or_default())?,
            insecure_registries: self.config.insecure_registries.clone(),
        };
        match images::pull(&self.images, name, &options).await {
            Ok(image) => Ok(image.id),
            Err(err) => {
                let message = format!("failed to pull and unpack image {name:?}: {err}");
                Err(match err {
                    PullError::NotFound(_) => Status::not_found(message),
                    PullError::Denied(_) => Status::permission_denied(message),
                    PullError::Other(_) => Status::unknown(message),
                })
            }
        }
    }
}

fn credentials(given: v1::AuthConfig) -> Result<Auth, Status> {
    if !given.identity_token.is_empty() {
        return Err(Status::invalid_argument(
            "identity tokens are not supported yet; use a user name and a password",
        ));
    }
    let mut auth = Auth {
        username: given.username,
        password: given.password,
        registry_token: given.registry_token,
    };
    if auth.username.is_empty() && !given.auth.is_empty() {
        let pair = STANDARD
            .decode(given.auth.trim())
            .ok()
            .and_then(|text| String::from_utf8(text).ok())
            .and_then(|text| {
                let (user, password) = text.split_once(':')?;
                Some((user.to_owned(), password.trim_end_matches('\0').to_owned()))
            });
        (auth.username, auth.password) = pair
            .ok_or_else(|| Status::invalid_argument("`auth` is not the base64 of user:password"))?;
    }
    Ok(auth)
}
