//! The container runtime: the CRI v1 server, images, sandboxes and containers.
