//! The page of `xebec ui` in a real browser without a network: the map of the example, flows as they happen, filters.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use base64::Engine;
use xebec_tests::browser::{Browser, ENTER, Serving};
use xebec_tests::{Cluster, Machine, assert_nothing_left, shop};

/// Where a picture of the page is kept, if this is set.
const PICTURE: &str = "XEBEC_PAGE_PICTURE";

/// All of the example's pods are on the map, with what goes between them.
fn map_shows_the_example(browser: &Browser) -> Result<()> {
    for name in ["shop/web", "shop/api", "shop/stranger"] {
        let script = format!("return !!document.querySelector('.node[data-name=\"{name}\"]')");
        browser.until(name, &script)?;
    }
    let edge = "document.querySelector('.edge[data-from=\"shop/web\"][data-to=\"shop/api\"]')";
    let label = "document.querySelector('.label[data-from=\"shop/web\"][data-to=\"shop/api\"]')";
    let label = format!("return / ms| µs/.test({label}?.textContent ?? '')");
    browser.until("web to api, with how long it takes", &label)?;
    browser.until(
        "none of these is dropped",
        &format!("return !{edge}.classList.contains('dropped')"),
    )
}

/// The stranger's line is red, and tells the rule when it is clicked.
fn a_dropped_line_tells_its_rule(browser: &Browser) -> Result<()> {
    let css = ".edge.dropped[data-from='shop/stranger'][data-to='shop/api']";
    browser.until(
        "the stranger's line",
        &format!("return !!document.querySelector(\"{css}\")"),
    )?;
    let colours = format!(
        "return getComputedStyle(document.querySelector(\"{css} path.seen\")).stroke === getComputedStyle(document.querySelector('.arrow.bad')).fill"
    );
    browser.until("it is red", &colours)?;
    browser.click(".label.dropped[data-from='shop/stranger'][data-to='shop/api']")?;
    browser.until("the rule",
        "return !document.getElementById('details').hidden && /POLICY_DENIED.*by NetworkPolicy shop\\/api-from-web/s.test(document.getElementById('details').innerText)",
    )
}

/// A flow that is denied from here on is in the table, in red, within two seconds of its packet.
fn denied_flows_come_soon(browser: &Browser) -> Result<()> {
    let script = r#"
        const done = arguments[arguments.length - 1];
        const body = document.getElementById("flows");
        const known = new Set(body.children);
        new MutationObserver((_, self) => {
            const row = [...body.children].find((row) => !known.has(row) && row.classList.contains("dropped"));
            if (!row) return;
            self.disconnect();
            const [hours, minutes, seconds] = row.querySelector(".time").textContent.split(":").map(Number);
            const then = new Date();
            then.setHours(hours, minutes, 0, seconds * 1000);
            const red = getComputedStyle(row.querySelector(".verdict")).color;
            done({ after: Date.now() - then, red, rule: row.querySelector(".by").textContent, text: row.innerText });
        }).observe(body, { childList: true });
    "#;
    let seen = browser.run_later(script)?;
    let after = seen["after"].as_f64().context("no time")?;
    ensure!((0.0..2_000.0).contains(&after), "{seen}");
    ensure!(seen["red"] == "rgb(194, 42, 47)", "{seen}");
    let rule = seen["rule"].as_str().unwrap_or_default();
    ensure!(rule.contains("NetworkPolicy shop/api-from-web"), "{seen}");
    ensure!(
        seen["text"]
            .as_str()
            .unwrap_or_default()
            .contains("shop/stranger"),
        "{seen}"
    );
    Ok(())
}

/// Writes a filter, and waits until it holds for all rows.
fn filter(browser: &Browser, text: &str, holds: &str) -> Result<()> {
    browser.write("#filter", &format!("{text}{ENTER}"))?;
    let script = format!(
        "const rows = [...document.querySelectorAll('#flows tr')]; return rows.length > 3 && rows.every((row) => {holds})"
    );
    browser.until(text, &script)
}

fn filters_are_those_of_observe(browser: &Browser) -> Result<()> {
    let verdict = |word: &str| format!("row.querySelector('.verdict')?.textContent === '{word}'");
    filter(browser, "--verdict DROPPED", &verdict("DROPPED"))?;
    let to = "/^shop\\/api-.*:8080/.test(row.children[3]?.textContent)";
    let both = format!("{} && {to}", verdict("FORWARDED"));
    filter(
        browser,
        "--to-pod shop/api- --verdict FORWARDED --not --reply",
        &both,
    )?;
    browser.write("#filter", &format!("--colour red{ENTER}"))?;
    browser.until(
        "what is no filter is refused",
        "return document.getElementById('refused').innerText.includes('--colour')",
    )?;
    filter(browser, "", "true")?;
    browser.until(
        "and no more",
        "return document.getElementById('refused').hidden",
    )
}

fn nobody_else_is_let_in(url: &str) -> Result<()> {
    let (page, _) = url.split_once("?token=").context("no token")?;
    for (path, header) in [
        ("", "X: y"),
        ("api/flows", "Cookie: xebec-ui=0"),
        ("?token=0", "X: y"),
    ] {
        let status = Command::new("curl")
            .args(["-s", "-o", "/dev/null", "-w", "%{http_code}", "-H", header])
            .arg(format!("{page}{path}"))
            .output()?;
        ensure!(status.stdout == b"401", "{path}: {status:?}");
    }
    let elsewhere = Command::new("curl")
        .args([
            "-s",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
            "-H",
            "Host: evil.example",
        ])
        .arg(url)
        .output()?;
    ensure!(elsewhere.stdout == b"403", "{elsewhere:?}");
    Ok(())
}

#[test]
fn the_page_shows_what_the_example_does() -> Result<()> {
    let before = Machine::now()?;
    let mut cluster = Cluster::up("page", &["--nodes", "2"])?;
    shop::apply(&cluster)?;
    let nodes = shop::node_addresses(&cluster)?;
    let address = nodes.values().next().context("no node")?;
    let (page, url) = Serving::start(cluster.xebec(&["ui", "--listen", "127.0.0.1:0"]), "http://")?;
    let url = format!("http://{url}");
    nobody_else_is_let_in(&url)?;
    let seen = (|| {
        let browser = Browser::start()?;
        browser.open(&url)?;
        // From outside to `web`, and from there to `api`.
        let port = shop::node_port(address, "/");
        shop::ask(&port, 30)?;
        map_shows_the_example(&browser)?;
        denied_flows_come_soon(&browser)?;
        filters_are_those_of_observe(&browser)?;
        a_dropped_line_tells_its_rule(&browser)?;
        if let Some(path) = std::env::var_os(PICTURE) {
            let picture = base64::engine::general_purpose::STANDARD.decode(browser.picture()?)?;
            std::fs::write(path, picture)?;
        }
        Ok::<_, anyhow::Error>(())
    })();
    drop(page);
    seen.with_context(|| cluster.log())?;
    cluster.down()?;
    assert_nothing_left(&before)
}
