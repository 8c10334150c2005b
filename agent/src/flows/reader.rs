//! Reading what is kept, from the past on.

use std::collections::VecDeque;

use anyhow::{Result, ensure};
use tokio::sync::watch;
use xebec_hubble::filter::Filters;
use xebec_hubble::flow::{LostEvent, LostEventSource};
use xebec_hubble::mask::Mask;
use xebec_hubble::observer::get_flows_response::ResponseTypes;
use xebec_hubble::observer::{GetFlowsRequest, GetFlowsResponse};
use xebec_hubble::wkt::Timestamp;

use super::Flows;
use super::metrics::Lost;
use super::store::Entry;

/// How many entries are looked at before others may go on.
const AT_ONCE: u64 = 64;

/// One who reads flows: where it stands among those that are kept, so that it costs the same however slow it is.
pub(super) struct Reader {
    flows: Flows,
    filters: Filters,
    mask: Option<Mask>,
    news: watch::Receiver<u64>,
    /// The number of the entry that it reads next.
    at: u64,
    /// Where it ends; none for who follows.
    end: Option<u64>,
    until: Option<i64>,
    /// How many flows it still wants.
    left: u64,
    ready: VecDeque<GetFlowsResponse>,
}

impl Reader {
    /// Who asks for this.
    ///
    /// # Errors
    /// Says what of it can't be asked.
    pub(super) async fn new(flows: Flows, asked: &GetFlowsRequest) -> Result<Self> {
        ensure!(
            !(asked.first && asked.follow),
            "first and follow can't go together"
        );
        let filters = Filters::new(&asked.whitelist, &asked.blacklist)?;
        let paths = asked
            .field_mask
            .as_ref()
            .map_or(&[][..], |mask| &mask.paths);
        let mask = Mask::new(paths)?;
        // Before the numbers are read, so that nothing that comes after them is missed.
        let news = flows.news();
        let since = asked.since.as_ref().map(Timestamp::as_nanos);
        let (oldest, end) = {
            let store = flows.store();
            let oldest = since.map_or(store.oldest(), |since| store.since(since));
            (oldest, store.next())
        };
        let mut reader = Self {
            flows,
            filters,
            mask,
            news,
            at: oldest,
            end: (!asked.follow).then_some(end),
            until: asked.until.as_ref().map(Timestamp::as_nanos),
            left: u64::MAX,
            ready: VecDeque::new(),
        };
        match asked.number {
            0 if asked.follow && since.is_none() => reader.at = end,
            0 => {}
            number if asked.first => reader.left = number,
            number => reader.at = reader.newest(number, oldest, end).await,
        }
        Ok(reader)
    }

    /// Where the newest flows that are wanted begin.
    async fn newest(&self, mut number: u64, oldest: u64, end: u64) -> u64 {
        let mut to = end;
        while to > oldest {
            let from = to.saturating_sub(AT_ONCE).max(oldest);
            for (at, entry) in self.entries(from, to).into_iter().rev() {
                if self.is_wanted(at, &entry) {
                    number -= 1;
                    if number == 0 {
                        return at;
                    }
                }
            }
            to = from;
            tokio::task::yield_now().await;
        }
        oldest
    }

    /// Copies of what is kept, with its numbers.
    fn entries(&self, from: u64, to: u64) -> Vec<(u64, Entry)> {
        let store = self.flows.store();
        let (first, entries) = store.range(from, to);
        (first..).zip(entries.cloned()).collect()
    }

    fn is_wanted(&self, number: u64, entry: &Entry) -> bool {
        let Entry::Flow(seen) = entry else {
            return false;
        };
        self.until.is_none_or(|until| seen.time <= until)
            && (self.filters.is_empty() || self.filters.pass(&self.flows.message(number, seen)))
    }

    /// The next answer; none at the end.
    pub(super) async fn next(&mut self) -> Option<GetFlowsResponse> {
        loop {
            if let Some(ready) = self.ready.pop_front() {
                return Some(ready);
            }
            if self.left == 0 || self.end.is_some_and(|end| self.at >= end) {
                return None;
            }
            if self.at >= *self.news.borrow_and_update() && self.end.is_none() {
                self.news.changed().await.ok()?;
                continue;
            }
            self.read();
            tokio::task::yield_now().await;
        }
    }

    /// The answers that wait to be told, without waiting for more.
    pub(super) fn ready(&mut self) -> impl Iterator<Item = GetFlowsResponse> {
        self.ready.drain(..)
    }

    /// Reads on, a few at once.
    fn read(&mut self) {
        let to = (self.at + AT_ONCE).min(self.end.unwrap_or(u64::MAX));
        let oldest = self.flows.store().oldest();
        if oldest > self.at {
            let missed = oldest.min(self.end.unwrap_or(u64::MAX)) - self.at;
            let time = Timestamp::from_nanos(super::now());
            let source = LostEventSource::HubbleRingBuffer;
            self.flows.metrics.count_lost(Lost::Store, missed);
            self.tell_lost(source, missed, time);
            self.at += missed;
            return;
        }
        for (number, entry) in self.entries(self.at, to) {
            self.at = number + 1;
            match entry {
                Entry::Lost(count, time) => {
                    let source = LostEventSource::PerfEventRingBuffer;
                    self.tell_lost(source, count, Timestamp::from_nanos(time));
                }
                Entry::Flow(seen) => {
                    if self.until.is_some_and(|until| seen.time > until) {
                        self.left = 0;
                    }
                    if self.left == 0 {
                        return;
                    }
                    let mut flow = self.flows.message(number, &seen);
                    if !self.filters.pass(&flow) {
                        continue;
                    }
                    self.left -= 1;
                    let time = flow.time;
                    if let Some(mask) = &self.mask {
                        flow = mask.apply(&flow);
                    }
                    self.ready.push_back(GetFlowsResponse {
                        node_name: self.flows.node_name().to_owned(),
                        time,
                        response_types: Some(ResponseTypes::Flow(flow)),
                    });
                }
            }
        }
    }

    fn tell_lost(&mut self, source: LostEventSource, count: u64, time: Timestamp) {
        self.ready.push_back(GetFlowsResponse {
            node_name: self.flows.node_name().to_owned(),
            time: Some(time),
            response_types: Some(ResponseTypes::LostEvents(LostEvent {
                source: source.into(),
                num_events_lost: count,
                ..LostEvent::default()
            })),
        });
    }
}
