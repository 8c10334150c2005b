//! The kubelet: drives the pods of one node through CRI and reports their status.
