//! The control plane in this process: store, API server, scheduler, controllers.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, Result};
use ipnet::IpNet;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use xebec_apiserver::{ApiServer, UserInfo};

use crate::paths::Layout;
use crate::pki::{self, Authority};

/// What the control plane needs to know.
pub struct Config<'a> {
    /// Where its data lies.
    pub layout: &'a Layout,
    /// Who signs.
    pub authority: &'a Authority,
    /// Where the API server listens.
    pub listen: SocketAddr,
    /// The address that nodes and pods reach it by.
    pub advertise: IpAddr,
    /// The addresses that other machines reach it by.
    pub addresses: &'a [IpAddr],
    /// The ranges of Services, the primary one first.
    pub service_cidrs: &'a [IpNet],
    /// What load balancers get their addresses from.
    pub load_balancer_ranges: &'a [xebec_controllers::AddressRange],
}

/// The running control plane.
pub struct ControlPlane {
    server: Arc<ApiServer>,
    /// Ends scheduler and controllers before the API server that they speak to.
    clients: CancellationToken,
    api: CancellationToken,
    tasks: Mutex<JoinSet<Result<()>>>,
}

impl ControlPlane {
    /// Opens the store and starts everything; the API server serves when this returns.
    pub async fn start(config: Config<'_>) -> Result<Self> {
        let store =
            xebec_store::Embedded::open(&config.layout.store(), xebec_store::Options::default())
                .with_context(|| {
                    format!(
                        "could not open the store in {}",
                        config.layout.store().display()
                    )
                })?;
        let mut addresses = vec![config.advertise, IpAddr::from([127, 0, 0, 1])];
        addresses.extend(config.addresses);
        if config.listen.is_ipv6() {
            addresses.push(IpAddr::from(std::net::Ipv6Addr::LOCALHOST));
        }
        for range in config.service_cidrs {
            // The first address of a Service range is the API server's own Service.
            let service = range.hosts().find(|address| *address != range.network());
            addresses.push(service.context("the Service range is empty")?);
        }
        addresses.sort();
        addresses.dedup();
        let authority = config.authority;
        let leaf = authority.server(
            "kube-apiserver",
            &[
                "localhost",
                "kubernetes",
                "kubernetes.default",
                "kubernetes.default.svc",
                "kubernetes.default.svc.cluster.local",
            ],
            &addresses,
        )?;
        let kubelet_client =
            authority.client("kube-apiserver-kubelet-client", &["system:masters"])?;
        let (clients, api) = (CancellationToken::new(), CancellationToken::new());
        let server = ApiServer::start(
            xebec_apiserver::Config {
                listen: vec![config.listen],
                tls: pki::server_tls(&authority.ca_pem, &leaf, &[b"h2", b"http/1.1"])?,
                service_cidrs: config.service_cidrs.to_vec(),
                service_account_key_pem: authority.service_account_key.clone(),
                kubelet_client_tls: pki::client_tls(&authority.ca_pem, &kubelet_client)?,
                advertise_address: config.advertise,
                secure_port: config.listen.port(),
                ..Default::default()
            },
            store,
            api.clone(),
        )
        .await
        .context("could not start the API server")?;
        let control_plane = Self {
            server,
            clients: clients.clone(),
            api,
            tasks: Mutex::new(JoinSet::new()),
        };
        let mut tasks = control_plane.tasks.lock().await;
        let scheduler = control_plane.client("system:kube-scheduler", &[]);
        tasks.spawn(xebec_scheduler::run(
            scheduler,
            xebec_scheduler::Config::default(),
            clients.clone(),
        ));
        let controllers = control_plane.client("system:kube-controller-manager", &[]);
        let controllers_config = xebec_controllers::Config {
            service_account_ca: authority.ca_pem.clone(),
            load_balancer_ranges: config.load_balancer_ranges.to_vec(),
            ..Default::default()
        };
        tasks.spawn(xebec_controllers::run(
            controllers,
            controllers_config,
            clients,
        ));
        drop(tasks);
        Ok(control_plane)
    }

    /// A client with this identity whose calls are function calls into the API server.
    pub fn client(&self, user: &str, groups: &[&str]) -> kube::Client {
        let user = UserInfo::new(user, groups);
        kube::Client::new(self.server.in_process(user), "default")
    }

    /// A client with the administrator's identity.
    pub fn admin(&self) -> kube::Client {
        self.client("kubernetes-admin", &["system:masters"])
    }

    /// The error of the first part that ends by itself.
    pub async fn failed(&self) -> anyhow::Error {
        match self.tasks.lock().await.join_next().await {
            Some(Ok(Ok(()))) => anyhow::anyhow!("a part of the control plane ended by itself"),
            Some(Ok(Err(error))) => error.context("a part of the control plane failed"),
            Some(Err(error)) => anyhow::anyhow!("a part of the control plane panicked: {error}"),
            None => anyhow::anyhow!("the control plane has no parts"),
        }
    }

    /// Ends scheduler and controllers, then the API server.
    pub async fn stop(self) {
        self.clients.cancel();
        let mut tasks = self.tasks.into_inner();
        while tasks.join_next().await.is_some() {}
        self.api.cancel();
    }
}
