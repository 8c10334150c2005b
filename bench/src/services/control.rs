//! The part that is the API: a real API server with its store, and the writes of the benchmark, made in its process.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use base64::Engine;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use xebec_apiserver::{ApiServer, UserInfo};

use super::list::{self, NAMESPACE, Objects};
use super::part;
use super::stage::NodeAddresses;

/// Writes at the same time.
const WRITERS: usize = 64;

#[derive(clap::Args)]
pub struct Args {
    /// Where the store lies, and where the agent's kubeconfig is written
    #[arg(long)]
    dir: PathBuf,
    /// Where to listen
    #[arg(long)]
    listen: SocketAddr,
}

/// What to write.
#[derive(Serialize, Deserialize)]
pub enum Order {
    /// The nodes and the pod.
    Rig { nodes: Vec<(String, NodeAddresses)> },
    /// So many Services with so many endpoints each, and the two that the benchmark adds.
    Load {
        count: usize,
        endpoints: usize,
        outside: std::ops::RangeInclusive<u8>,
    },
    /// The one backend of the Service that moves.
    Point { backend: u8 },
    /// A Service that comes or goes, with the backends that there are.
    Extra { name: String, present: bool },
    /// Namespaces, ServiceAccounts, Pods with their status, NetworkPolicies: written anew, what others need first.
    Make { objects: Vec<Value> },
    /// A NetworkPolicy that is there becomes this.
    Policy { object: Value },
}

/// When a write was asked for and when it was durable, on [`part::now`]'s clock.
#[derive(Serialize, Deserialize)]
pub struct Written {
    /// Before it was sent.
    pub asked: u64,
    /// After it was answered.
    pub done: u64,
}

/// Serves, writes the agent's kubeconfig to `agent.kubeconfig`, and obeys.
pub fn run(args: Args) -> Result<()> {
    let runtime = part::runtime()?;
    let shutdown = CancellationToken::new();
    let server = runtime.block_on(serve(&args, shutdown.clone()))?;
    let admin = UserInfo::new("kubernetes-admin", &["system:masters"]);
    // `Client::new` wants to be within a runtime.
    let client = {
        let _inside = runtime.enter();
        kube::Client::new(server.in_process(admin), NAMESPACE)
    };
    part::say(&json!({"serving": true}))?;
    part::obey(|order| runtime.block_on(obey(&client, order)))?;
    shutdown.cancel();
    Ok(())
}

async fn obey(client: &kube::Client, order: Order) -> Result<Value> {
    match order {
        Order::Rig { nodes } => {
            rig(client, &nodes).await?;
            Ok(json!(nodes.len()))
        }
        Order::Load {
            count,
            endpoints,
            outside,
        } => {
            let listed = list::services(count, endpoints)?;
            let extra = [list::outside(outside), list::moving()];
            let all = listed.len() + extra.len();
            let pairs = listed.iter().map(list::pair).chain(extra);
            futures::stream::iter(pairs.map(|pair| create_all(client, pair)))
                .buffer_unordered(WRITERS)
                .try_collect::<Vec<()>>()
                .await?;
            Ok(json!(all))
        }
        Order::Point { backend } => {
            let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), NAMESPACE);
            let endpoints = json!({"endpoints": [list::endpoint(list::backend(backend).into())]});
            let asked = part::now()?;
            slices
                .patch(
                    "moving-1",
                    &PatchParams::default(),
                    &Patch::Merge(&endpoints),
                )
                .await
                .context("could not change the backend")?;
            Ok(json!(Written {
                asked,
                done: part::now()?
            }))
        }
        Order::Extra { name, present } => {
            let mut listed = list::services(1, list::BACKENDS.count())?;
            let mut one = listed.remove(0);
            one.name = name;
            one.cluster_ip = list::EXTRA;
            let asked = part::now()?;
            if present {
                create_all(client, list::pair(&one)).await?;
            } else {
                let services: Api<Service> = Api::namespaced(client.clone(), NAMESPACE);
                let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), NAMESPACE);
                services.delete(&one.name, &DeleteParams::default()).await?;
                slices
                    .delete(&format!("{}-1", one.name), &DeleteParams::default())
                    .await?;
            }
            Ok(json!(Written {
                asked,
                done: part::now()?
            }))
        }
        Order::Make { objects } => {
            let all = objects.len();
            // Pods want the account of their namespace to be there.
            let turn = |object: &Value| match object["kind"].as_str() {
                Some("Namespace") => 0,
                Some("ServiceAccount") => 1,
                _ => 2,
            };
            let mut turns = [const { Vec::new() }; 3];
            for object in objects {
                turns[turn(&object)].push(object);
            }
            for objects in turns {
                futures::stream::iter(objects.into_iter().map(|object| make(client, object)))
                    .buffer_unordered(WRITERS)
                    .try_collect::<Vec<()>>()
                    .await?;
            }
            Ok(json!(all))
        }
        Order::Policy { object } => {
            let word = |field: &str| object["metadata"][field].as_str().unwrap_or_default();
            let (namespace, name) = (word("namespace"), word("name"));
            let policies: Api<NetworkPolicy> = Api::namespaced(client.clone(), namespace);
            let patch = json!({"spec": object["spec"]});
            let asked = part::now()?;
            policies
                .patch(name, &PatchParams::default(), &Patch::Merge(&patch))
                .await
                .with_context(|| format!("could not change the policy {name}"))?;
            Ok(json!(Written {
                asked,
                done: part::now()?
            }))
        }
    }
}

/// Creates an object of a kind that policies are about.
async fn make(client: &kube::Client, object: Value) -> Result<()> {
    let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default();
    let namespace = namespace.to_owned();
    match object["kind"].as_str() {
        Some("Namespace") => create(&Api::<Namespace>::all(client.clone()), object).await,
        Some("ServiceAccount") => {
            let all = Api::<ServiceAccount>::namespaced(client.clone(), &namespace);
            create(&all, object).await
        }
        Some("NetworkPolicy") => {
            let all = Api::<NetworkPolicy>::namespaced(client.clone(), &namespace);
            create(&all, object).await
        }
        Some("Pod") => {
            let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            let (name, status) = (name.to_owned(), object["status"].clone());
            create(&pods, object).await?;
            if !status.is_null() {
                let status = json!({"status": status});
                pods.patch_status(&name, &PatchParams::default(), &Patch::Merge(&status))
                    .await
                    .with_context(|| format!("could not give the pod {name} its status"))?;
            }
            Ok(())
        }
        kind => bail!("the benchmark makes no objects of the kind {kind:?}"),
    }
}

async fn create_all(client: &kube::Client, objects: Objects) -> Result<()> {
    let services: Api<Service> = Api::namespaced(client.clone(), NAMESPACE);
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), NAMESPACE);
    for slice in objects.slices {
        create(&slices, slice).await?;
    }
    create(&services, objects.service).await
}

async fn create<K>(api: &Api<K>, object: Value) -> Result<()>
where
    K: Clone + std::fmt::Debug + Serialize + DeserializeOwned,
{
    let name = object["metadata"]["name"].to_string();
    let object = serde_json::from_value(object).with_context(|| format!("{name} is malformed"))?;
    api.create(&PostParams::default(), &object)
        .await
        .with_context(|| format!("could not create {name}"))
        .map(drop)
}

/// Two nodes and the pod that asks.
async fn rig(client: &kube::Client, nodes: &[(String, NodeAddresses)]) -> Result<()> {
    let all: Api<Node> = Api::all(client.clone());
    for (name, node) in nodes {
        let object = json!({
            "metadata": {"name": name},
            "spec": {"podCIDR": node.ranges[0], "podCIDRs": node.ranges},
        });
        create(&all, object).await?;
        let addresses = node.ips.iter();
        let addresses = addresses.map(|ip| json!({"type": "InternalIP", "address": ip}));
        let status = json!({"status": {
            "addresses": addresses.collect::<Vec<_>>(),
            "conditions": [{"type": "Ready", "status": "True"}],
        }});
        all.patch_status(name, &PatchParams::default(), &Patch::Merge(&status))
            .await
            .with_context(|| format!("could not give {name} its address"))?;
    }
    let namespaces: Api<Namespace> = Api::all(client.clone());
    create(&namespaces, json!({"metadata": {"name": NAMESPACE}})).await?;
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), NAMESPACE);
    create(&accounts, json!({"metadata": {"name": "default"}})).await?;
    let pods: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    let pod = json!({
        "metadata": {"name": super::agent::POD},
        "spec": {
            "automountServiceAccountToken": false,
            "nodeName": super::agent::NODE,
            "containers": [{"name": "client", "image": "client"}],
        },
    });
    create(&pods, pod).await
}

async fn serve(args: &Args, shutdown: CancellationToken) -> Result<Arc<ApiServer>> {
    let pki = Pki::new()?;
    let address = args.listen.ip();
    let (certificate, key) = pki.leaf("kube-apiserver", &[], Some(address))?;
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from(pki.authority.clone()))
        .context("the authority can't be trusted")?;
    let verifier = rustls::server::WebPkiClientVerifier::builder(Arc::new(roots))
        .allow_unauthenticated()
        .build()
        .context("could not build the client verifier")?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let mut tls = rustls::ServerConfig::builder()
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![certificate.der().clone()], key)
        .context("the server certificate and its key do not fit")?;
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let store = args.dir.join("store");
    let store = xebec_store::Embedded::open(&store, xebec_store::Options::default())
        .with_context(|| format!("could not open the store in {}", store.display()))?;
    let config = xebec_apiserver::Config {
        listen: vec![args.listen],
        tls: Arc::new(tls),
        service_cidrs: ["10.96.0.0/12", "fd00:96::/108"]
            .into_iter()
            .map(|range| range.parse().context("no range"))
            .collect::<Result<_>>()?,
        service_account_key_pem: KeyPair::generate()
            .context("could not make a key")?
            .serialize_pem(),
        advertise_address: address,
        secure_port: args.listen.port(),
        ..Default::default()
    };
    let server = ApiServer::start(config, store, shutdown)
        .await
        .context("could not start the API server")?;
    let path = args.dir.join(super::agent::KUBECONFIG);
    std::fs::write(&path, pki.kubeconfig(args.listen)?)
        .with_context(|| format!("could not write {}", path.display()))?;
    Ok(server)
}

/// An authority that lives as long as the part.
struct Pki {
    authority: Vec<u8>,
    authority_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Pki {
    fn new() -> Result<Self> {
        let key = KeyPair::generate().context("could not make a key")?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(DnType::CommonName, "xebec-bench");
        let certificate = params
            .self_signed(&key)
            .context("could not sign the authority")?;
        Ok(Self {
            authority: certificate.der().to_vec(),
            authority_pem: certificate.pem(),
            issuer: Issuer::new(params, key),
        })
    }

    /// A server's certificate where it has an address, else a client's.
    fn leaf(
        &self,
        name: &str,
        groups: &[&str],
        address: Option<IpAddr>,
    ) -> Result<(rcgen::Certificate, KeyPair)> {
        let key = KeyPair::generate().context("could not make a key")?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name.push(DnType::CommonName, name);
        for group in groups {
            params
                .distinguished_name
                .push(DnType::OrganizationName, *group);
        }
        params.extended_key_usages = vec![match address {
            Some(_) => ExtendedKeyUsagePurpose::ServerAuth,
            None => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        params
            .subject_alt_names
            .extend(address.map(SanType::IpAddress));
        let certificate = params
            .signed_by(&key, &self.issuer)
            .context("could not sign a certificate")?;
        Ok((certificate, key))
    }

    /// How the agent reaches the API, with its own identity.
    fn kubeconfig(&self, server: SocketAddr) -> Result<String> {
        let (user, groups) = super::agent::USER;
        let (certificate, key) = self.leaf(user, groups, None)?;
        let text = |pem: String| base64::engine::general_purpose::STANDARD.encode(pem);
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "bench",
            "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "agent"}}],
            "clusters": [{"name": "bench", "cluster": {
                "server": format!("https://{server}"),
                "certificate-authority-data": text(self.authority_pem.clone()),
            }}],
            "users": [{"name": "agent", "user": {
                "client-certificate-data": text(certificate.pem()),
                "client-key-data": text(key.serialize_pem()),
            }}],
        });
        // JSON is YAML.
        Ok(config.to_string())
    }
}
