//! `xebec image load|list|pull`, and the demo image that is built from this very executable.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use xebec_cri::images::store::ExecutionConfig;
use xebec_cri::images::{FileContent, LayerFile};
use xebec_cri_api::v1;

use crate::paths::{Layout, NodeLayout};
use crate::unix_http;

/// The name of the image that `up` builds.
pub const DEMO_IMAGE: &str = "xebec.local/demo:latest";

/// Images of the container runtime.
#[derive(Subcommand)]
pub enum Image {
    /// Load an OCI layout (folder or tar) or a docker archive into every node of this machine
    Load {
        /// The folder or file
        path: PathBuf,
        /// Only this node
        #[arg(long)]
        node: Option<String>,
    },
    /// List images
    #[command(visible_alias = "ls")]
    List {
        /// Only this node
        #[arg(long)]
        node: Option<String>,
    },
    /// Pull an image from its registry
    Pull {
        /// Its reference, such as docker.io/library/busybox:latest
        image: String,
        /// Only this node
        #[arg(long)]
        node: Option<String>,
    },
}

/// A channel to a CRI socket.
pub async fn connect(socket: &Path) -> Result<tonic::transport::Channel> {
    let path = socket.to_path_buf();
    let endpoint = tonic::transport::Endpoint::from_static("http://cri");
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move {
            tokio::net::UnixStream::connect(path)
                .await
                .map(hyper_util::rt::TokioIo::new)
        }
    });
    endpoint
        .connect_with_connector(connector)
        .await
        .with_context(|| {
            format!(
                "could not connect to the container runtime at {}",
                socket.display()
            )
        })
}

/// The nodes of this machine that have a runtime.
fn nodes(layout: &Layout, node: Option<&str>) -> Result<Vec<(String, NodeLayout)>> {
    let agents = unix_http::agents(layout, node)?;
    Ok(agents
        .into_iter()
        .map(|(name, _)| (name.clone(), layout.node(&name)))
        .collect())
}

impl Image {
    /// Carries it out on each node.
    pub async fn run(self, layout: &Layout) -> Result<()> {
        match self {
            Self::Load { path, node } => {
                crate::up::require_root()?;
                if !path.exists() {
                    bail!("there is no {}", path.display());
                }
                for (name, node) in nodes(layout, node.as_deref())? {
                    for image in xebec_cri::images::import(&node.cri_root(), &path)? {
                        println!("{name}: loaded {image}");
                    }
                }
                Ok(())
            }
            Self::List { node } => list(layout, node.as_deref()).await,
            Self::Pull { image, node } => {
                for (name, node) in nodes(layout, node.as_deref())? {
                    let mut client = v1::image_service_client::ImageServiceClient::new(
                        connect(&node.cri_socket()).await?,
                    );
                    let request = v1::PullImageRequest {
                        image: Some(v1::ImageSpec {
                            image: image.clone(),
                            ..Default::default()
                        }),
                        ..Default::default()
                    };
                    let pulled = client.pull_image(request).await.map_err(|status| {
                        anyhow::anyhow!("could not pull {image}: {}", status.message())
                    })?;
                    println!("{name}: pulled {image} ({})", pulled.into_inner().image_ref);
                }
                Ok(())
            }
        }
    }
}

async fn list(layout: &Layout, node: Option<&str>) -> Result<()> {
    let mut rows = Vec::new();
    for (name, node) in nodes(layout, node)? {
        let mut client =
            v1::image_service_client::ImageServiceClient::new(connect(&node.cri_socket()).await?);
        let images = client
            .list_images(v1::ListImagesRequest::default())
            .await
            .context("could not list images")?;
        for image in images.into_inner().images {
            let id: String = image
                .id
                .trim_start_matches("sha256:")
                .chars()
                .take(12)
                .collect();
            let size = format!("{:.1} MB", image.size as f64 / 1e6);
            let tags = if image.repo_tags.is_empty() {
                vec!["<none>".to_owned()]
            } else {
                image.repo_tags
            };
            rows.extend(
                tags.into_iter()
                    .map(|tag| [name.clone(), tag, id.clone(), size.clone()]),
            );
        }
    }
    crate::text::write_table(
        &mut std::io::stdout(),
        &["NODE", "IMAGE", "ID", "SIZE"],
        &rows,
    )
}

/// Builds the demo image from this executable, unless the node has it from this very build.
pub async fn ensure_demo(node: &NodeLayout) -> Result<()> {
    let executable = std::env::current_exe().context("could not find this executable")?;
    let root = node.cri_root();
    tokio::task::spawn_blocking(move || {
        let config = ExecutionConfig {
            entrypoint: vec!["/bin/xebec".into(), "demo".into()],
            cmd: vec!["serve".into()],
            ..Default::default()
        };
        let binary = LayerFile {
            path: "bin/xebec".into(),
            mode: 0o755,
            content: FileContent::File(executable),
        };
        xebec_cri::images::import_image(&root, DEMO_IMAGE, config, &[binary])
    })
    .await
    .context("building the demo image panicked")?
    .map(drop)
    .context("could not build the demo image")
}
