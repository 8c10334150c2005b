//! Tests of `deploy/`: that the chart renders, that the plain manifests are the chart's, that a strict API server takes
//! them, and that this executable takes their flags.

use std::path::{Path, PathBuf};

use clap::Parser;
use gtmpl::{Context, FuncError, Template, Value as Go};
use serde_json::{Value, json};
use xebec_schema::decode::{self, FieldValidation, Media};
use xebec_schema::{defaults, strategy, table, validate};

/// Set to write the plain manifests anew from the chart.
const WRITE: &str = "XEBEC_WRITE_MANIFESTS";

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn to_go(value: &Value) -> Go {
    match value {
        Value::Null => Go::Nil,
        Value::Bool(one) => Go::Bool(*one),
        Value::Number(one) => Go::from(one.as_i64().unwrap()),
        Value::String(one) => Go::String(one.clone()),
        Value::Array(all) => Go::Array(all.iter().map(to_go).collect()),
        Value::Object(all) => Go::Map(
            all.iter()
                .map(|(key, one)| (key.clone(), to_go(one)))
                .collect(),
        ),
    }
}

fn from_go(value: &Go) -> Value {
    match value {
        Go::Bool(one) => json!(one),
        Go::Number(one) => json!(one.as_i64()),
        Go::String(one) => json!(one),
        Go::Array(all) => all.iter().map(from_go).collect(),
        Go::Map(all) | Go::Object(all) => {
            let mut all: Vec<_> = all.iter().collect();
            all.sort_by_key(|(key, _)| (*key).clone());
            let pairs = all
                .into_iter()
                .map(|(key, one)| (key.clone(), from_go(one)));
            Value::Object(pairs.collect())
        }
        _ => Value::Null,
    }
}

/// What Helm adds to Go's functions, as far as the chart uses it.
fn functions(template: &mut Template) {
    fn text(arguments: &[Go], at: usize) -> Result<String, FuncError> {
        match arguments.get(at) {
            Some(Go::String(text)) => Ok(text.clone()),
            Some(other) => Ok(other.to_string()),
            None => Err(FuncError::AtLeastXArgs("a function".into(), at + 1)),
        }
    }
    template.add_func("toYaml", |arguments| {
        let value = arguments.first().map_or(Value::Null, from_go);
        let text = serde_yaml_ng::to_string(&value)
            .map_err(|error| FuncError::Generic(error.to_string()))?;
        Ok(text.trim_end().into())
    });
    template.add_func("nindent", |arguments| {
        let Some(Go::Number(width)) = arguments.first() else {
            return Err(FuncError::Generic("nindent takes a width".into()));
        };
        let indent = " ".repeat(width.as_i64().unwrap_or(0) as usize);
        let text = text(arguments, 1)?;
        let lines: Vec<String> = text
            .lines()
            .map(|line| format!("\n{indent}{line}"))
            .collect();
        Ok(lines.concat().into())
    });
    template.add_func("quote", |arguments| {
        Ok(format!("{:?}", text(arguments, 0)?).into())
    });
    template.add_func("default", |arguments| {
        let given = text(arguments, 1)?;
        let value = if given.is_empty() {
            text(arguments, 0)?
        } else {
            given
        };
        Ok(value.into())
    });
}

/// The chart's text with these values over its own.
fn render(name: &str, over: &Value) -> String {
    let chart = deploy().join("helm/xebec-agent");
    let mut values: Value = serde_yaml_ng::from_str(&read(&chart.join("values.yaml"))).unwrap();
    merge(&mut values, over);
    let about: Value = serde_yaml_ng::from_str(&read(&chart.join("Chart.yaml"))).unwrap();
    let mut template = Template::default();
    functions(&mut template);
    let text = read(&chart.join("templates").join(name));
    template
        .parse(text)
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    let context = to_go(&json!({
        "Values": values,
        "Release": {"Namespace": "kube-system", "Name": "xebec-agent"},
        "Chart": {"AppVersion": about["appVersion"]},
    }));
    template
        .render(&Context::from(context))
        .unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn merge(into: &mut Value, over: &Value) {
    match (into, over) {
        // An empty one takes any keys.
        (Value::Object(into), Value::Object(over)) if !into.is_empty() => {
            for (key, value) in over {
                let known = into
                    .get_mut(key)
                    .unwrap_or_else(|| panic!("no value {key}"));
                merge(known, value);
            }
        }
        (into, over) => *into = over.clone(),
    }
}

const TEMPLATES: [&str; 3] = ["serviceaccount.yaml", "rbac.yaml", "daemonset.yaml"];

fn rendered(over: &Value) -> String {
    TEMPLATES
        .map(|name| render(name, over).trim_end().to_owned())
        .join("\n---\n")
        + "\n"
}

fn documents(text: &str) -> Vec<Value> {
    let all = serde_yaml_ng::Deserializer::from_str(text);
    all.map(|one| serde::Deserialize::deserialize(one).unwrap())
        .collect()
}

/// What a strict API server says of an object; empty when it takes it.
fn refusals(object: &Value) -> Vec<String> {
    let (group_version, kind) = decode::gvk_of(object);
    let (group, version) = group_version
        .split_once('/')
        .unwrap_or(("", &group_version));
    let Some(ty) = table::type_of_kind(group, version, &kind) else {
        return vec![format!("{group_version} has no {kind}")];
    };
    let text = object.to_string();
    let mut decoded =
        match decode::decode(text.as_bytes(), Media::Json, ty, FieldValidation::Strict) {
            Ok(decoded) => decoded.object,
            Err(error) => return vec![error.to_string()],
        };
    let Some(resource) = table::resource_for_kind(group, version, &kind) else {
        return Vec::new();
    };
    strategy::prepare_for_create(resource, &mut decoded);
    defaults::set_defaults(resource, &mut decoded);
    let errors = validate::validate_create(resource, &decoded);
    let say = |error: &xebec_schema::field_error::FieldError| {
        format!("{}: {}", error.field, error.message)
    };
    errors.iter().map(say).collect()
}

/// All that may be set, set to something.
fn many_values() -> Value {
    json!({
        "image": {"repository": "images.example/xebec", "tag": "7", "pullSecrets": [{"name": "pull"}]},
        "k8sServiceHost": "192.0.2.10", "clusterCIDR": ["10.244.0.0/16", "fd00::/48"],
        "nodePortAddresses": ["primary", "192.0.2.0/24"], "devices": ["eth0"], "xdp": "off", "lbMode": "dsr", "dnsResolvers": ["192.0.2.53", "198.51.100.0/24"], "tofqdnsMinTTL": 60, "labels": "app !team", "hostLegacyRouting": true, "metricsBindAddress": "",
        "healthz": {"address": "[::]", "port": 10_300}, "bpf": {"autoMount": false, "monitorAggregation": "low"}, "cni": {"exclusive": false},
        "seLinuxOptions": {"type": "spc_t", "level": "s0"}, "podAnnotations": {"example.org/a": "b"},
        "ipMasq": {"enabled": true, "config": {"nonMasqueradeCIDRs": ["10.0.0.0/8"], "masqLinkLocal": true}},
        "hubble": {
            "enabled": false,
            "metrics": "drop flow:sourceContext=pod|ip", "eventBufferCapacity": 4_096, "listenAddress": ":4244",
            "tls": {"secretName": "hubble-tls", "disabled": false},
        },
    })
}

fn all_objects() -> Vec<Value> {
    let mut all = Vec::new();
    for over in [json!({}), many_values(), json!({"cleanup": true})] {
        all.extend(documents(&rendered(&over)));
    }
    all
}

#[test]
fn a_strict_api_server_takes_all_manifests() {
    let objects = all_objects();
    assert_eq!(objects.len(), 19);
    for object in objects {
        assert_eq!(refusals(&object), Vec::<String>::new(), "{object}");
    }
}

#[test]
fn a_fault_in_a_manifest_is_found() {
    let objects = documents(&rendered(&json!({})));
    let daemon_set = objects
        .iter()
        .find(|one| one["kind"] == "DaemonSet")
        .unwrap();
    let faults: [fn(&mut Value); 4] = [
        |pod| pod["spec"]["hostNetworking"] = true.into(),
        |pod| pod["spec"]["containers"][0]["volumeMounts"][0]["name"] = "nowhere".into(),
        |pod| pod["spec"]["containers"][0]["securityContext"]["privileged"] = "no".into(),
        |pod| pod["metadata"]["labels"] = json!({"app.kubernetes.io/name": "another"}),
    ];
    for (at, fault) in faults.into_iter().enumerate() {
        let mut broken = daemon_set.clone();
        fault(&mut broken["spec"]["template"]);
        assert!(!refusals(&broken).is_empty(), "fault {at} is not found");
    }
}

#[test]
fn the_plain_manifests_are_the_charts() {
    for (name, over, about) in [
        (
            "xebec-agent.yaml",
            json!({}),
            "The node agent in place of kube-proxy and CNI plugin",
        ),
        (
            "xebec-agent-cleanup.yaml",
            json!({"cleanup": true}),
            "The way back: cleans each node of what the agent left",
        ),
    ] {
        let path = deploy().join(name);
        let text = rendered(&over);
        if std::env::var_os(WRITE).is_some() {
            let head = format!(
                "# {about}; see docs/replace-kube-proxy.md.\n# Made of the chart in helm/xebec-agent, and kept equal to it by a test; {WRITE}=1 writes it anew.\n---\n"
            );
            std::fs::write(&path, head + &text).unwrap();
        }
        assert_eq!(documents(&read(&path)), documents(&text), "{name}");
    }
}

#[test]
fn the_agent_reads_what_the_config_map_says() {
    let objects = documents(&rendered(&many_values()));
    let of = |kind: &str| objects.iter().find(|one| one["kind"] == kind).unwrap();
    let pod = &of("DaemonSet")["spec"]["template"]["spec"];
    let named = |of: &Value| {
        let all = of.as_array().unwrap().iter();
        let mut all = all.filter(|one| one["name"] == "ip-masq");
        all.next().unwrap().clone()
    };
    let volume = &named(&pod["volumes"])["configMap"];
    let container = &pod["containers"][0];
    let item = &volume["items"][0];
    let file = format!(
        "{}/{}",
        named(&container["volumeMounts"])["mountPath"]
            .as_str()
            .unwrap(),
        item["path"].as_str().unwrap()
    );
    assert_eq!(file, xebec_agent::masquerade::DEFAULT_PATH);
    let flag = Value::from(format!("--ip-masq-config={file}"));
    assert!(container["args"].as_array().unwrap().contains(&flag));
    let map = of("ConfigMap");
    assert_eq!(map["metadata"]["name"], volume["name"]);
    let text = map["data"][item["key"].as_str().unwrap()].as_str().unwrap();
    // The agent takes it as the chart writes it.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ip-masq-agent");
    std::fs::write(&path, text).unwrap();
    let (blocks, _follower) = xebec_agent::masquerade::follow(&path, false).unwrap();
    let blocks: Vec<String> = blocks.borrow().iter().map(ToString::to_string).collect();
    assert_eq!(blocks, ["10.0.0.0/8", "fe80::/10"]);
    // Without it nothing is followed, and by itself the flag means the same file.
    let plain = rendered(&json!({}));
    assert!(!plain.contains("ip-masq"), "{plain}");
    assert!(takes(&["agent", "--ip-masq-config"]).is_ok());
}

/// The command line, as `main` knows it.
fn takes(arguments: &[&str]) -> Result<(), String> {
    let all = [&["xebec"], arguments].concat();
    match crate::Cli::try_parse_from(all) {
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

#[test]
fn this_executable_takes_the_flags_of_all_containers() {
    let mut taken = 0;
    for object in all_objects()
        .iter()
        .filter(|one| one["kind"] == "DaemonSet")
    {
        let pod = &object["spec"]["template"]["spec"];
        let containers = ["initContainers", "containers"].map(|of| pod[of].as_array());
        for container in containers.into_iter().flatten().flatten() {
            let arguments: Vec<&str> = container["args"]
                .as_array()
                .unwrap()
                .iter()
                .filter_map(Value::as_str)
                .collect();
            takes(&arguments).unwrap_or_else(|error| panic!("{arguments:?}: {error}"));
            taken += 1;
        }
    }
    assert_eq!(taken, 5);
    for wrong in [
        "--masquerade-all",
        "--xdp=fast",
        "--lb-mode=fast",
        "--cluster-cidr=10.0.0.0",
    ] {
        assert!(takes(&["agent", wrong]).is_err(), "{wrong}");
    }
    assert!(takes(&["agent", "cleanup", "--xdp=off"]).is_err());
}

#[test]
fn the_agent_has_no_more_rights_than_it_says() {
    let objects = documents(&rendered(&json!({})));
    let of = |kind: &str| objects.iter().find(|one| one["kind"] == kind).unwrap();
    let container = &of("DaemonSet")["spec"]["template"]["spec"]["containers"][0];
    assert!(container["securityContext"].get("privileged").is_none());
    assert_eq!(
        container["securityContext"]["capabilities"]["drop"],
        json!(["ALL"])
    );
    // In the whole cluster the agent reads, and writes events and policies' status alone; Secrets are not even read.
    for rule in of("ClusterRole")["rules"].as_array().unwrap() {
        let strings = |of: &str| -> Vec<String> {
            let all = rule[of].as_array().unwrap().iter();
            all.map(|one| one.as_str().unwrap().to_owned()).collect()
        };
        let resources = strings("resources");
        assert!(!resources.iter().any(|one| one == "secrets" || one == "*"));
        let verbs: &[&str] = match &*resources[0] {
            "events" => &["create", "patch", "update"],
            of if of.ends_with("/status") => &["patch"],
            _ => &["list", "watch"],
        };
        assert_eq!(strings("verbs"), verbs, "{resources:?}");
        let status = |one: &&String| one.ends_with("/status");
        let count = resources.iter().filter(status).count();
        assert!([0, resources.len()].contains(&count), "{resources:?}");
    }
}
