//! A real browser, led by its driver (W3C WebDriver). The few commands that are needed are less than any crate for them
//! brings along.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::succeed;

/// How long anything on a page may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// The key of an element in an answer.
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";
/// The key that ends a line.
pub const ENTER: &str = "\u{e007}";

/// A process that says where it serves, and ends with this.
pub struct Serving(Child);

impl Serving {
    /// Starts it, and gives what stands behind `mark` in a line of its output.
    pub fn start(mut command: Command, mark: &str) -> Result<(Self, String)> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("could not start {:?}", command.get_program()))?;
        let pipe = child.stdout.take().context("it has no output")?;
        let own = Self(child);
        let mut lines = BufReader::new(pipe);
        loop {
            let mut line = String::new();
            let length = lines.read_line(&mut line)?;
            ensure!(length > 0, "it ended before it said where it serves");
            if let Some((_, found)) = line.split_once(mark) {
                let found = found.trim().to_owned();
                // What it says later must not block it.
                std::thread::spawn(move || lines.read_to_end(&mut Vec::new()));
                return Ok((own, found));
            }
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Debian's Chromium without a window, which reaches nothing but this machine; it ends with this.
pub struct Browser {
    /// The session's address.
    at: String,
    _driver: Serving,
    _folder: tempfile::TempDir,
}

impl Browser {
    /// Starts one.
    pub fn start() -> Result<Self> {
        let mut command = Command::new("chromedriver");
        command.arg("--port=0");
        let (driver, port) = Serving::start(command, "successfully on port ")
            .context("the Debian packages chromium and chromium-driver are needed")?;
        let folder = tempfile::tempdir()?;
        let options = json!({"args": [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--window-size=1500,1000",
            format!("--user-data-dir={}", folder.path().display()),
        ]});
        let at = format!("http://127.0.0.1:{}/session", port.trim_end_matches('.'));
        let wanted = json!({"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": options, "timeouts": {"script": PATIENCE.as_millis() as u64},
        }}});
        let session = call("POST", &at, &wanted)?;
        let id = session["sessionId"].as_str().context("no session")?;
        Ok(Self {
            at: format!("{at}/{id}"),
            _driver: driver,
            _folder: folder,
        })
    }

    fn post(&self, path: &str, body: &Value) -> Result<Value> {
        call("POST", &format!("{}/{path}", self.at), body)
    }

    /// Opens a page.
    pub fn open(&self, url: &str) -> Result<()> {
        self.post("url", &json!({"url": url})).map(drop)
    }

    /// What a function's body gives on the page.
    pub fn run(&self, script: &str) -> Result<Value> {
        self.post("execute/sync", &json!({"script": script, "args": []}))
    }

    /// The same of one that gives it later, to its only argument.
    pub fn run_later(&self, script: &str) -> Result<Value> {
        self.post("execute/async", &json!({"script": script, "args": []}))
    }

    /// Waits until a script gives true.
    pub fn until(&self, what: &str, script: &str) -> Result<()> {
        let begun = Instant::now();
        let mut last = Value::Null;
        while begun.elapsed() < PATIENCE {
            last = self.run(script)?;
            if last == json!(true) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        let page = self.run("return document.documentElement.outerHTML")?;
        bail!("{what}: not within {PATIENCE:?}; {last}\n{page}")
    }

    fn element(&self, css: &str) -> Result<String> {
        let wanted = json!({"using": "css selector", "value": css});
        let found = self.post("element", &wanted)?;
        let id = found[ELEMENT].as_str().context("no element")?;
        Ok(format!("element/{id}"))
    }

    /// Clicks on what a selector finds.
    pub fn click(&self, css: &str) -> Result<()> {
        let element = self.element(css)?;
        self.post(&format!("{element}/click"), &json!({})).map(drop)
    }

    /// Writes a text into a field in the place of what is there.
    pub fn write(&self, css: &str, text: &str) -> Result<()> {
        let element = self.element(css)?;
        self.post(&format!("{element}/clear"), &json!({}))?;
        let keys = json!({"text": text});
        self.post(&format!("{element}/value"), &keys).map(drop)
    }

    /// A picture of the page (PNG, base64).
    pub fn picture(&self) -> Result<String> {
        let picture = call("GET", &format!("{}/screenshot", self.at), &Value::Null)?;
        Ok(picture.as_str().context("no picture")?.to_owned())
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Otherwise the driver leaves its browser behind.
        let _ = call("DELETE", &self.at, &Value::Null);
    }
}

/// One command.
fn call(method: &str, url: &str, body: &Value) -> Result<Value> {
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--max-time", "90", "-X", method])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    if !body.is_null() {
        curl.args([
            "-H",
            "Content-Type: application/json",
            "--data-binary",
            "@-",
        ]);
    }
    let mut curl = curl.arg(url).spawn().context("could not start curl")?;
    let mut pipe = curl.stdin.take().context("curl has no input")?;
    pipe.write_all(body.to_string().as_bytes())
        .context("curl does not read")?;
    drop(pipe);
    let text = succeed(url, curl.wait_with_output()?)?;
    let answer: Value = serde_json::from_str(&text).with_context(|| format!("{url}: {text}"))?;
    let value = &answer["value"];
    if let Some(error) = value["error"].as_str() {
        bail!("{url}: {error}: {}", value["message"]);
    }
    Ok(value.clone())
}
