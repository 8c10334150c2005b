//! The small per-pod supervisor that owns containers, their logs and exit codes.
