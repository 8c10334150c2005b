//! End-to-end tests on the running kernel; they need root.
