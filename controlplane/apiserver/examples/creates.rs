//! How many objects a second can be created without HTTP: `creates <folder> [seconds]`. For profiles of the server's own work.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use tokio_util::sync::CancellationToken;
use tower_service::Service;
use xebec_apiserver::{ApiServer, Config, InProcess, UserInfo};
use xebec_store::{Embedded, Options};

const CLIENTS: u64 = 64;

type Failure = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main(flavor = "multi_thread")]
async fn main() -> Result<(), Failure> {
    let mut args = std::env::args().skip(1);
    let folder = PathBuf::from(args.next().ok_or("usage: creates <folder> [seconds]")?);
    let seconds = args.next().map_or(Ok(3.0), |text| text.parse())?;
    let store = Embedded::open(&folder, Options::default())?;
    let config = Config {
        service_account_key_pem: rcgen::KeyPair::generate()?.serialize_pem(),
        ..Config::default()
    };
    let server: Arc<ApiServer> = ApiServer::start(config, store, CancellationToken::new()).await?;
    let started = Instant::now();
    let length = Duration::from_secs_f64(seconds);
    let mut tasks = tokio::task::JoinSet::new();
    for client in 0..CLIENTS {
        let service = server.in_process(UserInfo::new("kubernetes-admin", &["system:masters"]));
        tasks.spawn(async move {
            let (mut service, mut done) = (service, 0);
            while started.elapsed() < length {
                create(&mut service, client, done).await?;
                done += 1;
            }
            Ok::<_, Failure>(done)
        });
    }
    let mut done = 0;
    while let Some(finished) = tasks.join_next().await {
        done += finished??;
    }
    println!(
        "{:.0} ConfigMaps a second",
        done as f64 / started.elapsed().as_secs_f64()
    );
    Ok(())
}

async fn create(service: &mut InProcess, client: u64, number: u64) -> Result<(), Failure> {
    let object = format!(
        r#"{{"apiVersion":"v1","kind":"ConfigMap","metadata":{{"name":"w-{client}-{number}","labels":{{"app":"bench"}}}},"data":{{"text":"{number:0>200}"}}}}"#
    );
    let request = Request::post("/api/v1/namespaces/default/configmaps")
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(object)))?;
    let response = service
        .call(request)
        .await
        .map_err(|never| match never {})?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    if status != StatusCode::CREATED {
        return Err(String::from_utf8_lossy(&body).into());
    }
    Ok(())
}
