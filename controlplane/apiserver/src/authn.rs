//! Who asks: client certificates, service-account tokens, and impersonation by administrators.

use http::HeaderMap;
use rustls_pki_types::CertificateDer;
use serde_json::Value;

use crate::error::ApiError;
use crate::tokens::Tokens;

/// An authenticated user.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserInfo {
    /// User name.
    pub name: String,
    /// Unique id, where there is one.
    pub uid: String,
    /// Groups.
    pub groups: Vec<String>,
    /// What else the authenticator knows.
    pub extra: Vec<(String, Vec<String>)>,
}

impl UserInfo {
    /// A user with groups; every authenticated user is in `system:authenticated`.
    pub fn new(name: &str, groups: &[&str]) -> Self {
        let mut groups: Vec<String> = groups.iter().map(|group| (*group).to_owned()).collect();
        if !groups.iter().any(|group| group == "system:authenticated") {
            groups.push("system:authenticated".into());
        }
        Self {
            name: name.to_owned(),
            groups,
            ..Self::default()
        }
    }

    /// The user of a request without credentials.
    pub fn anonymous() -> Self {
        Self {
            name: "system:anonymous".into(),
            groups: vec!["system:unauthenticated".into()],
            ..Self::default()
        }
    }

    /// Whether the user is in this group.
    pub fn is_in(&self, group: &str) -> bool {
        self.groups.iter().any(|one| one == group)
    }

    /// `authentication.k8s.io/v1` UserInfo.
    pub fn to_value(&self) -> Value {
        let mut value = serde_json::json!({"username": self.name, "groups": self.groups});
        if !self.uid.is_empty() {
            value["uid"] = self.uid.clone().into();
        }
        for (key, values) in &self.extra {
            value["extra"][key] = values.clone().into();
        }
        value
    }
}

/// The user of a client certificate that TLS has verified: CN is the name, O the groups.
pub(crate) fn of_certificate(certificate: &CertificateDer<'_>) -> Option<UserInfo> {
    let digest = ring::digest::digest(&ring::digest::SHA256, certificate);
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let subject = certificate.subject();
    let name = subject.iter_common_name().next()?.as_str().ok()?;
    let groups: Vec<&str> = subject
        .iter_organization()
        .filter_map(|o| o.as_str().ok())
        .collect();
    let mut user = UserInfo::new(name, &groups);
    let fingerprint: String = digest
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    user.extra.push((
        "authentication.kubernetes.io/credential-id".into(),
        vec![format!("X509SHA256={fingerprint}")],
    ));
    Some(user)
}

/// The user of a request over TLS: bearer token first, then certificate, then nobody.
pub(crate) fn authenticate(
    headers: &HeaderMap,
    certificate: Option<&UserInfo>,
    tokens: &Tokens,
) -> Result<UserInfo, ApiError> {
    let bearer = headers
        .get(http::header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| {
            let (scheme, token) = value.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
        });
    match (bearer, certificate) {
        (Some(token), _) => tokens
            .verify(token, None)
            .map(|claims| claims.user())
            .map_err(|_| ApiError::unauthorized()),
        (None, Some(user)) => Ok(user.clone()),
        (None, None) => Ok(UserInfo::anonymous()),
    }
}

/// The user that an administrator plays by `Impersonate-*` headers, if any.
pub(crate) fn impersonated(
    headers: &HeaderMap,
    user: &UserInfo,
) -> Result<Option<UserInfo>, ApiError> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let Some(name) = text("impersonate-user") else {
        return Ok(None);
    };
    if !user.is_in("system:masters") {
        return Err(ApiError::forbidden(format!(
            "users {name:?} is forbidden: User {:?} cannot impersonate resource \"users\" in API group \"\" at the cluster scope",
            user.name
        )));
    }
    let mut groups: Vec<&str> = headers
        .get_all("impersonate-group")
        .iter()
        .filter_map(|value| value.to_str().ok())
        .collect();
    let namespace_group;
    if let Some((namespace, _)) = name
        .strip_prefix("system:serviceaccount:")
        .and_then(|rest| rest.split_once(':'))
    {
        namespace_group = format!("system:serviceaccounts:{namespace}");
        if groups.is_empty() {
            groups.extend(["system:serviceaccounts", namespace_group.as_str()]);
        }
    }
    if name == "system:anonymous" {
        return Ok(Some(UserInfo::anonymous()));
    }
    Ok(Some(UserInfo::new(name, &groups)))
}
