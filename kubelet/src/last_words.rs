//! Termination messages: what a container wrote to its file, or to its log, before it ended.

use std::io::Read;
use std::path::Path;

use k8s_openapi::api::core::v1::Container;
use xebec_cri_api::v1;

use crate::container::termination_file;
use crate::logs;
use crate::status::restarts;

/// Upstream's limits.
const FILE_BYTES: u64 = 4096;
const LOG_LINES: usize = 80;
const LOG_BYTES: usize = 2048;

/// The message of an ended container; empty where it has none.
pub(crate) async fn read(pod_dir: &Path, spec: &Container, ended: &v1::ContainerStatus) -> String {
    let path = termination_file(pod_dir, &spec.name, restarts(ended));
    let said = from_file(&path).unwrap_or_default();
    let ask_log = said.is_empty()
        && ended.exit_code != 0
        && spec.termination_message_policy.as_deref() == Some("FallbackToLogsOnError");
    if !ask_log {
        return said;
    }
    let log = Path::new(&ended.log_path);
    logs::last(log, LOG_LINES, LOG_BYTES)
        .await
        .unwrap_or_else(|error| {
            format!("Error on reading termination message from logs: {error:#}")
        })
}

fn from_file(path: &Path) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?
        .take(FILE_BYTES)
        .read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_file_comes_first_and_the_log_only_after_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("0.log");
        std::fs::write(&log, "2026-01-01T00:00:01Z stderr F it broke\n").unwrap();
        let file = termination_file(dir.path(), "c", 0);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        let spec = |policy: &str| Container {
            name: "c".into(),
            termination_message_policy: Some(policy.into()),
            ..Container::default()
        };
        let ended = |exit_code: i32| v1::ContainerStatus {
            exit_code,
            log_path: log.to_string_lossy().into_owned(),
            ..Default::default()
        };
        let fallback = spec("FallbackToLogsOnError");
        assert_eq!(read(dir.path(), &fallback, &ended(1)).await, "it broke\n");
        assert_eq!(read(dir.path(), &fallback, &ended(0)).await, "");
        assert_eq!(read(dir.path(), &spec("File"), &ended(1)).await, "");
        std::fs::write(&file, "w".repeat(5000)).unwrap();
        let said = read(dir.path(), &fallback, &ended(1)).await;
        assert_eq!(said, "w".repeat(4096));
    }
}
