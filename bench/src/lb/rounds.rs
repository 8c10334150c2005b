//! The rounds of a measurement: programs and an empty one, sizes in turns, and whether new flows were new.

use anyhow::{Result, bail, ensure};

use super::pound::{Order, Pounded};
use super::stand::Stand;
use crate::row::median;

/// What all rounds of one subject gave in one scenario at one size, over an empty program: nanoseconds.
pub struct Measured {
    /// In loops; none where there are none.
    pub looped: Vec<f64>,
    /// Medians of single runs.
    over: Vec<f64>,
    /// Their 99th percentile, of the last round.
    p99: f64,
    /// The empty program's.
    pub floor: f64,
}

impl Measured {
    /// What the aims are about.
    pub fn costs(&self) -> &[f64] {
        match self.looped.is_empty() {
            true => &self.over,
            false => &self.looped,
        }
    }

    pub fn cell(&self) -> String {
        let single = format!("alone {:.0}, p99 {:.0}", median(&self.over), self.p99);
        match self.looped.is_empty() {
            true => format!("({single})"),
            false => format!("{:.0} ({single})", median(&self.looped)),
        }
    }

    fn add(&mut self, stand: &mut Stand, subject: usize, order: &mut Order) -> Result<()> {
        order.program = None;
        let floor: Pounded = stand.pound.ask(&order)?;
        order.program = Some(stand.programs[subject]);
        let ours: Pounded = stand.pound.ask(&order)?;
        if let Some(why) = ours.wrong {
            bail!("not there yet ({why})");
        }
        self.over.push(ours.p50 - floor.p50);
        let looped = ours.looped.zip(floor.looped);
        self.looped.extend(looped.map(|(ours, floor)| ours - floor));
        self.p99 = ours.p99 - floor.p50;
        self.floor = floor.p50;
        Ok(())
    }
}

/// All rounds of a subject in a scenario: the program and an empty one, at each size.
pub fn in_rounds(
    rounds: u32,
    stands: &mut [Stand],
    subject: usize,
    orders: &mut [Order],
) -> Vec<Result<Measured>> {
    let mut all: Vec<Result<(Measured, u64)>> = stands
        .iter()
        .zip(&*orders)
        .map(|(stand, order)| {
            let before = match order.is_fresh() {
                true => stand.chosen()?,
                false => 0,
            };
            let none = Measured {
                looped: Vec::new(),
                over: Vec::new(),
                p99: 0.0,
                floor: 0.0,
            };
            Ok((none, before))
        })
        .collect();
    for round in 0..rounds {
        for ((stand, order), measured) in stands.iter_mut().zip(&mut *orders).zip(&mut all) {
            let Ok((so_far, _)) = measured else { continue };
            order.round = round;
            if let Err(error) = so_far.add(stand, subject, order) {
                *measured = Err(error);
            }
        }
    }
    let ends = all.into_iter().zip(stands).zip(orders);
    ends.map(|((measured, stand), order)| {
        let (measured, before) = measured?;
        let begun = u64::from(rounds * order.begun(!measured.looped.is_empty()));
        if order.is_fresh() {
            // A new flow may find no free port in a few tries; what was known is not counted at all.
            let chosen = stand.chosen()?.saturating_sub(before);
            ensure!(
                chosen + begun / 10 >= begun,
                "of {begun} new flows {chosen} were new"
            );
        }
        Ok(measured)
    })
    .collect()
}
