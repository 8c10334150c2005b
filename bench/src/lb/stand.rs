//! A node whose programs are run: its agent, and what they are called in the kernel.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use aya::programs::loaded_programs;

use super::setting::Setting;
use super::{SUBJECTS, Subject};
use crate::services::{MANY, Network, Part, XebecStage, first_service, watch};

/// Room for a million translated flows: nothing has to go that a scenario wants to find, and new flows come to a table
/// of 524,288 at least: those of `tcp-v4-lru-256k`, in single runs and in loops.
const FLOWS: u32 = 1 << 21;
/// The kernel keeps so many bytes of a program's name.
const NAME: usize = 15;

/// A node with an agent, some Services, and the part that runs its programs.
pub struct Stand {
    // Dropped in this order: what runs before where it runs.
    pub pound: Part,
    client: Part,
    _without: Part,
    stage: XebecStage,
    pub services: usize,
    /// By subject: where its frames come in, and its number.
    pub settings: Vec<Setting>,
    pub programs: Vec<u32>,
}

impl Stand {
    pub fn new(services: usize) -> Result<Self> {
        let before = programs()?;
        let mut stage =
            XebecStage::with_outside(&format!("xdp-lb-{services}"), services, 10, MANY)?;
        stage.flows = FLOWS;
        stage.start_agent(true)?;
        let (mut client, without) = stage.agent_pod()?;
        let first = first_service(services)?;
        watch(&mut client, first, None, 300.0, || Ok(()))?;
        let words = ["--cpu", "0", "pound"];
        let pound = Part::start(Network::Of(&stage.stage.node), false, &words)?;
        let (mut settings, mut numbers) = (Vec::new(), Vec::new());
        for subject in &SUBJECTS {
            settings.push(Setting::of(subject, &stage, &client)?);
            numbers.push(subject.newest(&before)?);
        }
        Ok(Self {
            pound,
            client,
            _without: without,
            stage,
            services,
            settings,
            programs: numbers,
        })
    }

    pub fn end(mut self) -> Result<()> {
        drop(self.pound);
        drop(self.client);
        self.stage.stop_agent()
    }

    /// How many backends were chosen for new flows so far.
    pub fn chosen(&self) -> Result<u64> {
        let rows = self.stage.table("services")?;
        let each = rows
            .iter()
            .map(|row| (row["number"].as_u64(), row["hits"].as_u64().unwrap_or(0)));
        Ok(each.collect::<BTreeMap<_, _>>().values().sum())
    }
}

/// All programs of the kernel: their numbers and names.
pub fn programs() -> Result<BTreeMap<u32, String>> {
    let mut found = BTreeMap::new();
    for program in loaded_programs() {
        // One that ends while we look is none of ours.
        let Ok(program) = program else { continue };
        let name = program.name_as_str().unwrap_or_default().to_owned();
        found.insert(program.id(), name);
    }
    Ok(found)
}

impl Subject {
    /// The number of the agent's program, which was not there before the agent was. One whose maps have grown has loaded
    /// its programs again: the last ones are those that are attached.
    pub fn newest(&self, before: &BTreeMap<u32, String>) -> Result<u32> {
        let name = &self.name[..self.name.len().min(NAME)];
        let own = |(id, found): &(u32, String)| found == name && !before.contains_key(id);
        let (id, _) = programs()?
            .into_iter()
            .rfind(own)
            .with_context(|| format!("the agent loaded no {}", self.name))?;
        Ok(id)
    }
}
