//! Exec, attach and port-forward streams.

use anyhow::bail;
use xebec_cri_api::v1;

/// The streams asked for and not yet fetched.
#[derive(Default)]
pub struct Streams {}

impl Streams {
    /// A URL for an exec.
    pub fn exec(&self, _: v1::ExecRequest) -> anyhow::Result<String> {
        bail!("streaming exec is not there yet")
    }

    /// A URL for an attach.
    pub fn attach(&self, _: v1::AttachRequest) -> anyhow::Result<String> {
        bail!("attach is not there yet")
    }

    /// A URL for a port-forward.
    pub fn port_forward(&self, _: v1::PortForwardRequest) -> anyhow::Result<String> {
        bail!("port-forward is not there yet")
    }
}
