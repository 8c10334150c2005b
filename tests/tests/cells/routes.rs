//! Routes of a node that are there for a while.

use std::time::Duration;

use anyhow::Result;

use super::world::World;

/// Routes of a node, for as long as this lives.
pub struct Routes<'a> {
    world: &'a World,
    node: &'a str,
    routes: Vec<String>,
}

impl<'a> Routes<'a> {
    /// Adds them, each in the words of `ip route`.
    pub fn add(world: &'a World, node: &'a str, routes: Vec<String>) -> Result<Self> {
        let routes = Self {
            world,
            node,
            routes,
        };
        routes.each("add")?;
        // The programs remember routes for up to 67 ms.
        std::thread::sleep(Duration::from_millis(200));
        Ok(routes)
    }

    fn each(&self, what: &str) -> Result<()> {
        let mut all = Ok(());
        for route in &self.routes {
            let words = ["ip", "route", what].into_iter().chain(route.split(' '));
            let words: Vec<&str> = words.collect();
            let one = self.world.cluster.in_node(self.node, &words);
            // All of them, whatever becomes of one.
            all = all.and(one.map(drop));
        }
        all
    }
}

impl Drop for Routes<'_> {
    fn drop(&mut self) {
        // One that could not be made is not there.
        let _ = self.each("del");
    }
}
