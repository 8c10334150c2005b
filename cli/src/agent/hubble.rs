//! How the agent alone keeps and serves flows; names as Cilium's agent has them.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use xebec_hubble::serve::Listen;
use xebec_hubble::tls;

/// Flags of flows.
#[derive(Args)]
pub struct Hubble {
    /// How many flows are kept
    #[arg(long, value_name = "N", default_value_t = xebec_agent::flows::KEPT as u32, value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    hubble_event_buffer_capacity: u32,
    /// Serve flows by Hubble's API at this address, too, such as :4244, for clients that have a certificate
    #[arg(long, value_name = "[ADDRESS]:PORT", value_parser = parse_address)]
    hubble_listen_address: Option<SocketAddr>,
    /// Serve them without TLS, to whoever asks
    #[arg(long)]
    hubble_disable_tls: bool,
    /// The server's certificate (PEM); it is read anew when it changes
    #[arg(long, value_name = "FILE")]
    hubble_tls_cert_file: Option<PathBuf>,
    /// The certificate's key (PEM)
    #[arg(long, value_name = "FILE")]
    hubble_tls_key_file: Option<PathBuf>,
    /// Authorities whose clients may read flows (PEM)
    #[arg(long, value_name = "FILE", value_delimiter = ',')]
    hubble_tls_client_ca_files: Vec<PathBuf>,
}

/// An address, or a port of all addresses.
pub fn parse_address(text: &str) -> Result<SocketAddr, String> {
    let whole = match text.strip_prefix(':') {
        Some(port) => format!("[::]:{port}"),
        None => text.to_owned(),
    };
    whole
        .parse()
        .map_err(|_| format!("{text:?} is neither ADDRESS:PORT nor :PORT"))
}

impl Hubble {
    /// How many flows are kept.
    pub fn event_buffer_capacity(&self) -> usize {
        self.hubble_event_buffer_capacity as usize
    }

    /// Where they are served besides the socket.
    pub fn listen(&self) -> Result<Option<Listen>> {
        let Some(address) = self.hubble_listen_address else {
            return Ok(None);
        };
        let files = (
            &self.hubble_tls_cert_file,
            &self.hubble_tls_key_file,
            &self.hubble_tls_client_ca_files[..],
        );
        let tls = match files {
            _ if self.hubble_disable_tls => None,
            (Some(cert), Some(key), [_, ..]) => Some(tls::Files {
                cert: cert.clone(),
                key: key.clone(),
                client_cas: self.hubble_tls_client_ca_files.clone(),
            }),
            _ => bail!(
                "--hubble-listen-address needs --hubble-tls-cert-file, --hubble-tls-key-file and --hubble-tls-client-ca-files, so that nobody reads flows without a certificate (or --hubble-disable-tls, for everybody to read them)"
            ),
        };
        Ok(Some(Listen { address, tls }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        hubble: Hubble,
    }

    fn listen(line: &str) -> Result<Option<Listen>, String> {
        let line = Line::try_parse_from(["agent"].into_iter().chain(line.split_whitespace()));
        let hubble = line.map_err(|error| error.to_string())?.hubble;
        hubble.listen().map_err(|error| error.to_string())
    }

    #[test]
    fn nobody_reads_flows_without_a_certificate_unless_that_is_said() {
        assert_eq!(listen(""), Ok(None));
        assert!(
            listen("--hubble-listen-address :4244")
                .unwrap_err()
                .contains("needs --hubble-tls-cert-file")
        );
        let files = "--hubble-tls-cert-file c --hubble-tls-key-file k";
        let line = format!("--hubble-listen-address :4244 {files}");
        assert!(listen(&line).unwrap_err().contains("client-ca-files"));
        let open = listen("--hubble-listen-address 127.0.0.1:1 --hubble-disable-tls");
        assert_eq!(open.unwrap().unwrap().tls, None);
        let whole = listen(&format!("{line} --hubble-tls-client-ca-files a,b"))
            .unwrap()
            .unwrap();
        assert_eq!(whole.address, "[::]:4244".parse().unwrap());
        assert_eq!(whole.tls.unwrap().client_cas.len(), 2);
        assert!(
            listen("--hubble-listen-address 4244")
                .unwrap_err()
                .contains("neither")
        );
    }
}
