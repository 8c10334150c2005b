//! Service-account tokens of one pod, asked for anew only when they have aged.

use std::collections::HashMap;

use anyhow::{Context, Result};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::Api;

use crate::env::Sources;

/// However long a token lives, it is not used for more than a day.
const OLDEST: SignedDuration = SignedDuration::from_hours(24);

struct Token {
    value: String,
    issued: Timestamp,
    expires: Timestamp,
}

impl Token {
    /// Four fifths of its life are over, or a day.
    fn is_old(&self, now: Timestamp) -> bool {
        let life = self.expires.duration_since(self.issued);
        let age = now.duration_since(self.issued);
        age > OLDEST || age * 5 >= life * 4
    }
}

/// Tokens by audience and wanted life.
#[derive(Default)]
pub(crate) struct Tokens(HashMap<(String, Option<i64>), Token>);

impl Tokens {
    /// A token of the pod's account, bound to the pod.
    pub(crate) async fn get(
        &mut self,
        sources: &Sources<'_>,
        audience: Option<&str>,
        seconds: Option<i64>,
    ) -> Result<String> {
        let key = (audience.unwrap_or_default().to_owned(), seconds);
        let now = Timestamp::now();
        if let Some(token) = self.0.get(&key).filter(|token| !token.is_old(now)) {
            return Ok(token.value.clone());
        }
        match request(sources, audience, seconds, now).await {
            Ok(token) => {
                let value = token.value.clone();
                self.0.insert(key, token);
                Ok(value)
            }
            // An old one still serves until it expires.
            Err(error) => match self.0.get(&key).filter(|token| now < token.expires) {
                Some(token) => {
                    let error = format!("{error:#}");
                    tracing::warn!(error, "could not renew a token; the old one is used");
                    Ok(token.value.clone())
                }
                None => Err(error),
            },
        }
    }
}

async fn request(
    sources: &Sources<'_>,
    audience: Option<&str>,
    seconds: Option<i64>,
    now: Timestamp,
) -> Result<Token> {
    let metadata = &sources.pod.metadata;
    let account = sources
        .pod
        .spec
        .as_ref()
        .and_then(|spec| spec.service_account_name.clone())
        .unwrap_or_else(|| "default".into());
    let request = TokenRequest {
        spec: Some(TokenRequestSpec {
            audiences: audience
                .filter(|a| !a.is_empty())
                .map(|a| vec![a.to_owned()]),
            expiration_seconds: Some(seconds.unwrap_or(3600)),
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Pod".into()),
                name: metadata.name.clone(),
                uid: metadata.uid.clone(),
            }),
        }),
        ..TokenRequest::default()
    };
    let api = Api::<ServiceAccount>::namespaced(
        sources.client.clone(),
        metadata.namespace.as_deref().unwrap_or_default(),
    );
    let answer: TokenRequest = api
        .create_subresource("token", &account, &Default::default(), &request)
        .await
        .context("could not get a token")?;
    let status = answer.status.context("the API server gave no token")?;
    Ok(Token {
        value: status.token.context("the API server gave no token")?,
        issued: now,
        expires: status
            .expiration_timestamp
            .context("the API server gave a token without an end")?
            .0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_renewed_after_four_fifths_of_their_life_or_a_day() {
        let issued = Timestamp::UNIX_EPOCH;
        let token = |hours: i64| Token {
            value: String::new(),
            issued,
            expires: issued + SignedDuration::from_hours(hours),
        };
        let after = |minutes: i64| issued + SignedDuration::from_mins(minutes);
        assert!(!token(1).is_old(after(47)) && token(1).is_old(after(48)));
        let year = 365 * 24;
        assert!(!token(year).is_old(after(24 * 60)) && token(year).is_old(after(24 * 60 + 1)));
    }
}
