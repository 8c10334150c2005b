//! Where a measured program's frames come in.

use std::net::IpAddr;

use anyhow::{Context, Result};
use serde_json::Value;

use super::Subject;
use super::kernel::Kind;
use super::pound::{Order, Target};
use crate::services::{
    NODE_IP, NODE_IP6, NODE_PORT, OUTSIDE, OUTSIDE6, PORT, Part, XebecStage, backend, backend6,
};

/// Where a subject's frames come in, and what they ask.
pub struct Setting {
    /// Number of the device that frames come in at.
    pub device: u32,
    /// Hardware addresses: the device's own, the sender's.
    pub hardware: [[u8; 6]; 2],
    /// Of IPv4 and of IPv6.
    pub targets: [Target; 2],
}

impl Setting {
    /// A subject's on this stage, with this pod.
    pub fn of(subject: &Subject, stage: &XebecStage, pod: &Part) -> Result<Self> {
        let links = |part: &Part, words: &str| -> Result<Value> {
            serde_json::from_str(&part.run("ip", words)?).context("ip printed no JSON")
        };
        let inside = links(pod, "-json addr show dev eth0")?;
        // The node's end of the pod's cable is the one whose number the pod's end names.
        let device = if subject.pod {
            let number = inside[0]["link_index"]
                .as_u64()
                .context("the pod's device names no other end")?;
            let all = links(&stage.stage.node, "-json link show")?;
            all.as_array()
                .into_iter()
                .flatten()
                .find(|link| link["ifindex"].as_u64() == Some(number))
                .cloned()
                .context("the pod's device has no other end on the node")?
        } else {
            links(&stage.stage.node, "-json link show dev o0")?[0].clone()
        };
        let near = mac(&device)?;
        // A port of a backend where nobody serves.
        let nowhere: [IpAddr; 2] = [backend(2).into(), backend6(2).into()];
        let target = |sender, service: (IpAddr, u16), six: bool| Target {
            sender,
            service: service.into(),
            nowhere: (nowhere[usize::from(six)], 9).into(),
        };
        Ok(if subject.pod {
            let address = |family: &str| -> Result<IpAddr> {
                let all = inside[0]["addr_info"].as_array().into_iter().flatten();
                let mut global = all.filter(|one| one["scope"] == "global");
                global
                    .find(|one| one["family"] == family)
                    .and_then(|one| one["local"].as_str()?.parse().ok())
                    .with_context(|| format!("the pod has no address of {family}"))
            };
            Self {
                device: index(&device)?,
                hardware: [near, mac(&inside[0])?],
                targets: [
                    target(Some(address("inet")?), (OUTSIDE.into(), PORT), false),
                    target(Some(address("inet6")?), (OUTSIDE6.into(), PORT), true),
                ],
            }
        } else {
            Self {
                device: index(&device)?,
                hardware: [near, [2, 0, 0, 0, 0, 9]],
                targets: [
                    target(None, (NODE_IP.into(), NODE_PORT), false),
                    target(None, (NODE_IP6.into(), NODE_PORT), true),
                ],
            }
        })
    }

    /// What a scenario asks of a program.
    pub fn order(&self, kind: Kind, scenario: usize, samples: u32) -> Order {
        Order {
            program: None,
            kind,
            device: self.device,
            hardware: self.hardware,
            targets: self.targets,
            scenario,
            samples,
            round: 0,
        }
    }
}

/// A device's number, as `ip -json` tells it.
pub fn index(link: &Value) -> Result<u32> {
    link["ifindex"]
        .as_u64()
        .and_then(|index| index.try_into().ok())
        .context("a device has no number")
}

fn mac(link: &Value) -> Result<[u8; 6]> {
    let text = link["address"].as_str().unwrap_or_default();
    let bytes: Vec<u8> = text
        .split(':')
        .filter_map(|byte| u8::from_str_radix(byte, 16).ok())
        .collect();
    bytes
        .try_into()
        .ok()
        .with_context(|| format!("{text:?} is no hardware address"))
}
