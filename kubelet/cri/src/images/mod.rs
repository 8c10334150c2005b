//! Images of one node: records, content, unpacked layers.
//!
//! Everything is on disk and read when asked for, so that another process
//! (`xebec image load`) and a running server see the same store:
//! `images/<hex>.json` one record per image, `blobs/sha256/<hex>` manifests and
//! configs, `snapshots/<chain>/fs` one read-only directory per layer chain,
//! `tmp/` work in progress. `lock` is held shared by what adds to the store and
//! exclusively by what collects garbage, across processes.

mod archive;
mod build;
pub mod reference;
mod registry;
pub mod store;
pub mod unpack;

pub use archive::import;
pub use build::{FileContent, LayerFile, import_image};
pub use registry::{Auth, PullError, PullOptions, pull};
pub use store::{ImageConfig, ImageRecord, ImageStore};
