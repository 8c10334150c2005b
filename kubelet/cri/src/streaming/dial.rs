//! Connects to a port inside a pod.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, ensure};
use tokio::net::TcpStream;

use crate::netns;
use crate::records::Sandbox;
use crate::runtime::Runtime;

/// A pod's port that does not answer for this long is given up.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

impl Runtime {
    /// Connects to a TCP port on a loopback address inside a pod: IPv4's, or else IPv6's.
    pub async fn dial(&self, sandbox: &Sandbox, port: u16) -> anyhow::Result<TcpStream> {
        let record = sandbox.record();
        ensure!(record.ready, "sandbox {:?} is not running", sandbox.id);
        let connect = move || {
            let dial = |ip: IpAddr| {
                std::net::TcpStream::connect_timeout(&SocketAddr::new(ip, port), DIAL_TIMEOUT)
            };
            let stream = dial(Ipv4Addr::LOCALHOST.into())
                // Of two refusals the first is the one to tell.
                .or_else(|err| dial(Ipv6Addr::LOCALHOST.into()).map_err(|_| err))
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
