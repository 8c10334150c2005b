//! Columns for people: aligned text tables in kubectl's manner.

use std::io::Write;

use anyhow::Result;

/// Writes a header and rows, each column as wide as its widest cell, three spaces between.
pub fn write_table<const N: usize>(
    out: &mut impl Write,
    header: &[&str; N],
    rows: &[[String; N]],
) -> Result<()> {
    let mut grid = vec![
        header
            .iter()
            .map(|cell| (*cell).to_owned())
            .collect::<Vec<_>>(),
    ];
    grid.extend(rows.iter().map(|row| row.to_vec()));
    write_grid(out, &grid)
}

/// The same for rows whose number of columns is known only at run time; the first row is the header.
pub fn write_grid(out: &mut impl Write, grid: &[Vec<String>]) -> Result<()> {
    let mut widths = vec![0; grid.first().map_or(0, Vec::len)];
    for row in grid {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    for row in grid {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', width - cell.chars().count() + 3));
        }
        match writeln!(out, "{}", line.trim_end()) {
            // The reader (`| head`) has seen enough.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
            other => other?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn columns_line_up() {
        let mut out = Vec::new();
        let rows = [
            ["a".to_owned(), "1".to_owned()],
            ["long-name".to_owned(), "22".to_owned()],
        ];
        super::write_table(&mut out, &["NAME", "N"], &rows).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "NAME        N\na           1\nlong-name   22\n"
        );
    }
}
