//! Who is let in.

use super::*;

fn headers(pairs: &[(axum::http::HeaderName, &'static str)]) -> HeaderMap {
    let pairs = pairs.iter().cloned();
    pairs
        .map(|(name, value)| (name, axum::http::HeaderValue::from_static(value)))
        .collect()
}

#[test]
fn names_are_this_machines_own() {
    for host in [
        "localhost",
        "localhost:12000",
        "127.0.0.1:1",
        "127.1.2.3",
        "[::1]:12000",
        "[::1]",
    ] {
        assert!(is_local(&headers(&[(HOST, host)])), "{host}");
    }
    for host in [
        "",
        "example.com",
        "127.0.0.1.example.com:12000",
        "192.0.2.1:12000",
        "localhost.x",
    ] {
        assert!(!is_local(&headers(&[(HOST, host)])), "{host}");
    }
    assert!(!is_local(&HeaderMap::new()));
}

#[test]
fn cookies_are_found_among_others() {
    let all = headers(&[(COOKIE, "a=b; xebec-ui=one"), (COOKIE, "xebec-ui=two;c")]);
    assert_eq!(cookies(&all).collect::<Vec<_>>(), ["one", "two"]);
    assert!(is_same("abc", "abc") && !is_same("abc", "abd") && !is_same("ab", "abc"));
    let tokens = [token().unwrap(), token().unwrap()];
    assert!(
        tokens[0] != tokens[1] && tokens[0].len() == 32,
        "{tokens:?}"
    );
}
