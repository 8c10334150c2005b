//! Measures durable writes per second of the embedded engine: `durable_writes [folder] [seconds]`.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::Bytes;
use xebec_store::{Embedded, Op, Options, Store, Txn};

/// Bytes of a value: about what a small pod takes.
const VALUE: usize = 1024;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args_os().skip(1);
    let dir = args.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let seconds: u64 = match args.next() {
        Some(text) => text.to_string_lossy().parse()?,
        None => 5,
    };
    for clients in [1usize, 16, 256] {
        // A folder of its own, removed when the run is over.
        let folder = dir.join(format!(
            "xebec-durable-writes-{}-{clients}",
            std::process::id()
        ));
        let store = Embedded::open(&folder, Options::default())?;
        let begin = Instant::now();
        let until = begin + Duration::from_secs(seconds);
        let tasks: Vec<_> = (0..clients)
            .map(|client| {
                let store = store.clone();
                tokio::spawn(async move {
                    let value = Bytes::from(vec![b'x'; VALUE]);
                    let mut written = 0u64;
                    while Instant::now() < until {
                        // A thousand keys a client, so that memory stays bounded.
                        let key = Bytes::from(format!("/bench/{client}/{}", written % 1000));
                        let ops = vec![Op::Put {
                            key,
                            value: value.clone(),
                        }];
                        let compare = Vec::new();
                        store.txn(Txn { compare, ops }).await?;
                        written += 1;
                    }
                    Ok::<u64, xebec_store::Error>(written)
                })
            })
            .collect();
        let mut written = 0;
        for task in tasks {
            written += task.await??;
        }
        let rate = written as f64 / begin.elapsed().as_secs_f64();
        println!(
            "{clients} clients: {rate:.0} durable writes/s ({VALUE} bytes each, {})",
            dir.display()
        );
        drop(store);
        std::fs::remove_dir_all(&folder)?;
    }
    Ok(())
}
