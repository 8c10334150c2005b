//! The Kubernetes API server: HTTP, authentication, admission, storage, watch.
