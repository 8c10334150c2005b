//! The columns of tables, read from a committed text file when a table is asked for.

use serde_json::{Value, json};

use crate::table::Resource;

/// What the file is made of stands at its head.
const COLUMNS: &str = include_str!("../../data/columns.txt");
/// Columns of kinds that the file does not know.
const DEFAULT: &str = "Name\nCreated At";

/// The lines of the section of this name.
fn section(name: &str) -> Option<&'static str> {
    COLUMNS.split("\nkind ").find_map(|section| {
        let (title, lines) = section.split_once('\n')?;
        (title == name).then_some(lines)
    })
}

/// The column that a line stands for.
fn column(line: &str) -> Option<Value> {
    let mut fields = line.splitn(4, '|');
    let name = fields.next()?;
    let Some(kind) = fields.next() else {
        let common = section("*")?.lines();
        return common.filter(|line| line.contains('|')).find_map(|line| {
            let is_this = line.split('|').next() == Some(name);
            is_this.then(|| column(line)).flatten()
        });
    };
    let priority: i64 = fields.next()?.parse().ok()?;
    let description = fields.next()?.replace("\\n", "\n");
    let format = if name == "Name" { "name" } else { "" };
    Some(json!({
        "name": name,
        "type": kind,
        "format": format,
        "description": description,
        "priority": priority,
    }))
}

/// The columns of a kind.
pub(super) fn of(resource: &Resource) -> Vec<Value> {
    let title = match resource.group {
        // Events are one kind under two names.
        "" | "events.k8s.io" => resource.kind.to_owned(),
        group => format!("{group}/{}", resource.kind),
    };
    let lines = section(&title).unwrap_or(DEFAULT).lines();
    lines
        .take_while(|line| !line.is_empty())
        .filter_map(column)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_a_column_and_every_kind_is_known() {
        for part in COLUMNS.split("\nkind ").skip(1) {
            let (title, lines) = part.split_once('\n').unwrap();
            for line in lines.lines().take_while(|line| !line.is_empty()) {
                assert!(column(line).is_some(), "{title}: {line}");
            }
            let (group, kind) = title.split_once('/').unwrap_or(("", title));
            let known = crate::table::resources();
            assert!(
                title == "*"
                    || known
                        .iter()
                        .any(|one| one.group == group && one.kind == kind),
                "{title}"
            );
        }
    }
}
