//! Service-account tokens: JSON Web Tokens (RFC 7519) signed with ES256.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::SystemRandom;
use ring::signature::{self, EcdsaKeyPair, KeyPair, UnparsedPublicKey};
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject;
use serde_json::{Value, json};

use crate::authn::UserInfo;

/// Signs and verifies.
pub(crate) struct Tokens {
    key: EcdsaKeyPair,
    key_id: String,
    pub issuer: String,
}

/// What a verified token says.
pub(crate) struct Claims(Value);

impl Claims {
    /// The service account's user.
    pub(crate) fn user(&self) -> UserInfo {
        let kubernetes = &self.0["kubernetes.io"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let namespace = text(&kubernetes["namespace"]);
        let name = text(&kubernetes["serviceaccount"]["name"]);
        let group = format!("system:serviceaccounts:{namespace}");
        let mut user = UserInfo::new(
            &format!("system:serviceaccount:{namespace}:{name}"),
            &["system:serviceaccounts", &group],
        );
        user.uid = text(&kubernetes["serviceaccount"]["uid"]);
        for (key, field) in [("pod-name", "name"), ("pod-uid", "uid")] {
            if let Some(value) = kubernetes["pod"][field].as_str() {
                user.extra.push((
                    format!("authentication.kubernetes.io/{key}"),
                    vec![value.to_owned()],
                ));
            }
        }
        user
    }

    /// `aud`.
    pub(crate) fn audiences(&self) -> Vec<String> {
        self.0["aud"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|one| one.as_str().map(str::to_owned))
            .collect()
    }
}

impl Tokens {
    /// Reads the P-256 key (PKCS #8 PEM).
    pub(crate) fn new(key_pem: &str, issuer: String) -> Result<Self, String> {
        let der = PrivatePkcs8KeyDer::from_pem_slice(key_pem.as_bytes())
            .map_err(|_| "the service-account key is no PKCS #8 PEM".to_owned())?;
        let algorithm = &signature::ECDSA_P256_SHA256_FIXED_SIGNING;
        let key = EcdsaKeyPair::from_pkcs8(algorithm, der.secret_pkcs8_der(), &SystemRandom::new())
            .map_err(|error| format!("the service-account key is no P-256 key: {error}"))?;
        let digest = ring::digest::digest(&ring::digest::SHA256, key.public_key().as_ref());
        Ok(Self {
            key_id: URL_SAFE_NO_PAD.encode(digest),
            key,
            issuer,
        })
    }

    /// A token with these claims.
    pub(crate) fn sign(&self, claims: &Value) -> Result<String, String> {
        let header = json!({"alg": "ES256", "kid": self.key_id});
        let mut token = format!(
            "{}.{}",
            URL_SAFE_NO_PAD.encode(header.to_string()),
            URL_SAFE_NO_PAD.encode(claims.to_string())
        );
        let signature = self
            .key
            .sign(&SystemRandom::new(), token.as_bytes())
            .map_err(|_| "could not sign a token".to_owned())?;
        token.push('.');
        token.push_str(&URL_SAFE_NO_PAD.encode(signature));
        Ok(token)
    }

    /// The claims of a token that we signed, is valid now, and is for `audience` (ours, where none is given).
    pub(crate) fn verify(
        &self,
        token: &str,
        audience: Option<&str>,
    ) -> Result<Claims, &'static str> {
        let (signed, signature) = token.rsplit_once('.').ok_or("no token")?;
        let (_, payload) = signed.split_once('.').ok_or("no token")?;
        let signature = URL_SAFE_NO_PAD.decode(signature).map_err(|_| "no token")?;
        UnparsedPublicKey::new(
            &signature::ECDSA_P256_SHA256_FIXED,
            self.key.public_key().as_ref(),
        )
        .verify(signed.as_bytes(), &signature)
        .map_err(|_| "not signed by this cluster")?;
        let payload = URL_SAFE_NO_PAD.decode(payload).map_err(|_| "no token")?;
        let claims: Value = serde_json::from_slice(&payload).map_err(|_| "no token")?;
        let now = time::OffsetDateTime::now_utc().unix_timestamp();
        if claims["exp"].as_i64().is_none_or(|end| end <= now) {
            return Err("expired");
        }
        if claims["nbf"].as_i64().is_some_and(|start| start > now + 60) {
            return Err("not valid yet");
        }
        let claims = Claims(claims);
        let wanted = audience.unwrap_or(&self.issuer);
        if !claims.audiences().iter().any(|one| one == wanted) {
            return Err("for another audience");
        }
        Ok(claims)
    }

    /// The public key as a JSON Web Key Set (RFC 7517).
    pub(crate) fn jwks(&self) -> Value {
        // An uncompressed point: 0x04, then both coordinates.
        let point = self.key.public_key().as_ref();
        let half = |range: std::ops::Range<usize>| {
            point.get(range).map(|part| URL_SAFE_NO_PAD.encode(part))
        };
        json!({"keys": [{"use": "sig", "kty": "EC", "crv": "P-256", "alg": "ES256", "kid": self.key_id, "x": half(1..33), "y": half(33..65)}]})
    }
}
