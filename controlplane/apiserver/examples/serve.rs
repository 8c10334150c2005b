//! Serves an empty cluster on loopback with certificates of its own, and writes an administrator's kubeconfig.
//!
//! `serve <directory> <port>`: `<directory>/admin.kubeconfig` is there when requests are served.

use std::path::PathBuf;

#[path = "../tests/support/mod.rs"]
mod support;

type Any = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<(), Any> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: serve <directory> <port>";
    let directory = PathBuf::from(arguments.next().ok_or(usage)?);
    let port: u16 = arguments.next().ok_or(usage)?.parse()?;
    std::fs::create_dir_all(&directory)?;
    let config = xebec_apiserver::Config {
        secure_port: port,
        ..Default::default()
    };
    let cluster = support::Cluster::start(&directory, port, config).await;
    std::fs::write(directory.join("admin.kubeconfig"), cluster.kubeconfig())?;
    tokio::signal::ctrl_c().await?;
    Ok(())
}
