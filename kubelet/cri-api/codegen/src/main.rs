//! Generates `src/v1.rs` of `xebec-cri-api` from a CRI `api.proto`, without protoc.
//!
//! Usage: `cargo run -- PATH/TO/api.proto ../src/v1.rs`
//! The proto comes with the Go module `k8s.io/cri-api` (pkg/apis/runtime/v1/api.proto).

use anyhow::{Context, bail};

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [proto, out] = args.as_slice() else {
        bail!("usage: xebec-cri-api-codegen API_PROTO OUT_RS");
    };
    let proto = std::path::Path::new(proto);
    let dir = proto.parent().context("the proto's path has no directory")?;
    let mut set = protox::Compiler::new([dir])?
        .include_source_info(false)
        .open_file(proto)?
        .file_descriptor_set();
    // Without source info no comment of the proto reaches the generated code.
    for file in &mut set.file {
        file.source_code_info = None;
    }
    let tmp = std::env::temp_dir().join(format!("xebec-cri-api-{}", std::process::id()));
    std::fs::create_dir_all(&tmp)?;
    tonic_prost_build::configure()
        .out_dir(&tmp)
        .compile_fds(set)?;
    let code = std::fs::read_to_string(tmp.join("runtime.v1.rs"))?;
    std::fs::remove_dir_all(&tmp)?;
    std::fs::write(
        out,
        format!("// CRI v1 messages, clients and servers; written by kubelet/cri-api/codegen.\n{code}"),
    )?;
    Ok(())
}
