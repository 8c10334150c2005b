//! The rules for names, labels and the like (apimachinery's `validation` package), with its messages.

const QUALIFIED: &str = "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
const SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const LABEL: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const DNS_1035: &str = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')";
const LABEL_VALUE: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";

const CONFIG_KEY: &str = "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')";

fn too_long(limit: usize) -> String {
    format!("must be no more than {limit} bytes")
}

/// Of DNS names, whose characters have a byte each, the same is said in other words.
fn too_many(limit: usize) -> String {
    format!("must be no more than {limit} characters")
}

/// Alphanumeric at both ends, these characters between.
fn framed(text: &str, inner: impl Fn(u8) -> bool, end: impl Fn(u8) -> bool) -> bool {
    let bytes = text.as_bytes();
    match (bytes.first(), bytes.last()) {
        (Some(first), Some(last)) => {
            end(*first) && end(*last) && bytes.iter().all(|byte| inner(*byte))
        }
        _ => false,
    }
}

fn lower(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit()
}

fn is_label(text: &str) -> bool {
    framed(text, |byte| lower(byte) || byte == b'-', lower)
}

/// RFC 1123 subdomain: most names.
pub fn dns1123_subdomain(text: &str) -> Vec<String> {
    let mut messages = Vec::new();
    if text.len() > 253 {
        messages.push(too_many(253));
    }
    if !text.split('.').all(is_label) {
        messages.push(SUBDOMAIN.to_owned());
    }
    messages
}

/// RFC 1123 label: namespaces, ports, containers.
pub fn dns1123_label(text: &str) -> Vec<String> {
    let mut messages = Vec::new();
    if text.len() > 63 {
        messages.push(too_many(63));
    }
    if text.contains('.') && text.split('.').all(is_label) {
        // All that keeps this name from being a label.
        messages.push("must not contain dots".to_owned());
    } else if !is_label(text) {
        messages.push(LABEL.to_owned());
    }
    messages
}

/// RFC 1035 label: Services.
pub fn dns1035_label(text: &str) -> Vec<String> {
    let mut messages = Vec::new();
    if text.len() > 63 {
        messages.push(too_many(63));
    }
    if !is_label(text) || !text.as_bytes().first().is_some_and(u8::is_ascii_lowercase) {
        messages.push(DNS_1035.to_owned());
    }
    messages
}

/// A name that may stand in a path: roles and bindings.
pub fn path_segment(text: &str) -> Vec<String> {
    if text == "." || text == ".." {
        return vec![format!("may not be '{text}'")];
    }
    ["/", "%"]
        .iter()
        .filter(|c| text.contains(**c))
        .map(|c| format!("may not contain '{c}'"))
        .collect()
}

/// `[prefix/]name`: label and annotation keys.
pub fn qualified_name(text: &str) -> Vec<String> {
    let mut messages = Vec::new();
    let parts: Vec<&str> = text.split('/').collect();
    let name = match parts.as_slice() {
        [name] => *name,
        [prefix, name] => {
            if prefix.is_empty() {
                messages.push("prefix part must be non-empty".to_owned());
            } else {
                messages.extend(
                    dns1123_subdomain(prefix)
                        .into_iter()
                        .map(|message| format!("prefix part {message}")),
                );
            }
            *name
        }
        _ => {
            return vec![format!(
                "a valid label key {} with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')",
                QUALIFIED.trim_start_matches("name part ")
            )];
        }
    };
    if name.is_empty() {
        messages.push("name part must be non-empty".to_owned());
    } else if name.len() > 63 {
        messages.push(format!("name part {}", too_long(63)));
    }
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if !framed(name, inner, |byte| byte.is_ascii_alphanumeric()) {
        messages.push(QUALIFIED.to_owned());
    }
    messages
}

/// A label's value.
pub fn label_value(text: &str) -> Vec<String> {
    let mut messages = Vec::new();
    if text.len() > 63 {
        messages.push(too_long(63));
    }
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if !text.is_empty() && !framed(text, inner, |byte| byte.is_ascii_alphanumeric()) {
        messages.push(LABEL_VALUE.to_owned());
    }
    messages
}

/// What is said of an address that is none.
pub(super) const BAD_ADDRESS: &str =
    "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";

/// An IP address.
pub fn address(text: &str) -> Vec<String> {
    match text.parse::<std::net::IpAddr>() {
        Ok(_) => Vec::new(),
        Err(_) => vec![BAD_ADDRESS.to_owned()],
    }
}

/// A port's name (IANA service name).
pub fn port_name(text: &str) -> Vec<String> {
    let mut messages = Vec::new();
    let say = |broken: bool, message: &str, messages: &mut Vec<String>| {
        if broken {
            messages.push(message.to_owned());
        }
    };
    if text.len() > 15 {
        messages.push(too_many(15));
    }
    let charset = |byte: u8| lower(byte) || byte == b'-';
    say(
        text.is_empty() || !text.bytes().all(charset),
        "must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)",
        &mut messages,
    );
    say(
        !text.bytes().any(|byte| byte.is_ascii_lowercase()),
        "must contain at least one letter (a-z)",
        &mut messages,
    );
    say(
        text.contains("--"),
        "must not contain consecutive hyphens",
        &mut messages,
    );
    say(
        text.starts_with('-') || text.ends_with('-'),
        "must not begin or end with a hyphen",
        &mut messages,
    );
    messages
}

/// The key of a ConfigMap or Secret.
pub fn config_key(text: &str) -> Vec<String> {
    let mut messages = Vec::new();
    if text.len() > 253 {
        messages.push(too_many(253));
    }
    let inner = |c: u8| c.is_ascii_alphanumeric() || b"-_.".contains(&c);
    if text.is_empty() || !text.bytes().all(inner) {
        messages.push(CONFIG_KEY.to_owned());
    } else if text == "." {
        messages.push("must not be '.'".to_owned());
    } else if text == ".." {
        messages.push("must not be '..'".to_owned());
    } else if text.starts_with("..") {
        messages.push("must not start with '..'".to_owned());
    }
    messages
}

/// The name of an environment variable.
pub fn env_name(text: &str) -> Vec<String> {
    if text
        .bytes()
        .all(|c| (b' '..=b'~').contains(&c) && c != b'=')
    {
        return Vec::new();
    }
    vec![
        "a valid environment variable name must consist only of printable ASCII characters other than '='"
            .to_owned(),
    ]
}

/// The name of an HTTP header.
pub fn header_name(text: &str) -> Vec<String> {
    let inner = |c: u8| c.is_ascii_alphanumeric() || c == b'-';
    if !text.is_empty() && text.bytes().all(inner) {
        return Vec::new();
    }
    vec!["a valid HTTP header must consist of alphanumeric characters or '-' (e.g. 'X-Header-Name', regex used for validation is '[-A-Za-z0-9]+')".to_owned()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (text, fine) in [
            ("a", true),
            ("a.b-c", true),
            ("", false),
            ("A", false),
            ("a..b", false),
            ("-a", false),
            ("a_b", false),
        ] {
            assert_eq!(dns1123_subdomain(text).is_empty(), fine, "{text}");
        }
        for (text, fine) in [("a", true), ("1a", false), ("a-", false), ("a.b", false)] {
            assert_eq!(dns1035_label(text).is_empty(), fine, "{text}");
        }
        for (text, fine) in [
            ("a", true),
            ("x.io/A_b", true),
            ("/a", false),
            ("a/b/c", false),
            ("x.io/", false),
            ("A.io/b", false),
        ] {
            assert_eq!(qualified_name(text).is_empty(), fine, "{text}");
        }
        assert!(label_value("").is_empty());
        assert_eq!(
            label_value(&"v".repeat(64)),
            ["must be no more than 63 bytes"]
        );
    }
}
