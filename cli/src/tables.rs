//! `xebec endpoint list`, `xebec policy list`, `xebec bpf maps` and others: the agent's tables, as it holds them.

use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};
use serde_json::Value;

use crate::paths::Layout;
use crate::unix_http;

/// Common to all lists.
#[derive(Args)]
pub struct ListArgs {
    /// Only this node
    #[arg(long)]
    node: Option<String>,
    /// Output form
    #[arg(short, long, value_enum, default_value = "table")]
    output: Output,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Output {
    Table,
    Json,
}

/// `<noun> list`.
#[derive(Subcommand)]
pub enum Table {
    /// List them
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// One of them
    Get {
        /// An endpoint's [NAMESPACE/]POD or address, an identity's number, a domain
        name: String,
        #[command(flatten)]
        list: ListArgs,
    },
}

impl Table {
    /// Asks the agent for this table and prints it.
    pub async fn run(self, layout: &Layout, name: &str) -> Result<()> {
        let path = format!("/tables/{name}");
        match self {
            Self::List(args) => list(layout, &path, &args).await,
            Self::Get { name, list } => {
                let found = list_some(layout, &path, &list, |row| is_called(row, &name)).await?;
                anyhow::ensure!(found, "there is none called {name}: see the list");
                Ok(())
            }
        }
    }
}

/// Whether a row is meant by this name.
fn is_called(row: &Value, name: &str) -> bool {
    let pod = match name.split_once('/') {
        Some((namespace, pod)) => row["namespace"] == namespace && row["pod"] == pod,
        None => row["pod"] == name,
    };
    let addresses = row["addresses"].as_array();
    pod || row["domain"] == name
        || addresses.is_some_and(|all| all.iter().any(|one| one == name))
        || name
            .parse::<u32>()
            .is_ok_and(|number| row["pod"].is_null() && row["identity"] == number)
}

/// Asks the agents for the table at this path and prints it.
pub async fn list(layout: &Layout, path: &str, args: &ListArgs) -> Result<()> {
    list_some(layout, path, args, |_| true).await.map(drop)
}

/// The same for the rows that are wanted; whether there are any.
pub async fn list_some(
    layout: &Layout,
    path: &str,
    args: &ListArgs,
    wanted: impl Fn(&Value) -> bool,
) -> Result<bool> {
    let agents = unix_http::agents(layout, args.node.as_deref())?;
    let several = agents.len() > 1;
    let mut rows = Vec::new();
    for (node, socket) in agents {
        let answer = unix_http::get_json(&socket, path).await?;
        for mut row in answer
            .as_array()
            .cloned()
            .context("the agent's answer is no list")?
        {
            if !wanted(&row) {
                continue;
            }
            if let (true, Some(row)) = (several, row.as_object_mut()) {
                row.insert("node".into(), node.clone().into());
            }
            rows.push(row);
        }
    }
    if args.output == Output::Json {
        println!(
            "{}",
            serde_json::to_string_pretty(&rows).context("could not write JSON")?
        );
    } else {
        print_rows(&rows)?;
    }
    Ok(!rows.is_empty())
}

/// Columns are the fields of the rows, in the order in which the agent gives them.
fn print_rows(rows: &[Value]) -> Result<()> {
    let mut columns: Vec<&str> = Vec::new();
    for row in rows.iter().filter_map(Value::as_object) {
        for key in row.keys() {
            if !columns.contains(&key.as_str()) {
                columns.push(key);
            }
        }
    }
    if columns.is_empty() {
        for row in rows {
            println!("{}", cell(row));
        }
        return Ok(());
    }
    let mut grid: Vec<Vec<String>> = vec![columns.iter().map(|name| heading(name)).collect()];
    grid.extend(
        rows.iter()
            .map(|row| columns.iter().map(|name| cell(&row[*name])).collect()),
    );
    crate::text::write_grid(&mut std::io::stdout(), &grid)
}

fn heading(field: &str) -> String {
    field.replace('_', "-").to_uppercase()
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => "<none>".into(),
        Value::String(text) => text.clone(),
        Value::Array(items) if items.is_empty() => "<none>".into(),
        Value::Array(items) => items.iter().map(cell).collect::<Vec<_>>().join(","),
        Value::Object(map) => map
            .iter()
            .map(|(key, value)| format!("{key}={}", cell(value)))
            .collect::<Vec<_>>()
            .join(","),
        other => other.to_string(),
    }
}
