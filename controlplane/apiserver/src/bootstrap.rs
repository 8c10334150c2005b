//! Objects that every cluster has: namespaces, priority classes, and the API server's own Service.

use serde_json::{Value, json};
use xebec_schema::apply::{self, ApplyOptions};
use xebec_schema::table;
use xebec_schema::{defaults, shape};
use xebec_store::Txn;

use crate::error::ApiError;
use crate::handler::Handler;
use crate::registry::{Part, now};
use crate::services::{self, Allocator};

impl Handler {
    /// Makes what is missing; what is there stays as it is, but the API server's address is brought up to date.
    pub(crate) async fn bootstrap(&self) -> Result<(), ApiError> {
        for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
            self.ensure("", "namespaces", None, json!({"metadata": {"name": name}}))
                .await?;
        }
        for (name, value, description) in [
            (
                "system-node-critical",
                2_000_001_000,
                "Used for system critical pods that must not be moved from their current node.",
            ),
            (
                "system-cluster-critical",
                2_000_000_000,
                "Used for system critical pods that must run in the cluster, but can be moved to another node if necessary.",
            ),
        ] {
            let class =
                json!({"metadata": {"name": name}, "value": value, "description": description});
            self.ensure("scheduling.k8s.io", "priorityclasses", None, class)
                .await?;
        }
        let address = self.config.advertise_address.to_string();
        let port = self.config.secure_port;
        if let Some(services) = table::resource("", "v1", "services") {
            self.allocator
                .repair(self.registry.store.as_ref(), services)
                .await?;
        }
        let first = self.allocator.cidrs.first().map(services::first);
        let first = first.map(|ip| ip.to_string()).unwrap_or_default();
        let labels = json!({"component": "apiserver", "provider": "kubernetes"});
        let service = json!({
            "metadata": {"name": "kubernetes", "labels": labels},
            "spec": {"clusterIP": first, "ports": [{"name": "https", "port": 443, "targetPort": port}]},
        });
        self.ensure("", "services", Some("default"), service)
            .await?;
        let slice = json!({
            "metadata": {"name": "kubernetes", "labels": {"kubernetes.io/service-name": "kubernetes"}},
            "addressType": if self.config.advertise_address.is_ipv4() { "IPv4" } else { "IPv6" },
            "endpoints": [{"addresses": [address], "conditions": {"ready": true}}],
            "ports": [{"name": "https", "port": port, "protocol": "TCP"}],
        });
        self.ensure(
            "discovery.k8s.io",
            "endpointslices",
            Some("default"),
            slice.clone(),
        )
        .await?;
        let endpoints = json!({
            "metadata": {"name": "kubernetes", "labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}},
            "subsets": [{"addresses": [{"ip": address}], "ports": [{"name": "https", "port": port, "protocol": "TCP"}]}],
        });
        self.ensure("", "endpoints", Some("default"), endpoints.clone())
            .await?;
        // The address may be another one than at the last start.
        self.refresh(
            "discovery.k8s.io",
            "endpointslices",
            &slice,
            &["endpoints", "ports"],
        )
        .await?;
        self.refresh("", "endpoints", &endpoints, &["subsets"])
            .await
    }

    async fn ensure(
        &self,
        group: &str,
        plural: &str,
        namespace: Option<&str>,
        mut object: Value,
    ) -> Result<(), ApiError> {
        let Some(resource) = table::resource(group, "v1", plural) else {
            return Ok(());
        };
        object["apiVersion"] = resource.api_version().into();
        object["kind"] = resource.kind.into();
        if let Some(namespace) = namespace {
            object["metadata"]["namespace"] = namespace.into();
        }
        let name = object["metadata"]["name"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        if self
            .registry
            .get_stored(resource, namespace, &name)
            .await
            .is_ok()
        {
            return Ok(());
        }
        defaults::set_defaults(resource, &mut object);
        let (api_version, time) = (resource.api_version(), now());
        let track = ApplyOptions {
            manager: "kube-apiserver",
            force: false,
            api_version: &api_version,
            subresource: "",
            now: &time,
        };
        shape::complete(&mut object, resource.type_id);
        apply::track_update(None, &mut object, resource.type_id, &track);
        let extra = if plural == "services" {
            self.allocator
                .assign(self.registry.store.as_ref(), None, &mut object, false)
                .await?;
            Allocator::claims(None, &object)
        } else {
            Txn::default()
        };
        self.registry
            .create(resource, object, Part::Raw, extra, false)
            .await
            .map(drop)
    }

    async fn refresh(
        &self,
        group: &str,
        plural: &str,
        wanted: &Value,
        fields: &[&str],
    ) -> Result<(), ApiError> {
        let Some(resource) = table::resource(group, "v1", plural) else {
            return Ok(());
        };
        let change = |old: &Value| {
            let mut new = old.clone();
            for field in fields {
                new[*field] = wanted[*field].clone();
            }
            Ok(new)
        };
        self.registry
            .update(
                resource,
                Some("default"),
                "kubernetes",
                Part::Raw,
                false,
                None,
                change,
            )
            .await
            .map(drop)
    }
}
