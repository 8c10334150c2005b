//! gRPC probes: `grpc.health.v1.Health/Check`, in the clear.

use std::time::Duration;

use anyhow::{Result, bail};
use tonic::Code;
use tonic::transport::Endpoint;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use super::{USER_AGENT, address};

/// Whether a service, or the server as a whole if it is not named, says that it serves.
pub(super) async fn check(ip: &str, port: u16, service: &str, limit: Duration) -> Result<()> {
    let address = address(ip, port);
    let seconds = limit.as_secs();
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?.user_agent(USER_AGENT)?;
    let started = tokio::time::Instant::now();
    let channel = match tokio::time::timeout(limit, endpoint.connect()).await {
        Ok(Ok(channel)) => channel,
        Ok(Err(error)) => {
            let error = anyhow::Error::new(error);
            bail!("error: failed to connect service at {address:?}: {error:#}");
        }
        Err(_) => bail!(
            "timeout: failed to connect service {address:?} within {seconds}s: context deadline exceeded"
        ),
    };
    let mut client = HealthClient::new(channel);
    let call = client.check(HealthCheckRequest {
        service: service.to_owned(),
    });
    let answer = match tokio::time::timeout_at(started + limit, call).await {
        Ok(Ok(answer)) => answer.into_inner(),
        Ok(Err(status)) if status.code() == Code::Unimplemented => bail!(
            "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): {}",
            status.message()
        ),
        Ok(Err(status)) => bail!(
            "error: health rpc probe failed: rpc error: code = {:?} desc = {}",
            status.code(),
            status.message()
        ),
        Err(_) => bail!("timeout: health rpc did not complete within {seconds}s"),
    };
    match answer.status() {
        ServingStatus::Serving => Ok(()),
        other => bail!(
            "service unhealthy (responded with {:?})",
            other.as_str_name()
        ),
    }
}
