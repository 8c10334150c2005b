//! `xebec ui`: a page that shows who talks to whom, and flows as they happen.

mod map;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Query, Request, State};
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, COOKIE, HOST, LOCATION, SET_COOKIE,
    X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use clap::Args;
use k8s_openapi::jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use xebec_hubble::client::Server;
use xebec_hubble::observer::GetFlowsRequest;
use xebec_hubble::observer::get_flows_response::ResponseTypes;
use xebec_hubble::order::Following;
use xebec_hubble::wkt::FieldMask;

use crate::observe::{FilterArgs, Tls, parse_server, servers, source};
use crate::paths::Layout;
use map::{Map, Row, WINDOW};

/// How often the map is drawn anew.
const DRAW: Duration = Duration::from_secs(1);
/// How long it is waited until servers that failed are asked again.
const AGAIN: Duration = Duration::from_secs(2);
/// How many flows of the past a table begins with.
const LAST: u64 = 200;
/// How many lines wait for a browser.
const AHEAD: usize = 256;
/// The cookie that says that a browser has the token.
const COOKIE_NAME: &str = "xebec-ui";

/// What the map needs to know of flows.
const MAPPED: [&str; 21] = [
    "time",
    "verdict",
    "drop_reason_desc",
    "l4",
    "l7",
    "source.labels",
    "source.namespace",
    "source.pod_name",
    "source.workloads",
    "destination.labels",
    "destination.namespace",
    "destination.pod_name",
    "destination.workloads",
    "source_names",
    "destination_names",
    "source_service",
    "destination_service",
    "event_type",
    "is_reply",
    "traffic_direction",
    "trace_observation_point",
];
/// And of those that were dropped.
const MAPPED_OF_DROPS: [&str; 4] = [
    "Summary",
    "extensions",
    "ingress_denied_by",
    "egress_denied_by",
];

/// `xebec ui`.
#[derive(Args)]
pub struct Ui {
    /// Where the page is served; an address of this machine alone
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:12000")]
    listen: SocketAddr,
    /// Only flows of this node
    #[arg(long)]
    node: Option<String>,
    /// A server of Hubble's API (HOST:PORT, tls://HOST:PORT or unix:///PATH), instead of the agents of this machine
    #[arg(long, env = "HUBBLE_SERVER", value_parser = parse_server, conflicts_with = "node")]
    server: Option<Server>,
    #[command(flatten)]
    tls: Tls,
}

/// What all requests share.
struct Page {
    servers: Vec<Server>,
    tls: Tls,
    token: String,
    map: Mutex<Map>,
    /// Why there are no flows, if there are none.
    trouble: watch::Sender<Option<String>>,
}

impl Ui {
    /// Serves until it is interrupted.
    pub async fn run(self, layout: &Layout) -> Result<()> {
        ensure!(
            self.listen.ip().is_loopback(),
            "--listen {}: the page speaks no TLS, so it is served to this machine alone; use an address such as 127.0.0.1:12000, and a tunnel or a proxy for others",
            self.listen
        );
        let servers = servers(layout, self.node.as_deref(), self.server.as_ref())?;
        let listener = TcpListener::bind(self.listen)
            .await
            .with_context(|| format!("could not serve at {} (--listen)", self.listen))?;
        let address = listener.local_addr().context("the page has no address")?;
        let page = Arc::new(Page {
            servers,
            tls: self.tls,
            token: token()?,
            map: Mutex::default(),
            trouble: watch::channel(None).0,
        });
        println!("http://{address}/?token={}", page.token);
        let follow = page.clone();
        tokio::spawn(async move { follow.follow().await });
        let routes = Router::new()
            .route("/", get(index))
            .route(
                "/page.css",
                get(|| async { asset("text/css", include_str!("page/page.css")) }),
            )
            .route(
                "/page.js",
                get(|| async { asset("text/javascript", include_str!("page/page.js")) }),
            )
            .route("/api/map", get(show_map))
            .route("/api/flows", get(show_flows))
            .with_state(page.clone())
            .layer(middleware::from_fn_with_state(page, guard));
        let interrupted = async {
            // Without a handler there is nothing to wait for but the end.
            let _ = tokio::signal::ctrl_c().await;
        };
        tokio::select! {
            served = async { axum::serve(listener, routes).await } => served.context("could not serve"),
            () = interrupted => Ok(()),
        }
    }
}

/// What nobody guesses.
fn token() -> Result<String> {
    use std::io::Read;
    let mut bytes = [0_u8; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("could not read /dev/urandom")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

impl Page {
    /// Takes all flows into the map, again and again.
    async fn follow(&self) {
        loop {
            let since = Timestamp::now().as_second() - WINDOW;
            let paths = MAPPED.iter().chain(&MAPPED_OF_DROPS);
            let asked = GetFlowsRequest {
                follow: true,
                since: Timestamp::from_second(since).ok().map(Into::into),
                field_mask: Some(FieldMask {
                    paths: paths.map(|&path| path.to_owned()).collect(),
                }),
                ..GetFlowsRequest::default()
            };
            *self.map() = Map::default();
            let (nodes, mut failures) = source::ask(&self.servers, &self.tls, &asked);
            let mut flows = Following::default();
            nodes.into_iter().for_each(|node| flows.push(node));
            let failure = loop {
                let answer = tokio::select! {
                    biased;
                    Some(failure) = failures.recv() => break Some(failure),
                    answer = flows.next() => answer,
                };
                self.trouble
                    .send_if_modified(|trouble| trouble.take().is_some());
                match answer.map(|answer| answer.response_types) {
                    Some(Some(ResponseTypes::Flow(flow))) => self.map().take(&flow),
                    Some(Some(ResponseTypes::LostEvents(lost))) => {
                        self.map().lose(lost.num_events_lost);
                    }
                    Some(_) => {}
                    None => break None,
                }
            };
            let why =
                failure.map_or_else(|| "the flows ended".to_owned(), |why| format!("{why:#}"));
            self.trouble.send_replace(Some(why));
            tokio::time::sleep(AGAIN).await;
        }
    }

    fn map(&self) -> std::sync::MutexGuard<'_, Map> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets nobody in who has not the token, and nobody whose browser was led here by another name.
async fn guard(State(page): State<Arc<Page>>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    if !is_local(headers) {
        let why = "this page is served as localhost or 127.0.0.1 alone\n";
        return (StatusCode::FORBIDDEN, why).into_response();
    }
    let given = request
        .uri()
        .query()
        .into_iter()
        .flat_map(|query| form_urlencoded::parse(query.as_bytes()))
        .find(|(name, _)| name == "token")
        .map(|(_, value)| value);
    if given.is_some_and(|given| is_same(&given, &page.token)) {
        let cookie = format!(
            "{COOKIE_NAME}={}; HttpOnly; SameSite=Strict; Path=/",
            page.token
        );
        let headers = [(SET_COOKIE, cookie), (LOCATION, "/".to_owned())];
        return (StatusCode::SEE_OTHER, headers).into_response();
    }
    let has_cookie = cookies(headers).any(|value| is_same(value, &page.token));
    if !has_cookie {
        let why = "open the address that `xebec ui` printed: it has a token\n";
        return (StatusCode::UNAUTHORIZED, why).into_response();
    }
    next.run(request).await
}

/// Whether two texts are the same, in a time that does not tell where they differ.
fn is_same(one: &str, other: &str) -> bool {
    let differ = one.bytes().zip(other.bytes());
    one.len() == other.len() && differ.fold(0, |sum, (a, b)| sum | (a ^ b)) == 0
}

fn cookies(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let all = headers.get_all(COOKIE).into_iter();
    all.filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'))
        .filter_map(|one| one.trim().split_once('='))
        .filter(|(name, _)| *name == COOKIE_NAME)
        .map(|(_, value)| value)
}

/// Whether the request is for a name that only this machine has (against DNS rebinding).
fn is_local(headers: &HeaderMap) -> bool {
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    let Some(host) = host else { return false };
    let name = host.rsplit_once(':').map_or(host, |(name, port)| {
        if port.bytes().all(|digit| digit.is_ascii_digit()) {
            name
        } else {
            host
        }
    });
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    name == "localhost"
        || bare
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

fn asset(kind: &'static str, text: &'static str) -> Response {
    let headers = [
        (CONTENT_TYPE, kind),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (CACHE_CONTROL, "no-cache"),
        (
            CONTENT_SECURITY_POLICY,
            "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
        ),
    ];
    (headers, text).into_response()
}

async fn index() -> Response {
    asset("text/html; charset=utf-8", include_str!("page/index.html"))
}

/// Lines of JSON.
fn lines(lines: mpsc::Receiver<String>) -> Response {
    let body = ReceiverStream::new(lines).map(|mut line| {
        line.push('\n');
        Ok::<_, Infallible>(Bytes::from(line))
    });
    let headers = [
        (CONTENT_TYPE, "application/x-ndjson"),
        (CACHE_CONTROL, "no-store"),
    ];
    (headers, Body::from_stream(body)).into_response()
}

fn line(value: &impl Serialize) -> String {
    // None of what is written here can fail to be.
    serde_json::to_string(value).unwrap_or_default()
}

/// The map, each second.
async fn show_map(State(page): State<Arc<Page>>) -> Response {
    let (send, receive) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut draw = tokio::time::interval(DRAW);
        draw.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            draw.tick().await;
            let trouble = page.trouble.borrow().clone();
            let text = match trouble {
                Some(trouble) => line(&json!({"trouble": trouble})),
                None => line(&page.map().picture(Timestamp::now().as_second())),
            };
            if send.send(text).await.is_err() {
                return;
            }
        }
    });
    lines(receive)
}

#[derive(Deserialize)]
struct Asked {
    #[serde(default)]
    filter: String,
}

/// Flows that pass the filters, which are flags of `observe`: some of the past, and then all that come.
async fn show_flows(State(page): State<Arc<Page>>, Query(asked): Query<Asked>) -> Response {
    let filters = match FilterArgs::parse(&asked.filter) {
        Ok(filters) => filters,
        Err(why) => return (StatusCode::BAD_REQUEST, why).into_response(),
    };
    let request = GetFlowsRequest {
        number: LAST,
        follow: true,
        whitelist: filters.allow,
        blacklist: filters.deny,
        ..GetFlowsRequest::default()
    };
    let (send, receive) = mpsc::channel(AHEAD);
    tokio::spawn(async move {
        let (nodes, mut failures) = source::ask(&page.servers, &page.tls, &request);
        let mut flows = Following::default();
        nodes.into_iter().for_each(|node| flows.push(node));
        loop {
            let text = tokio::select! {
                biased;
                () = send.closed() => return,
                Some(failure) = failures.recv() => {
                    line(&json!({"trouble": format!("{failure:#}")}))
                }
                answer = flows.next() => match answer.map(|answer| answer.response_types) {
                    Some(Some(ResponseTypes::Flow(flow))) => line(&Row::new(&flow)),
                    Some(Some(ResponseTypes::LostEvents(lost))) => {
                        line(&json!({"lost": lost.num_events_lost}))
                    }
                    Some(_) => continue,
                    None => return,
                },
            };
            if send.send(text).await.is_err() {
                return;
            }
        }
    });
    lines(receive)
}

#[cfg(test)]
mod tests;
