//! The CNI plugin executable (specification 1.1.0): reads what the runtime gives it and asks the agent over its socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};

/// Versions of the specification that are spoken, oldest first.
const VERSIONS: &[&str] = &["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
const AGENT_SOCKET: &str = "/run/xebec/agent.sock";
/// An agent that says nothing for so long is stuck.
const PATIENCE: Duration = Duration::from_secs(60);

/// An error as the specification wants it.
struct Error {
    code: u32,
    message: String,
}

impl Error {
    fn new(code: u32, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }
}

/// Runs the plugin on the process's environment and standard streams.
pub fn main() -> ExitCode {
    let mut input = String::new();
    // VERSION may come with no input at all.
    let read = std::io::stdin()
        .read_to_string(&mut input)
        .map_err(|error| Error::new(6, format!("the configuration can't be read: {error}")));
    let env = |name: &str| std::env::var(name).unwrap_or_default();
    let outcome = read.and_then(|_| run(&input, &env));
    let (text, code) = match outcome {
        Ok(Value::Null) => (String::new(), ExitCode::SUCCESS),
        Ok(result) => (result.to_string(), ExitCode::SUCCESS),
        Err(error) => {
            let version = serde_json::from_str::<Value>(&input)
                .ok()
                .and_then(|c| c["cniVersion"].as_str().map(str::to_owned));
            let error = json!({"cniVersion": version.unwrap_or_else(|| "1.1.0".into()), "code": error.code, "msg": error.message});
            (error.to_string(), ExitCode::FAILURE)
        }
    };
    // A runtime that does not read its answer learns it from the exit code.
    let _ = std::io::stdout().write_all(text.as_bytes());
    code
}

fn run(input: &str, env: &dyn Fn(&str) -> String) -> Result<Value, Error> {
    let command = env("CNI_COMMAND");
    let config: Value = if input.trim().is_empty() {
        json!({})
    } else {
        serde_json::from_str(input)
            .map_err(|error| Error::new(6, format!("the configuration is no JSON: {error}")))?
    };
    let version = config["cniVersion"].as_str().unwrap_or("0.3.0");
    if command == "VERSION" {
        return Ok(json!({"cniVersion": version, "supportedVersions": VERSIONS}));
    }
    if !VERSIONS.contains(&version) {
        return Err(Error::new(
            1,
            format!(
                "CNI version {version:?} is not supported; supported are {}",
                VERSIONS.join(", ")
            ),
        ));
    }
    if !matches!(command.as_str(), "ADD" | "DEL" | "CHECK" | "STATUS" | "GC") {
        return Err(Error::new(
            4,
            format!("CNI_COMMAND {command:?} is not known"),
        ));
    }
    let socket = config["agentSocket"].as_str().unwrap_or(AGENT_SOCKET);
    let request = json!({
        "command": command,
        "containerID": env("CNI_CONTAINERID"),
        "netns": env("CNI_NETNS"),
        "ifname": env("CNI_IFNAME"),
        "args": env("CNI_ARGS"),
        "path": env("CNI_PATH"),
        "config": config,
    });
    let result = ask(socket, &request).map_err(|failure| failure.of(&command))?;
    // A plugin in a chain passes on what those before it made.
    if command == "ADD" && config["prevResult"].is_object() {
        return Ok(config["prevResult"].clone());
    }
    Ok(if command == "ADD" {
        result
    } else {
        Value::Null
    })
}

/// Why the agent did not do what it was asked to.
enum Failure {
    /// It could not be asked.
    Unavailable(String),
    /// Its own answer.
    Refused(Error),
}

impl Failure {
    /// The error of this command. What is not there yet means to STATUS that no pod can be added (50), and to
    /// everything else that it may be tried again later (11).
    fn of(self, command: &str) -> Error {
        match self {
            Self::Unavailable(message) if command == "STATUS" => Error::new(50, message),
            Self::Unavailable(message) => Error::new(11, message),
            Self::Refused(error) => error,
        }
    }
}

/// One POST to the agent.
fn ask(socket: &str, request: &Value) -> Result<Value, Failure> {
    let later = |error: std::io::Error| {
        Failure::Unavailable(format!("the agent at {socket} does not answer: {error}"))
    };
    let mut stream = UnixStream::connect(socket).map_err(later)?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(later)?;
    let body = request.to_string();
    let request = format!(
        "POST /cni HTTP/1.1\r\nHost: agent\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).map_err(later)?;
    let mut reader = BufReader::new(stream);
    let mut status = String::new();
    reader.read_line(&mut status).map_err(later)?;
    let code: u16 = status
        .split(' ')
        .nth(1)
        .and_then(|code| code.parse().ok())
        .unwrap_or(0);
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).map_err(later)? == 0 || line.trim().is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':') {
            if name.eq_ignore_ascii_case("content-length") {
                length = value.trim().parse().unwrap_or(0);
            }
        }
    }
    let mut answer = vec![0; length];
    reader.read_exact(&mut answer).map_err(later)?;
    let answer: Value = serde_json::from_slice(&answer)
        .map_err(|_| Failure::Refused(Error::new(999, "the agent's answer is no JSON")))?;
    if code == 200 {
        return Ok(answer);
    }
    let number = answer["code"]
        .as_u64()
        .and_then(|code| u32::try_from(code).ok())
        .unwrap_or(999);
    Err(Failure::Refused(Error::new(
        number,
        answer["msg"].as_str().unwrap_or("the agent refused"),
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(name: &'static str) -> impl Fn(&str) -> String {
        move |key| {
            if key == "CNI_COMMAND" {
                name.to_owned()
            } else {
                String::new()
            }
        }
    }

    #[test]
    fn version_and_bad_input() {
        let version = run(r#"{"cniVersion":"1.0.0"}"#, &command("VERSION"))
            .map_err(|e| e.message)
            .unwrap();
        assert_eq!(
            version["supportedVersions"].as_array().unwrap().len(),
            VERSIONS.len()
        );
        let code = |input: &str, name: &'static str| {
            run(input, &command(name)).err().map(|error| error.code)
        };
        assert_eq!(code("{", "ADD"), Some(6));
        assert_eq!(code(r#"{"cniVersion":"9.9.9"}"#, "ADD"), Some(1));
        assert_eq!(code(r#"{"cniVersion":"1.0.0"}"#, "DANCE"), Some(4));
        let absent = r#"{"cniVersion":"1.1.0","agentSocket":"/nonexistent/agent.sock"}"#;
        assert_eq!(code(absent, "ADD"), Some(11));
        assert_eq!(code(absent, "STATUS"), Some(50));
    }

    #[test]
    fn the_agents_answer_and_its_error_come_back() {
        let dir = std::env::temp_dir().join(format!("xebec-cni-test-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let socket = dir.join("agent.sock");
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let server = std::thread::spawn(move || {
            for (status, body) in [
                ("200 OK", r#"{"ips":[]}"#),
                ("200 OK", "null"),
                ("400 Bad Request", r#"{"code":7,"msg":"no"}"#),
            ] {
                let (mut stream, _) = listener.accept().unwrap();
                let mut buffer = [0; 4096];
                let read = stream.read(&mut buffer).unwrap();
                assert!(buffer[..read].starts_with(b"POST /cni HTTP/1.1"));
                // What the runtime says of the pod's ports is for the agent.
                let asked = String::from_utf8_lossy(&buffer[..read]);
                assert!(asked.contains(r#""portMappings":[{"#), "{asked}");
                write!(
                    stream,
                    "HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}",
                    body.len()
                )
                .unwrap();
            }
        });
        let config = json!({
            "cniVersion": "1.1.0",
            "agentSocket": socket,
            "runtimeConfig": {"portMappings": [{"hostPort": 80, "containerPort": 8080, "protocol": "tcp"}]},
        });
        let config = config.to_string();
        assert_eq!(
            run(&config, &command("ADD"))
                .map_err(|e| e.message)
                .unwrap(),
            json!({"ips": []})
        );
        let status = run(&config, &command("STATUS")).map_err(|e| e.message);
        assert_eq!(status.unwrap(), Value::Null);
        let error = run(&config, &command("DEL")).err().unwrap();
        assert_eq!((error.code, error.message.as_str()), (7, "no"));
        server.join().unwrap();
        std::fs::remove_dir_all(dir).unwrap();
    }
}
