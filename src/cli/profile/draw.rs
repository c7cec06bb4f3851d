//! The heat map of a profile: guest memory in cells, each with its share of read and written pages and its first touch.

use crate::snapshot::{Extent, Gfn, PAGE_SIZE, PageSet};
use crate::tiering::profile::{Order, Profile};

pub const COLUMNS: u64 = 64;
/// Most rows of cells, over all of touched memory.
const ROWS: u64 = 32;

/// A stretch of guest memory; all cells have the same size.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cell {
    pub first: Gfn,
    pub read: u64,
    pub written: u64,
    pub unclassified: u64,
    /// Time of the first touch in it: 0 is first of all, 1 last. `None` if the order is unknown.
    pub when: Option<f64>,
}

/// Cells by rows; rows without a touched page are left out.
pub struct Map {
    /// Pages of a cell.
    pub cell: u64,
    pub rows: Vec<Vec<Cell>>,
}

impl Map {
    pub fn of(profile: &Profile) -> Map {
        let set = profile.working_set();
        let cell = cell_pages(&set);
        let row_pages = cell * COLUMNS;
        let mut cells: Vec<Vec<Cell>> = Vec::new();
        let mut next_row = 0;
        for run in set.runs() {
            let last_row = (run.end().0 - 1) / row_pages;
            for row in next_row.max(run.first.0 / row_pages)..=last_row {
                cells
                    .push((0..COLUMNS).map(|column| cell_of(profile, row * row_pages + column * cell, cell)).collect());
            }
            next_row = next_row.max(last_row + 1);
        }
        let mut map = Map { cell, rows: cells };
        map.note_order(profile, set.len());
        map
    }

    fn note_order(&mut self, profile: &Profile, pages: u64) {
        if profile.order == Order::Unknown {
            return;
        }
        let mut rank = 0_u64;
        for part in profile.in_order().iter().flat_map(|extent| extent.chunks(self.cell)) {
            let row_pages = self.cell * COLUMNS;
            let row_start = part.first.0 / row_pages * row_pages;
            let row = self.rows.binary_search_by_key(&row_start, |row| row[0].first.0);
            if let Some(row) = row.ok().and_then(|at| self.rows.get_mut(at)) {
                let cell = &mut row[((part.first.0 - row_start) / self.cell) as usize];
                cell.when.get_or_insert(rank as f64 / pages.max(1) as f64);
            }
            rank += part.pages;
        }
    }

    /// A line per row. A separate line stands between rows that are not adjacent.
    pub fn text(&self) -> String {
        let mut out = String::new();
        let mut expected = None;
        for row in &self.rows {
            let first = row[0].first;
            if expected.is_some_and(|expected| expected != first.0) {
                out.push_str("              ⋮\n");
            }
            let cells: String = row.iter().map(symbol).collect();
            out.push_str(&format!("{:#13x} |{cells}|\n", first.gpa()));
            expected = Some(first.0 + self.cell * COLUMNS);
        }
        out
    }

    /// Bytes of a cell, for people.
    pub fn cell_kib(&self) -> u64 {
        self.cell * PAGE_SIZE / 1024
    }
}

/// Pages of a cell: few for detail, but enough that at most `ROWS` rows are touched.
fn cell_pages(set: &PageSet) -> u64 {
    let mut cell = 1;
    loop {
        let row_pages = cell * COLUMNS;
        let mut rows = 0_u64;
        let mut next = 0;
        for run in set.runs() {
            let last = (run.end().0 - 1) / row_pages;
            rows += (last + 1).saturating_sub(next.max(run.first.0 / row_pages));
            next = next.max(last + 1);
        }
        if rows <= ROWS {
            return cell;
        }
        cell *= 2;
    }
}

fn cell_of(profile: &Profile, first: u64, pages: u64) -> Cell {
    let extent = Extent { first: Gfn(first), pages };
    Cell {
        first: extent.first,
        read: profile.read.len_in(extent),
        written: profile.written.len_in(extent),
        unclassified: profile.unclassified.len_in(extent),
        when: None,
    }
}

fn symbol(cell: &Cell) -> char {
    let symbol = match (cell.read > 0, cell.written > 0, cell.unclassified > 0) {
        (false, false, false) => return '·',
        (false, false, true) => '?',
        (true, false, _) => 'r',
        (false, true, _) => 'w',
        (true, true, _) => 'b',
    };
    if cell.when.is_some_and(|when| when < 1.0 / 3.0) { symbol.to_ascii_uppercase() } else { symbol }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::SnapshotId;
    use crate::tiering::profile::RecorderKind;

    fn profile(read: &[(u64, u64)], written: &[(u64, u64)], order: &[(u64, u64)]) -> Profile {
        let runs = |runs: &[(u64, u64)]| -> Vec<Extent> {
            runs.iter().map(|&(first, pages)| Extent { first: Gfn(first), pages }).collect()
        };
        let mut profile = Profile::new(SnapshotId::default(), RecorderKind::Uffd, "f");
        profile.read = runs(read).into_iter().collect();
        profile.written = runs(written).into_iter().collect();
        profile.order = Order::Exact(runs(order));
        profile
    }

    #[test]
    fn cells_show_class_and_order() {
        let map = Map::of(&profile(&[(64, 2)], &[(66, 1)], &[(66, 1), (64, 2)]));
        assert_eq!(map.cell, 1);
        assert_eq!(map.text(), format!("      0x40000 |rrW{}|\n", "·".repeat(61)));
    }

    #[test]
    fn untouched_rows_are_left_out_and_cells_grow() {
        let map = Map::of(&profile(&[(0, 1), (1 << 31, 1)], &[], &[(0, 1), (1 << 31, 1)]));
        assert_eq!((map.cell, map.rows.len()), (1, 2));
        assert!(map.text().contains('⋮'));
        let map = Map::of(&profile(&[(0, 64 * 33)], &[], &[(0, 64 * 33)]));
        assert_eq!((map.cell, map.rows.len()), (2, 17));
        let all = Map::of(&profile(&[(0, 1 << 32)], &[], &[(0, 1 << 32)]));
        assert_eq!(all.rows.len(), 32);
        assert!(Map::of(&profile(&[], &[], &[])).rows.is_empty());
    }
}
