//! Load balancers: gives Services of that type addresses from the cluster's pools and says so in their status.

mod pool;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context;
use k8s_openapi::api::core::v1::{LoadBalancerIngress, Service};
use kube::ResourceExt;
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::events::EventType;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::Config;
use crate::cluster::{Cluster, Teller, is_code};
use crate::informer::Key;
use crate::queue::{Again, Queue};

pub use pool::AddressRange;
use pool::{Pools, Refusal};

/// The class of Services that ask for these addresses by name; those without a class are served, too.
pub const CLASS: &str = "xebec.io/l2";
/// Addresses that a Service wants, separated by commas.
pub const WANTED: &str = "xebec.io/load-balancer-ips";

/// Registers with the watches and gives the loop.
pub(crate) fn start(
    cluster: &Arc<Cluster>,
    config: &Config,
    shutdown: CancellationToken,
) -> impl Future<Output = anyhow::Result<()>> + Send + 'static {
    let queue = Queue::new();
    let ranges = config.load_balancer_ranges.clone();
    // Without a pool, others may be the ones who give addresses.
    if !ranges.is_empty() {
        let wake = queue.clone();
        cluster.services.on_change(move |old, new| {
            if [old, new].into_iter().flatten().any(|one| is_ours(one))
                && let Some(service) = new.or(old)
            {
                wake.add(Key::of(service.as_ref()));
            }
        });
    }
    let controller = Arc::new(Controller {
        cluster: cluster.clone(),
        teller: Teller::new(cluster.client.clone(), "load-balancer-controller"),
        queue: queue.clone(),
        state: Mutex::new(State {
            pools: Pools::new(ranges.clone()),
            waiting: HashMap::new(),
        }),
    });
    async move {
        if ranges.is_empty() {
            shutdown.cancelled().await;
            return Ok(());
        }
        controller.cluster.services.synced().await;
        controller.remember();
        queue
            .run("load balancer", 5, shutdown, |key| {
                let controller = controller.clone();
                async move { controller.reconcile(&key).await }
            })
            .await;
        Ok(())
    }
}

/// Whether it is for this controller to give it addresses.
fn is_ours(service: &Service) -> bool {
    service.spec.as_ref().is_some_and(|spec| {
        spec.type_.as_deref() == Some("LoadBalancer")
            && spec
                .load_balancer_class
                .as_deref()
                .is_none_or(|class| class == CLASS)
    })
}

/// The addresses that its status tells.
fn told(service: &Service) -> Vec<IpAddr> {
    let ingress = ingress(service).iter();
    ingress
        .filter_map(|one| one.ip.as_deref()?.parse().ok())
        .collect()
}

fn ingress(service: &Service) -> &[LoadBalancerIngress] {
    let status = service.status.as_ref();
    let balancer = status.and_then(|status| status.load_balancer.as_ref());
    let ingress = balancer.and_then(|balancer| balancer.ingress.as_deref());
    ingress.unwrap_or_default()
}

/// What it asks for; the field is the older way, for one address.
fn wanted(service: &Service) -> Vec<String> {
    let annotation = service.annotations().get(WANTED).map(String::as_str);
    let field = service.spec.as_ref();
    let field = field.and_then(|spec| spec.load_balancer_ip.as_deref());
    let text = annotation.or(field).unwrap_or_default();
    text.split(',')
        .map(str::trim)
        .filter(|text| !text.is_empty())
        .map(str::to_owned)
        .collect()
}

/// What a Service is to have.
#[derive(Debug, PartialEq, Eq)]
struct Decision {
    addresses: Vec<IpAddr>,
    /// Why it is not all that it asks for.
    problem: Option<String>,
}

/// Takes from the pools what the Service is to have; it still holds what it had.
fn decide(pools: &mut Pools, key: &Key, service: &Service) -> Decision {
    let spec = service.spec.clone().unwrap_or_default();
    let families = spec.ip_families.unwrap_or_else(|| vec!["IPv4".into()]);
    let mut problems = Vec::new();
    let mut granted: Vec<IpAddr> = Vec::new();
    let mut asked: Vec<bool> = Vec::new();
    // Those that its status tells first: they are what clients use.
    let mut standing = told(service);
    standing.extend(pools.held(key));
    standing.retain(|ip| pools.held(key).contains(ip));
    for text in wanted(service) {
        let Ok(ip) = text.parse::<IpAddr>() else {
            problems.push(format!("{text:?} is no IP address"));
            continue;
        };
        let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
        if !families.iter().any(|known| known == family) {
            problems.push(format!("{ip} is {family}, which the Service has not"));
            continue;
        }
        asked.push(ip.is_ipv4());
        match pools.take(key, ip) {
            Ok(()) if granted.contains(&ip) => {}
            Ok(()) => granted.push(ip),
            Err(Refusal::Outside) => problems.push(format!("{ip} is in none of the pools")),
            Err(Refusal::Taken(owner)) => problems.push(format!("{ip} is already used by {owner}")),
        }
    }
    let prefers = spec.ip_family_policy.as_deref() == Some("PreferDualStack");
    let mut addresses = Vec::new();
    for (index, family) in families.iter().enumerate() {
        let v4 = family == "IPv4";
        let before = addresses.len();
        addresses.extend(granted.iter().filter(|ip| ip.is_ipv4() == v4));
        if addresses.len() > before {
            continue;
        }
        // Where the wish can't be met, what stands is better than nothing.
        if let Some(ip) = standing.iter().find(|ip| ip.is_ipv4() == v4) {
            addresses.push(*ip);
        } else if asked.contains(&v4) {
            // It wants none but that.
        } else if let Some(ip) = pools.take_any(key, v4) {
            addresses.push(ip);
        } else if pools.serves(v4) {
            problems.push(format!("no {family} address is free in the pools"));
        } else if !(prefers && index > 0) {
            problems.push(format!("there is no pool of {family} addresses"));
        }
    }
    let problem = (!problems.is_empty()).then(|| problems.join("; "));
    Decision { addresses, problem }
}

struct State {
    pools: Pools,
    /// Services that miss something, and what was told about it.
    waiting: HashMap<Key, String>,
}

struct Controller {
    cluster: Arc<Cluster>,
    teller: Teller,
    queue: Arc<Queue<Key>>,
    state: Mutex<State>,
}

impl Controller {
    /// What statuses tell stands, also after a restart; where two tell the same, the older Service has it.
    fn remember(&self) {
        let mut services = self.cluster.services.all();
        services.retain(|service| is_ours(service));
        services.sort_by_key(|one| (one.creation_timestamp().map(|t| t.0), Key::of(one.as_ref())));
        let mut state = self.lock();
        for service in services {
            let key = Key::of(service.as_ref());
            for ip in told(&service) {
                // One that is another's or from a pool that is gone is replaced when the Service is looked at.
                let _ = state.pools.take(&key, ip);
            }
        }
    }

    async fn reconcile(&self, key: &Key) -> anyhow::Result<Again> {
        let service = self.cluster.services.get(key).filter(|one| is_ours(one));
        let Some(service) = service else {
            // The status went with the type, or with the Service.
            self.keep(key, &[]);
            self.lock().waiting.remove(key);
            return Ok(None);
        };
        if service.metadata.deletion_timestamp.is_some() {
            // It serves until it is gone.
            return Ok(None);
        }
        let decision = decide(&mut self.lock().pools, key, &service);
        self.tell(key, &service, &decision);
        let ingress: Vec<LoadBalancerIngress> = decision
            .addresses
            .iter()
            .map(|ip| LoadBalancerIngress {
                ip: Some(ip.to_string()),
                ip_mode: Some("VIP".into()),
                ..LoadBalancerIngress::default()
            })
            .collect();
        if self::ingress(&service) != ingress {
            let api = Api::<Service>::namespaced(self.cluster.client.clone(), &key.namespace);
            let status = json!({"status": {"loadBalancer": {"ingress": ingress}}});
            let params = PatchParams::default();
            match api
                .patch_status(&key.name, &params, &Patch::Merge(status))
                .await
            {
                Ok(written) => self.cluster.services.note(written),
                // Its end, or another type, comes by the watch.
                Err(error) if is_code(&error, 404) => return Ok(None),
                Err(error) => return Err(error).context("could not write a Service's status"),
            }
            if !decision.addresses.is_empty() {
                let note = format!("Assigned IP {}", list(&decision.addresses));
                let kind = EventType::Normal;
                self.teller
                    .tell(service.as_ref(), kind, "IPAllocated", note);
            }
        }
        self.keep(key, &decision.addresses);
        Ok(None)
    }

    /// Tells what is missing, once.
    fn tell(&self, key: &Key, service: &Service, decision: &Decision) {
        let Some(problem) = &decision.problem else {
            self.lock().waiting.remove(key);
            return;
        };
        let before = self.lock().waiting.insert(key.clone(), problem.clone());
        if before.as_ref() != Some(problem) {
            let note = format!("Failed to allocate IP for \"{key}\": {problem}");
            self.teller
                .tell(service, EventType::Warning, "AllocationFailed", note);
        }
    }

    /// Takes back all but these, and has those that wait look again.
    fn keep(&self, key: &Key, addresses: &[IpAddr]) {
        let mut state = self.lock();
        if state.pools.take_back(key, addresses) {
            for waiting in state.waiting.keys() {
                self.queue.add(waiting.clone());
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn list(addresses: &[IpAddr]) -> String {
    let texts: Vec<String> = addresses
        .iter()
        .map(|ip| format!("{:?}", ip.to_string()))
        .collect();
    format!("[{}]", texts.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn pools(ranges: &[&str]) -> Pools {
        Pools::new(ranges.iter().map(|range| range.parse().unwrap()).collect())
    }

    fn service(more: Value) -> Service {
        let mut service = json!({"metadata": {"name": "web", "namespace": "shop", "annotations": {}},
            "spec": {"type": "LoadBalancer", "ipFamilies": ["IPv4"]}});
        for (part, fields) in more.as_object().into_iter().flatten() {
            for (field, value) in fields.as_object().into_iter().flatten() {
                service[part][field] = value.clone();
            }
        }
        serde_json::from_value(service).unwrap()
    }

    fn decided(pools: &mut Pools, name: &str, more: Value) -> (Vec<String>, String) {
        let decision = decide(pools, &Key::new("shop", name), &service(more));
        let addresses = decision.addresses.iter().map(ToString::to_string);
        (addresses.collect(), decision.problem.unwrap_or_default())
    }

    fn has(addresses: &[&str], problem: &str) -> (Vec<String>, String) {
        let addresses = addresses.iter().map(|ip| (*ip).to_owned());
        (addresses.collect(), problem.to_owned())
    }

    #[test]
    fn one_address_of_each_family() {
        let mut pools = pools(&["192.0.2.0/30", "fd00::5"]);
        let two =
            json!({"spec": {"ipFamilies": ["IPv6", "IPv4"], "ipFamilyPolicy": "RequireDualStack"}});
        assert_eq!(
            decided(&mut pools, "a", two.clone()),
            has(&["fd00::5", "192.0.2.1"], "")
        );
        assert_eq!(
            decided(&mut pools, "b", two),
            has(&["192.0.2.2"], "no IPv6 address is free in the pools")
        );
        assert_eq!(
            decided(&mut pools, "c", json!({})),
            has(&[], "no IPv4 address is free in the pools")
        );
    }

    #[test]
    fn a_family_without_pool_is_missed_only_where_it_is_needed() {
        let mut pools = pools(&["192.0.2.0/24"]);
        let two = |policy: &str| json!({"spec": {"ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": policy}});
        assert_eq!(
            decided(&mut pools, "a", two("PreferDualStack")),
            has(&["192.0.2.1"], "")
        );
        assert_eq!(
            decided(&mut pools, "b", two("RequireDualStack")),
            has(&["192.0.2.2"], "there is no pool of IPv6 addresses")
        );
    }

    #[test]
    fn wishes_are_met_or_refused_by_name() {
        let mut pools = pools(&["192.0.2.0/24", "fd00::/120"]);
        let wish = |ips: &str| json!({"metadata": {"annotations": {WANTED: ips}}});
        assert_eq!(
            decided(&mut pools, "a", wish("192.0.2.9, 192.0.2.8,192.0.2.9")),
            has(&["192.0.2.9", "192.0.2.8"], "")
        );
        assert_eq!(
            decided(
                &mut pools,
                "b",
                json!({"spec": {"loadBalancerIP": "192.0.2.9"}})
            ),
            has(&[], "192.0.2.9 is already used by shop/a")
        );
        for (ips, problem) in [
            ("192.0.3.1", "192.0.3.1 is in none of the pools"),
            ("192.0.2.255", "192.0.2.255 is in none of the pools"),
            ("fd00::1", "fd00::1 is IPv6, which the Service has not"),
            ("web", r#""web" is no IP address"#),
        ] {
            let (_, said) = decided(&mut pools, "c", wish(ips));
            assert_eq!(said, problem);
        }
        // One family is asked for, the other one is chosen.
        let mut both = wish("fd00::7");
        both["spec"] = json!({"ipFamilies": ["IPv4", "IPv6"]});
        let (found, said) = decided(&mut pools, "d", both);
        assert_eq!(
            (found[1].as_str(), found.len(), said.as_str()),
            ("fd00::7", 2, "")
        );
    }

    #[test]
    fn what_stands_stays() {
        let mut pools = pools(&["192.0.2.0/24"]);
        let key = Key::new("shop", "a");
        let stands = |ip: &str| json!({"status": {"loadBalancer": {"ingress": [{"ip": ip}]}}});
        pools.take(&key, "192.0.2.77".parse().unwrap()).unwrap();
        assert_eq!(
            decided(&mut pools, "a", stands("192.0.2.77")),
            has(&["192.0.2.77"], "")
        );
        // A wish that can't be met does not take away what there is; one that can be does.
        let mut wish = stands("192.0.2.77");
        wish["spec"] = json!({"loadBalancerIP": "198.51.100.1"});
        let said = "198.51.100.1 is in none of the pools";
        assert_eq!(
            decided(&mut pools, "a", wish.clone()),
            has(&["192.0.2.77"], said)
        );
        wish["spec"] = json!({"loadBalancerIP": "192.0.2.5"});
        assert_eq!(decided(&mut pools, "a", wish), has(&["192.0.2.5"], ""));
        // What its status tells but another has is no reason to share it.
        assert_eq!(
            decided(&mut pools, "b", stands("192.0.2.77")),
            has(&["192.0.2.1"], "")
        );
    }
}
