//! The engine over a plain kernel: long random histories of the API, judged by the plain reading of the objects.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use anyhow::ensure;
use ipnet::IpNet;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use xebec_dataplane_common::policy::{
    IDENTITY_WORLD, NO_SHAPE, SHAPE_CLASS, SHAPE_IDENTITY, SHAPE_PORT, SHAPE_PROTOCOL, Set,
    port_bits,
};

use super::*;
use crate::policy::naive::{self, NAMESPACES, Other, PORTS, PROTOCOLS, World, allowing, number_of};

/// The kernel's maps, and its way to look them up.
#[derive(Default)]
struct Plain {
    endpoints: HashMap<IpAddr, Endpoint>,
    identities: HashMap<IpAddr, u32>,
    rules: HashMap<RuleKey, u32>,
    cidrs: BTreeMap<(u32, IpNet), u32>,
    sets: HashMap<u32, Set>,
    generation: u32,
    /// How many rules fit.
    room: usize,
}

#[derive(Clone, Default)]
struct Kernel(Arc<Mutex<Plain>>);

impl Kernel {
    fn with<T>(&self, look: impl FnOnce(&mut Plain) -> T) -> T {
        look(&mut self.0.lock().unwrap())
    }
}

impl PolicyKernel for Kernel {
    fn set_endpoint(&mut self, address: IpAddr, endpoint: Endpoint) -> Result<()> {
        self.with(|plain| {
            for set in [endpoint.ingress_set, endpoint.egress_set] {
                assert!(
                    set == 0 || plain.sets.contains_key(&set),
                    "set {set} is not in force"
                );
            }
            plain.endpoints.insert(address, endpoint);
        });
        Ok(())
    }

    fn remove_endpoint(&mut self, address: IpAddr) -> Result<()> {
        self.with(|plain| plain.endpoints.remove(&address));
        Ok(())
    }

    fn set_identity(&mut self, address: IpAddr, identity: u32) -> Result<()> {
        self.with(|plain| plain.identities.insert(address, identity));
        Ok(())
    }

    fn remove_identity(&mut self, address: IpAddr) -> Result<()> {
        self.with(|plain| plain.identities.remove(&address));
        Ok(())
    }

    fn set_rule(&mut self, key: RuleKey, rule: u32) -> Result<()> {
        self.with(|plain| {
            assert!(
                !plain.sets.contains_key(&key.set),
                "a set in force is not changed"
            );
            ensure!(
                plain.room == 0 || plain.rules.len() < plain.room,
                "the map of rules is full"
            );
            plain.rules.insert(key, rule);
            Ok(())
        })
    }

    fn remove_rule(&mut self, key: RuleKey) -> Result<()> {
        self.with(|plain| {
            assert!(
                !plain.sets.contains_key(&key.set),
                "a set in force is not changed"
            );
            plain.rules.remove(&key);
        });
        Ok(())
    }

    fn set_cidr(&mut self, set: u32, block: IpNet, class: u32) -> Result<()> {
        self.with(|plain| plain.cidrs.insert((set, block), class));
        Ok(())
    }

    fn remove_cidr(&mut self, set: u32, block: IpNet) -> Result<()> {
        self.with(|plain| plain.cidrs.remove(&(set, block)));
        Ok(())
    }

    fn set_set(&mut self, set: u32, value: Set) -> Result<()> {
        self.with(|plain| plain.sets.insert(set, value));
        Ok(())
    }

    fn remove_set(&mut self, set: u32) -> Result<()> {
        self.with(|plain| {
            let used = plain
                .endpoints
                .values()
                .any(|one| one.ingress_set == set || one.egress_set == set);
            assert!(!used, "set {set} is still used");
            plain.sets.remove(&set);
        });
        Ok(())
    }

    fn set_generation(&mut self, generation: u32) -> Result<()> {
        self.with(|plain| plain.generation = generation);
        Ok(())
    }
}

impl Plain {
    /// As `judge` of the tc programs.
    fn judge(&self, number: u32, peer: IpAddr, protocol: u8, port: u16) -> u32 {
        let Some(set) = self.sets.get(&number) else {
            return 0;
        };
        let identity = self
            .identities
            .get(&peer)
            .copied()
            .unwrap_or(IDENTITY_WORLD);
        let class = self
            .cidrs
            .iter()
            .filter(|((of, block), _)| *of == number && block.contains(&peer))
            .max_by_key(|((_, block), _)| block.prefix_len())
            .map_or(0, |(_, class)| *class);
        for shape in set.shapes.into_iter().take_while(|one| *one != NO_SHAPE) {
            let peer = match shape & (SHAPE_IDENTITY | SHAPE_CLASS) {
                SHAPE_IDENTITY => identity,
                SHAPE_CLASS if class == 0 => continue,
                SHAPE_CLASS => class,
                _ => 0,
            };
            let key = RuleKey {
                set: number,
                peer,
                port: port_bits(port.to_be(), shape & SHAPE_PORT),
                protocol: if shape & SHAPE_PROTOCOL == 0 {
                    0
                } else {
                    protocol
                },
                shape,
            };
            if let Some(rule) = self.rules.get(&key) {
                return *rule;
            }
        }
        0
    }
}

/// The cluster that the engine is told of, one change after the other.
struct History {
    random: StdRng,
    kernel: Kernel,
    names: Names,
    engine: Engine<Kernel>,
    world: World,
    pods: BTreeMap<Name, (IpAddr, Pod)>,
    connected: BTreeSet<Name>,
    next_address: u32,
}

impl History {
    fn new(seed: u64) -> Self {
        let (kernel, names) = (Kernel::default(), Names::default());
        let mut history = Self {
            random: StdRng::seed_from_u64(seed),
            engine: Engine::new(kernel.clone(), names.clone(), "here", 7),
            kernel,
            names,
            world: World::default(),
            pods: BTreeMap::new(),
            connected: BTreeSet::new(),
            next_address: 0,
        };
        for name in NAMESPACES {
            history.label_namespace(name);
        }
        history
    }

    fn label_namespace(&mut self, name: &str) {
        let labels = naive::labels(&mut self.random);
        self.engine.set_namespace(name, Some(labels.clone()));
        self.world.namespaces.insert(name.to_owned(), labels);
    }

    fn pick(&mut self, from: Vec<Name>) -> Option<Name> {
        let at = self.random.random_range(0..from.len().max(1));
        from.into_iter().nth(at)
    }

    fn namespace(&mut self) -> &'static str {
        NAMESPACES[self.random.random_range(0..NAMESPACES.len())]
    }

    fn put_pod(&mut self, name: Name, address: IpAddr) {
        let ports: Vec<Value> = naive::named_ports(&mut self.random)
            .into_iter()
            .map(|(name, protocol, port)| {
                let protocol = PROTOCOLS.into_iter().find(|one| number_of(one) == protocol);
                json!({"name": name, "containerPort": port, "protocol": protocol})
            })
            .collect();
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"namespace": name.0, "name": name.1, "labels": naive::labels(&mut self.random)},
            "spec": {"containers": [{"name": "c", "ports": ports}]},
            "status": {"podIPs": [{"ip": address}]},
        }))
        .unwrap();
        self.engine.set_pod(&pod).unwrap();
        self.pods.insert(name, (address, pod));
    }

    fn step(&mut self) {
        match self.random.random_range(0..10) {
            0..=2 => {
                self.next_address += 1;
                let name = (
                    self.namespace().to_owned(),
                    format!("pod{}", self.next_address),
                );
                // Some inside the address blocks of policies.
                let base = if self.random.random_bool(0.5) {
                    0x0a01_0200
                } else {
                    0x0a63_0000
                };
                self.put_pod(
                    name,
                    std::net::Ipv4Addr::from(base + self.next_address).into(),
                );
            }
            3 => {
                if let Some(name) = self.pick(self.pods.keys().cloned().collect()) {
                    let address = self.pods[&name].0;
                    self.put_pod(name, address);
                }
            }
            4 => {
                if let Some(name) = self.pick(self.pods.keys().cloned().collect()) {
                    let (address, _) = self.pods.remove(&name).unwrap();
                    // The API forgets a pod before or after its device is gone.
                    if self.random.random_bool(0.5) {
                        self.engine.remove_pod(&name).unwrap();
                        self.engine.disconnect(address).unwrap();
                    } else {
                        self.engine.disconnect(address).unwrap();
                        self.engine.remove_pod(&name).unwrap();
                    }
                    self.connected.remove(&name);
                }
            }
            5..=6 => {
                let free = self
                    .pods
                    .keys()
                    .filter(|name| !self.connected.contains(*name));
                if let Some(name) = self.pick(free.cloned().collect()) {
                    let address = self.pods[&name].0;
                    self.engine.connect(&name, address, 5, [2; 6]).unwrap();
                    self.connected.insert(name);
                }
            }
            7 => {
                let name = self.namespace();
                self.label_namespace(name);
            }
            8 => {
                let name = (
                    self.namespace().to_owned(),
                    format!("p{}", self.random.random_range(0..3)),
                );
                let spec = naive::policy(&mut self.random);
                self.engine.set_policy(&name, Some(spec.clone()));
                self.world.policies.insert(name, spec);
            }
            _ => {
                if let Some(name) = self.pick(self.world.policies.keys().cloned().collect()) {
                    self.engine.set_policy(&name, None);
                    self.world.policies.remove(&name);
                }
            }
        }
    }

    /// Every connected pod against every pod and some others, on a few ports.
    fn check(&mut self, note: &str) -> (u64, u64) {
        let kinds: BTreeMap<Name, Kind> = self
            .pods
            .iter()
            .map(|(name, (_, pod))| (name.clone(), view(pod).kind))
            .collect();
        let (mut asked, mut allowed) = (0, 0);
        for name in &self.connected {
            let endpoint = self
                .kernel
                .with(|plain| plain.endpoints[&self.pods[name].0]);
            for (direction, set) in [
                (Direction::Ingress, endpoint.ingress_set),
                (Direction::Egress, endpoint.egress_set),
            ] {
                let pods = self.pods.iter().map(|(name, (address, _))| Other {
                    kind: Some(&kinds[name]),
                    address: *address,
                });
                let world =
                    [IpAddr::from([11, 0, 0, 0]), IpAddr::from([10, 1, 2, 200])].map(|address| {
                        Other {
                            kind: None,
                            address,
                        }
                    });
                for other in pods.chain(world) {
                    let port = PORTS[self.random.random_range(0..PORTS.len())];
                    let protocol = PROTOCOLS[self.random.random_range(0..PROTOCOLS.len())];
                    let expected =
                        allowing(&self.world, &kinds[name], direction, other, protocol, port);
                    let rule = self
                        .kernel
                        .with(|plain| plain.judge(set, other.address, number_of(protocol), port));
                    asked += 1;
                    allowed += u64::from(rule != 0);
                    let sound = match &expected {
                        None => set == 0,
                        Some(rules) if rules.is_empty() => set != 0 && rule == 0,
                        Some(rules) => self
                            .names
                            .now()
                            .rule(rule)
                            .is_some_and(|rule| rules.contains(rule)),
                    };
                    assert!(
                        sound,
                        "{note}: {direction:?} of {name:?}, other {}, {protocol}/{port}: expected {expected:?}, set {set}, rule {rule}",
                        other.address
                    );
                }
            }
        }
        (asked, allowed)
    }
}

#[test]
fn the_kernel_holds_what_the_objects_say_after_every_change() {
    let (mut asked, mut allowed) = (0, 0);
    for seed in 0..6 {
        let mut history = History::new(seed);
        for step in 0..150 {
            history.step();
            history.engine.refresh().unwrap();
            let (more, let_in) = history.check(&format!("seed {seed}, step {step}"));
            asked += more;
            allowed += let_in;
        }
        // When all is gone, so is everything in the kernel.
        let names: Vec<Name> = history.pods.keys().cloned().collect();
        for name in names {
            history.engine.remove_pod(&name).unwrap();
            history.engine.disconnect(history.pods[&name].0).unwrap();
        }
        history.kernel.with(|plain| {
            assert!(plain.endpoints.is_empty() && plain.identities.is_empty());
            assert!(plain.rules.is_empty() && plain.cidrs.is_empty() && plain.sets.is_empty());
        });
        let policies: Vec<Name> = history.world.policies.keys().cloned().collect();
        for name in policies {
            history.engine.set_policy(&name, None);
        }
        history.engine.refresh().unwrap();
        assert!(history.engine.rules.is_empty());
    }
    assert!(asked > 20_000 && allowed > 5_000, "{allowed} of {asked}");
}

fn one_pod() -> History {
    let mut history = History::new(1);
    let name = ("x".to_owned(), "one".to_owned());
    history.put_pod(name.clone(), IpAddr::from([10, 99, 0, 1]));
    history
        .engine
        .connect(&name, IpAddr::from([10, 99, 0, 1]), 5, [2; 6])
        .unwrap();
    history.connected.insert(name);
    history
}

fn ports(count: u16) -> NetworkPolicySpec {
    let ports: Vec<Value> = (0..count).map(|n| json!({"port": 1000 + 2 * n})).collect();
    serde_json::from_value(json!({"podSelector": {}, "ingress": [{"ports": ports}]})).unwrap()
}

#[test]
fn what_does_not_fit_leaves_the_rules_before_it_in_force() {
    let mut history = one_pod();
    history.kernel.with(|plain| plain.room = 100);
    let name = ("x".to_owned(), "p".to_owned());
    history.engine.set_policy(&name, Some(ports(10)));
    history.engine.refresh().unwrap();
    let before = history
        .kernel
        .with(|plain| (plain.endpoints.clone(), plain.rules.clone()));
    history.engine.set_policy(&name, Some(ports(1000)));
    let error = format!("{:#}", history.engine.refresh().unwrap_err());
    assert!(
        error.contains("1000 rules of NetworkPolicy x/p") && error.contains("full"),
        "{error}"
    );
    let after = history
        .kernel
        .with(|plain| (plain.endpoints.clone(), plain.rules.clone()));
    assert_eq!(before, after);
    // It is tried again without any further change.
    history.kernel.with(|plain| plain.room = 0);
    history.engine.refresh().unwrap();
    assert_eq!(history.kernel.with(|plain| plain.rules.len()), 1000);
}

#[test]
fn a_policy_that_makes_no_sense_is_shown_and_does_not_hinder_other_pods() {
    let mut history = one_pod();
    let spec = json!({"podSelector": {"matchLabels": {"bad": "yes"}}, "ingress": [{"ports": [{"port": 80, "endPort": 70}]}]});
    let name = ("x".to_owned(), "p".to_owned());
    history
        .engine
        .set_policy(&name, Some(serde_json::from_value(spec).unwrap()));
    let pod = |name: &str, bad: bool, address: &str| -> Pod {
        let labels = if bad {
            json!({"bad": "yes"})
        } else {
            json!({})
        };
        serde_json::from_value(json!({
            "metadata": {"namespace": "x", "name": name, "labels": labels},
            "spec": {"containers": []}, "status": {"podIPs": [{"ip": address}]},
        }))
        .unwrap()
    };
    for (pod_name, bad, address) in [("bad", true, "10.99.0.2"), ("good", false, "10.99.0.3")] {
        history
            .engine
            .set_pod(&pod(pod_name, bad, address))
            .unwrap();
        let key = ("x".to_owned(), pod_name.to_owned());
        let outcome = history
            .engine
            .connect(&key, address.parse().unwrap(), 6, [3; 6]);
        assert_eq!(outcome.is_err(), bad, "{outcome:?}");
    }
    let known = history.kernel.with(|plain| plain.endpoints.len());
    assert_eq!(
        known, 2,
        "a pod whose policy is not in force can send nothing"
    );
    let rows = history.engine.policy_rows();
    assert_eq!(rows[0]["state"], "endPort 70 is below port 80");
}

#[test]
fn alike_pods_share_one_set_and_unlike_ones_with_the_same_hash_have_identities_of_their_own() {
    let mut history = one_pod();
    let name = ("x".to_owned(), "p".to_owned());
    history.engine.set_policy(&name, Some(ports(3)));
    for number in 2..40_u8 {
        let (_, mut pod) = history.pods[&("x".to_owned(), "one".to_owned())].clone();
        pod.metadata.name = Some(format!("pod{number}"));
        let address = IpAddr::from([10, 99, 0, number]);
        pod.status = serde_json::from_value(json!({"podIPs": [{"ip": address}]})).unwrap();
        history.engine.set_pod(&pod).unwrap();
        let name = ("x".to_owned(), format!("pod{number}"));
        history.engine.connect(&name, address, 5, [2; 6]).unwrap();
    }
    history.engine.refresh().unwrap();
    assert_eq!(
        history
            .kernel
            .with(|plain| (plain.sets.len(), plain.rules.len())),
        (1, 3)
    );
    let mut kind = Kind {
        namespace: "x".into(),
        labels: Labels::new(),
        ports: BTreeSet::new(),
    };
    let first = hash(&kind).max(FIRST_POD_IDENTITY);
    kind.namespace = "forced".into();
    // The number that this kind would get is taken.
    let wanted = hash(&kind).max(FIRST_POD_IDENTITY);
    assert_ne!(first, wanted);
    let other = Kind {
        namespace: "other".into(),
        ..kind.clone()
    };
    history.engine.identities.insert(other, wanted);
    history.engine.count(&kind);
    assert_eq!(history.engine.identities[&kind], wanted + 1);
}
