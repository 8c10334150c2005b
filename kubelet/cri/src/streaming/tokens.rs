//! Single-use tokens: what CRI was asked for, kept until its client connects.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::{SecureRandom, SystemRandom};

/// How long a client has to connect.
const LIFE: Duration = Duration::from_secs(60);
/// Tokens out at a time: whoever asks for more does not use them.
const MOST: usize = 1000;
/// 128 bits: not to be guessed.
const TOKEN_BYTES: usize = 16;

/// The streams that a client wants of a process.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Streams {
    pub(crate) tty: bool,
    pub(crate) stdin: bool,
    pub(crate) stdout: bool,
    pub(crate) stderr: bool,
}

impl Streams {
    /// Checks what a request asks for.
    pub(crate) fn check(self) -> anyhow::Result<Self> {
        ensure!(
            !(self.tty && self.stderr),
            "tty and stderr cannot both be true: a terminal has one output"
        );
        ensure!(
            self.stdin || self.stdout || self.stderr,
            "one of stdin, stdout, or stderr must be set"
        );
        Ok(self)
    }
}

/// What a token stands for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Target {
    /// A new process in a container.
    Exec {
        container: String,
        command: Vec<String>,
        streams: Streams,
    },
    /// A container's first process.
    Attach { container: String, streams: Streams },
    /// TCP ports of a pod.
    PortForward { sandbox: String },
}

impl Target {
    /// The first element of its URL's path.
    fn kind(&self) -> &'static str {
        match self {
            Self::Exec { .. } => "exec",
            Self::Attach { .. } => "attach",
            Self::PortForward { .. } => "portforward",
        }
    }
}

/// All tokens given out and not used yet.
#[derive(Default)]
pub(crate) struct Tokens {
    address: OnceLock<SocketAddr>,
    waiting: Mutex<HashMap<String, (Instant, Target)>>,
}

impl Tokens {
    /// Sets where the streaming server listens; only the first call counts.
    pub(crate) fn set_address(&self, address: SocketAddr) {
        let _ = self.address.set(address);
    }

    /// A URL that gives `target` to the first client that comes within a minute.
    pub(crate) fn issue(&self, target: Target) -> anyhow::Result<String> {
        let address = self
            .address
            .get()
            .context("the streaming server is not running")?;
        let mut bytes = [0; TOKEN_BYTES];
        SystemRandom::new()
            .fill(&mut bytes)
            .map_err(|_| anyhow::anyhow!("the kernel gives no random bytes"))?;
        let token = URL_SAFE_NO_PAD.encode(bytes);
        let url = format!("http://{address}/{}/{token}", target.kind());
        let now = Instant::now();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.retain(|_, (until, _)| *until > now);
        ensure!(
            waiting.len() < MOST,
            "maximum number of in-flight requests exceeded"
        );
        waiting.insert(token, (now + LIFE, target));
        Ok(url)
    }

    /// Takes what a URL's path stands for; nothing for a token that is unknown,
    /// used, too old, or of another kind.
    pub(crate) fn take(&self, path: &str) -> Option<Target> {
        self.take_at(path, Instant::now())
    }

    fn take_at(&self, path: &str, now: Instant) -> Option<Target> {
        let (kind, token) = path.strip_prefix('/')?.split_once('/')?;
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let (until, target) = waiting.remove(token)?;
        (until > now && target.kind() == kind).then_some(target)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn tokens() -> Tokens {
        let tokens = Tokens::default();
        tokens.set_address(SocketAddr::from(([127, 0, 0, 1], 4000)));
        tokens
    }

    fn target() -> Target {
        Target::PortForward {
            sandbox: "abc".to_owned(),
        }
    }

    fn path(url: &str) -> &str {
        url.strip_prefix("http://127.0.0.1:4000").unwrap()
    }

    #[test]
    fn a_token_is_good_once_for_its_kind_and_for_a_minute() {
        let tokens = tokens();
        let url = tokens.issue(target()).unwrap();
        assert_eq!(tokens.take(path(&url)), Some(target()));
        assert_eq!(tokens.take(path(&url)), None, "used");

        let url = tokens.issue(target()).unwrap();
        let other = path(&url).replace("portforward", "exec");
        assert_eq!(tokens.take(&other), None, "another kind");

        let url = tokens.issue(target()).unwrap();
        let late = Instant::now() + LIFE;
        assert_eq!(tokens.take_at(path(&url), late), None, "too old");

        for wrong in ["", "/", "/portforward", "/portforward/", "/portforward/x"] {
            assert_eq!(tokens.take(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn tokens_differ_and_are_limited() {
        let tokens = tokens();
        let mut all = std::collections::HashSet::new();
        for _ in 0..MOST {
            assert!(all.insert(tokens.issue(target()).unwrap()));
        }
        tokens.issue(target()).unwrap_err();
        let one = all.iter().next().unwrap();
        tokens.take(path(one)).unwrap();
        tokens.issue(target()).unwrap();
    }

    #[test]
    fn without_a_server_there_is_no_url() {
        Tokens::default().issue(target()).unwrap_err();
    }

    #[test]
    fn a_request_names_streams_that_can_be() {
        let streams = |tty, stdin, stdout, stderr| Streams {
            tty,
            stdin,
            stdout,
            stderr,
        };
        streams(true, true, true, false).check().unwrap();
        streams(false, false, true, true).check().unwrap();
        streams(true, true, true, true).check().unwrap_err();
        streams(false, false, false, false).check().unwrap_err();
    }
}
