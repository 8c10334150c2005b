//! One GET of a probe or hook, over HTTP or HTTPS; redirects on the same host are followed.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Uri, header};
use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::HTTPGetAction;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;

use super::tls::Anyone;
use super::{USER_AGENT, address, connect};

const MOST_REDIRECTS: usize = 10;

/// Where a GET goes.
#[derive(Clone, Debug, PartialEq)]
struct Place {
    tls: bool,
    host: String,
    port: u16,
    /// Path and query.
    path: String,
}

impl Place {
    fn of(get: &HTTPGetAction, pod_ip: &str, port: u16) -> Self {
        let scheme = get.scheme.as_deref().unwrap_or_default();
        let host = get.host.as_deref().filter(|host| !host.is_empty());
        let path = get.path.as_deref().unwrap_or_default();
        let slash = if path.starts_with('/') { "" } else { "/" };
        Self {
            tls: scheme.eq_ignore_ascii_case("https"),
            host: host.unwrap_or(pod_ip).to_owned(),
            port,
            path: format!("{slash}{path}"),
        }
    }

    fn url(&self) -> String {
        let scheme = if self.tls { "https" } else { "http" };
        format!("{scheme}://{}{}", address(&self.host, self.port), self.path)
    }

    /// Where a redirect from here leads; none if that is another host.
    fn redirected(&self, location: &str) -> Result<Option<Self>> {
        let mut next = self.clone();
        let location = location.split('#').next().unwrap_or_default();
        if location.starts_with('/') && !location.starts_with("//") {
            next.path = location.to_owned();
            return Ok(Some(next));
        }
        if !location.contains("://") && !location.starts_with("//") {
            let path = self.path.split('?').next().unwrap_or_default();
            let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
            next.path = format!("{folder}/{location}");
            return Ok(Some(next));
        }
        let scheme = if self.tls { "https:" } else { "http:" };
        let whole = match location.strip_prefix("//") {
            Some(_) => format!("{scheme}{location}"),
            None => location.to_owned(),
        };
        let uri: Uri = whole
            .parse()
            .with_context(|| format!("failed to parse Location header {location:?}"))?;
        next.tls = uri.scheme_str() == Some("https");
        let host = uri.host().unwrap_or_default();
        if host.trim_matches(['[', ']']) != self.host {
            return Ok(None);
        }
        next.port = uri.port_u16().unwrap_or(if next.tls { 443 } else { 80 });
        next.path = uri
            .path_and_query()
            .map_or_else(|| "/".to_owned(), ToString::to_string);
        Ok(Some(next))
    }
}

/// One GET; its status. A redirect to another host is not followed.
pub(crate) async fn get(get: &HTTPGetAction, pod_ip: &str, port: u16) -> Result<u16> {
    let mut place = Place::of(get, pod_ip, port);
    for _ in 0..=MOST_REDIRECTS {
        let asked = ask(&place, get).await;
        let (status, location) = asked.with_context(|| format!("Get {:?}", place.url()))?;
        let next = match location.filter(|_| matches!(status, 301 | 302 | 303 | 307 | 308)) {
            Some(location) => place.redirected(&location)?,
            None => None,
        };
        match next {
            Some(next) => place = next,
            None => return Ok(status),
        }
    }
    bail!(
        "Get {:?}: stopped after {MOST_REDIRECTS} redirects",
        place.url()
    )
}

/// The GET as it is asked for, with what it is called in errors.
pub(super) fn shown(get: &HTTPGetAction, pod_ip: &str, port: u16) -> String {
    Place::of(get, pod_ip, port).url()
}

/// Status and Location.
async fn ask(place: &Place, get: &HTTPGetAction) -> Result<(u16, Option<String>)> {
    let stream = connect(&place.host, place.port).await?;
    if !place.tls {
        return exchange(stream, place, get).await;
    }
    let name = rustls::pki_types::ServerName::try_from(place.host.clone())
        .with_context(|| format!("{:?} is no name of a server", place.host))?;
    let connector = TlsConnector::from(Arc::new(Anyone::config()?));
    let stream = connector
        .connect(name, stream)
        .await
        .context("TLS handshake failed")?;
    exchange(stream, place, get).await
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    place: &Place,
    get: &HTTPGetAction,
) -> Result<(u16, Option<String>)> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let mut request = Request::get(place.path.as_str()).body(Empty::<Bytes>::new())?;
    let headers = request.headers_mut();
    for header in get.http_headers.iter().flatten() {
        let name = HeaderName::try_from(header.name.as_str());
        let name = name.with_context(|| format!("{:?} is no header", header.name))?;
        let value = HeaderValue::try_from(header.value.as_str());
        let value = value.with_context(|| format!("{name} has a value that can't be sent"))?;
        headers.append(name, value);
    }
    // What is given goes before; one that is given empty is not sent.
    for (name, value) in [
        (header::USER_AGENT, USER_AGENT),
        (header::ACCEPT, "*/*"),
        (header::HOST, &address(&place.host, place.port)),
    ] {
        match headers.get(&name) {
            None => drop(headers.insert(name, HeaderValue::try_from(value)?)),
            Some(given) if given.is_empty() && name != header::HOST => drop(headers.remove(name)),
            Some(_) => {}
        }
    }
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    let response = sender.send_request(request).await?;
    let location = response.headers().get(header::LOCATION);
    let location = location.and_then(|value| value.to_str().ok());
    Ok((response.status().as_u16(), location.map(str::to_owned)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_stay_on_the_host() {
        let place = Place {
            tls: false,
            host: "10.0.0.1".into(),
            port: 8080,
            path: "/a/b?c".into(),
        };
        let to = |location: &str| {
            let next = place.redirected(location).unwrap();
            next.map(|next| next.url())
        };
        let wanted = |url: &str| Some(url.to_owned());
        assert_eq!(to("/login?x"), wanted("http://10.0.0.1:8080/login?x"));
        assert_eq!(to("d"), wanted("http://10.0.0.1:8080/a/d"));
        assert_eq!(to("https://10.0.0.1/#top"), wanted("https://10.0.0.1:443/"));
        assert_eq!(to("//10.0.0.1:81/x"), wanted("http://10.0.0.1:81/x"));
        assert_eq!(to("http://other/"), None);
        assert!(place.redirected("http://[/").is_err());
        let get = HTTPGetAction {
            path: Some("healthz".into()),
            scheme: Some("HTTPS".into()),
            ..HTTPGetAction::default()
        };
        let of = Place::of(&get, "fd00::1", 443);
        assert_eq!(of.url(), "https://[fd00::1]:443/healthz");
    }
}
