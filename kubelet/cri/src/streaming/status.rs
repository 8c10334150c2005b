//! The last word on a stream: a `metav1.Status` on the error channel.

use serde_json::{Value, json};

/// The process ended with 0, or there is no exit code to tell.
pub(super) fn success() -> Value {
    json!({"metadata": {}, "status": "Success"})
}

/// The process ended with this code; 0 is success.
pub(super) fn exited(code: i32) -> Value {
    if code == 0 {
        return success();
    }
    json!({
        "metadata": {},
        "status": "Failure",
        "message": format!("command terminated with non-zero exit code: exit code {code}"),
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
    })
}

/// The process was not started, or was lost.
pub(super) fn internal(message: &str) -> Value {
    json!({
        "metadata": {},
        "status": "Failure",
        "message": format!("Internal error occurred: {message}"),
        "reason": "InternalError",
        "details": {"causes": [{"message": message}]},
        "code": 500,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_find_the_exit_code_where_they_look() {
        assert_eq!(exited(0)["status"], "Success");
        let status = exited(42);
        assert_eq!(status["reason"], "NonZeroExitCode");
        assert_eq!(status["details"]["causes"][0]["reason"], "ExitCode");
        assert_eq!(status["details"]["causes"][0]["message"], "42");
        assert_eq!(internal("x")["message"], "Internal error occurred: x");
    }
}
