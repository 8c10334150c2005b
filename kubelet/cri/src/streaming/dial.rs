//! Connects to a port inside a pod.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, ensure};
use tokio::net::TcpStream;

use crate::netns;
use crate::records::Sandbox;
use crate::runtime::Runtime;

/// A pod's port that does not answer for this long is given up.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

impl Runtime {
    /// Connects to a TCP port on the loopback address inside a pod.
    pub async fn dial(&self, sandbox: &Sandbox, port: u16) -> anyhow::Result<TcpStream> {
        let record = sandbox.record();
        ensure!(record.ready, "sandbox {:?} is not running", sandbox.id);
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let connect = move || {
            let stream = std::net::TcpStream::connect_timeout(&address, DIAL_TIMEOUT)
                .with_context(|| format!("failed to connect to localhost:{port} inside the pod"))?;
            stream.set_nonblocking(true)?;
            Ok(stream)
        };
        let stream = tokio::task::spawn_blocking(move || match &record.netns {
            // A socket stays in the namespace in which it was made.
            Some(path) => netns::within(path, connect),
            None => connect(),
        })
        .await
        .context("connecting to the pod")??;
        Ok(TcpStream::from_std(stream)?)
    }
}
