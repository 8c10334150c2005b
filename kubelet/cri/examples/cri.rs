//! The runtime alone, for tests and for trying it with `crictl`:
//! `cri ROOT RUN CNI_CONF_DIR [CNI_BIN_DIR…]`; `cri shim …` is its shim.

use std::path::PathBuf;

use tokio_util::sync::CancellationToken;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|a| a == "shim") {
        std::process::exit(xebec_shim::main(args[1..].to_vec()));
    }
    let [root, run, conf, bins @ ..] = args.as_slice() else {
        anyhow::bail!("usage: cri ROOT RUN CNI_CONF_DIR [CNI_BIN_DIR...]");
    };
    let mut config = xebec_cri::Config::new(PathBuf::from(root), PathBuf::from(run));
    config.cni_conf_dir = PathBuf::from(conf);
    if !bins.is_empty() {
        config.cni_bin_dirs = bins.iter().map(PathBuf::from).collect();
    }
    if let Ok(parent) = std::env::var("XEBEC_CGROUP_PARENT") {
        config.cgroup_parent = parent;
    }
    if let Ok(dir) = std::env::var("XEBEC_UNIFIED_CGROUP") {
        config.unified_cgroup = Some(PathBuf::from(dir));
    }
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    let shutdown = CancellationToken::new();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let stop = shutdown.clone();
        tokio::spawn(async move {
            let mut term =
                tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
            tokio::select! {
                _ = term.recv() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
            stop.cancel();
            std::io::Result::Ok(())
        });
        xebec_cri::run(config, shutdown).await
    })
}
