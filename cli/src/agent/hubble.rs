//! How the agent alone keeps and serves flows; names as Cilium's agent has them.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use xebec_agent::flows::HttpOptions;
use xebec_agent::flows::export::Options;
use xebec_agent::loader::Aggregation;
use xebec_hubble::flow::FlowFilter;
use xebec_hubble::serve::Listen;
use xebec_hubble::tls;

/// Flags of flows.
#[derive(Args)]
pub struct Hubble {
    /// Observe flows; without it programs tell of none, of what they drop neither
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    enable_hubble: bool,
    /// How many packets of a flow have events: all (none), those that begin, answer and end it and one in a second (low)
    /// or in four (medium), or those that begin and end it and one in a minute (maximum)
    #[arg(long, value_name = "LEVEL", default_value = "medium")]
    monitor_aggregation: Level,
    /// Tell URLs of HTTP without their queries
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    hubble_redact_http_urlquery: bool,
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
    /// Write flows to this file, as lines of JSON
    #[arg(long, value_name = "FILE")]
    hubble_export_file_path: Option<PathBuf>,
    /// How long the file may be before it is replaced, MB
    #[arg(long, value_name = "MB", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    hubble_export_file_max_size_mb: u32,
    /// How many files before it are kept
    #[arg(long, value_name = "N", default_value_t = 5)]
    hubble_export_file_max_backups: u16,
    /// Compress those (gzip)
    #[arg(long)]
    hubble_export_file_compress: bool,
    /// Only flows that one of these filters passes (FlowFilter of Hubble's API, as JSON; divided by blanks)
    #[arg(long, value_name = "FILTERS", value_parser = parse_filters)]
    hubble_export_allowlist: Option<Filters>,
    /// Only flows that none of these filters passes
    #[arg(long, value_name = "FILTERS", value_parser = parse_filters)]
    hubble_export_denylist: Option<Filters>,
    /// Only these parts of flows, such as source.pod_name; divided by commas or blanks
    #[arg(long, value_name = "FIELDS", default_value = "")]
    hubble_export_fieldmask: String,
}

/// Cilium's names of [`Aggregation`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Level {
    None,
    #[value(alias = "lowest")]
    Low,
    Medium,
    #[value(alias = "max")]
    Maximum,
}

/// Filters, as one flag has them.
#[derive(Clone, Debug, PartialEq)]
struct Filters(Vec<FlowFilter>);

fn parse_filters(text: &str) -> Result<Filters, String> {
    let filters = serde_json::Deserializer::from_str(text).into_iter();
    let filters = filters.collect::<Result<_, _>>();
    filters
        .map(Filters)
        .map_err(|error| format!("no FlowFilter: {error}"))
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
    /// Which packets have events.
    pub fn aggregation(&self) -> Aggregation {
        match (self.enable_hubble, self.monitor_aggregation) {
            (false, _) => Aggregation::Off,
            (true, Level::None) => Aggregation::None,
            (true, Level::Low) => Aggregation::Low,
            (true, Level::Medium) => Aggregation::Medium,
            (true, Level::Maximum) => Aggregation::Maximum,
        }
    }

    /// What is told of HTTP.
    pub fn http(&self) -> HttpOptions {
        HttpOptions {
            redact_query: self.hubble_redact_http_urlquery,
        }
    }

    /// How many flows are kept.
    pub fn event_buffer_capacity(&self) -> usize {
        self.hubble_event_buffer_capacity as usize
    }

    /// What of them is written to a file.
    pub fn export(&self) -> Option<Options> {
        let filters = |filters: &Option<Filters>| {
            filters
                .as_ref()
                .map_or_else(Vec::new, |filters| filters.0.clone())
        };
        let fields = self.hubble_export_fieldmask.split([',', ' ']);
        Some(Options {
            path: self.hubble_export_file_path.clone()?,
            longest: self.hubble_export_file_max_size_mb as usize * 1_000_000,
            backups: self.hubble_export_file_max_backups.into(),
            compress: self.hubble_export_file_compress,
            allow: filters(&self.hubble_export_allowlist),
            deny: filters(&self.hubble_export_denylist),
            fields: fields
                .filter(|field| !field.is_empty())
                .map(str::to_owned)
                .collect(),
        })
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
    fn events_are_put_together_as_asked() {
        let read = |line: &str| {
            let line = Line::try_parse_from(["agent"].into_iter().chain(line.split_whitespace()));
            line.ok().map(|line| line.hubble.aggregation())
        };
        for (line, expected) in [
            ("", Some(Aggregation::Medium)),
            ("--monitor-aggregation none", Some(Aggregation::None)),
            ("--monitor-aggregation=lowest", Some(Aggregation::Low)),
            ("--monitor-aggregation maximum", Some(Aggregation::Maximum)),
            ("--monitor-aggregation most", None),
            ("--enable-hubble=false", Some(Aggregation::Off)),
            ("--enable-hubble=true", Some(Aggregation::Medium)),
        ] {
            assert_eq!(read(line), expected, "{line}");
        }
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

    #[test]
    fn what_is_exported_is_as_asked() {
        let read = |line: &[&str]| {
            let line = Line::try_parse_from(["agent"].iter().chain(line));
            line.map(|line| line.hubble.export())
                .map_err(|error| error.to_string())
        };
        assert_eq!(read(&[]), Ok(None));
        let options = read(&[
            "--hubble-export-file-path",
            "/var/log/flows.log",
            "--hubble-export-file-max-size-mb",
            "2",
            "--hubble-export-allowlist",
            r#"{"verdict":["DROPPED"]} {"source_pod":["shop/"]}"#,
            "--hubble-export-fieldmask",
            "time,source.pod_name verdict",
        ]);
        let options = options.unwrap().unwrap();
        assert_eq!(
            (options.longest, options.backups, options.compress),
            (2_000_000, 5, false)
        );
        assert_eq!((options.allow.len(), options.deny.len()), (2, 0));
        assert_eq!(options.fields, ["time", "source.pod_name", "verdict"]);
        let refused = read(&["--hubble-export-denylist", "{\"verdict\":[\"MAYBE\"]}"]);
        assert!(
            refused.unwrap_err().contains("no FlowFilter"),
            "it is refused"
        );
    }
}
