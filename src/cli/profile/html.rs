//! A profile as one HTML file, without scripts, fonts or network access.

use super::draw::{COLUMNS, Cell, Map};
use super::facts::{ProfileView, facts};
use crate::bench::markup::escape;

const CELL_PX: u64 = 12;
const LABEL_PX: u64 = 110;

/// The page.
pub fn page(shown: &ProfileView) -> String {
    let rows: String = facts(shown)
        .iter()
        .map(|(name, value)| format!("<tr><th>{}</th><td>{}</td></tr>\n", escape(name), escape(value)))
        .collect();
    let map = Map::of(&shown.profile);
    let classes = drawing(&map, "What was done", |cell| class_colour(cell, map.cell));
    let order = if shown.profile.order == crate::tiering::profile::Order::Unknown {
        "<p>The recorder saw no order.</p>".to_string()
    } else {
        drawing(&map, "When it was touched first", order_colour)
    };
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Profile of {title}</title>\n<style>\n\
         body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }}\n\
         th {{ text-align: left; padding-right: 1.5em; font-weight: 600; vertical-align: top }}\n\
         text {{ font: 10px monospace }} .key span {{ padding: 0 .6em; margin-right: .4em }}\n\
         </style></head><body>\n<h1>Profile of {title}</h1>\n<table>\n{rows}</table>\n\
         <p class=\"key\"><span style=\"background:#3b7dd8\"></span>read\n\
         <span style=\"background:#d8483b\"></span>written\n<span style=\"background:#8a4fc0\"></span>both\n\
         <span style=\"background:#999\"></span>read or written. Each cell is {kib} KiB; the fuller, the \
         stronger.</p>\n{classes}\n<p>Bright is early, dark is late.</p>\n{order}\n</body></html>\n",
        title = escape(&shown.profile.function),
        kib = map.cell_kib(),
    )
}

fn drawing(map: &Map, name: &str, colour: impl Fn(&Cell) -> Option<String>) -> String {
    let width = LABEL_PX + COLUMNS * CELL_PX;
    let height = map.rows.len() as u64 * CELL_PX;
    let mut out = format!(
        "<h2>{}</h2>\n<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" role=\"img\">\n",
        escape(name)
    );
    for (y, row) in (0_u64..).zip(&map.rows) {
        let top = y * CELL_PX;
        out += &format!("<text x=\"0\" y=\"{}\">{:#x}</text>\n", top + CELL_PX - 2, row[0].first.gpa());
        for (x, cell) in (0_u64..).zip(row) {
            let fill = colour(cell).unwrap_or_else(|| "#f2f2f2".to_string());
            let title = format!(
                "{:#x}: {} read, {} written, {} unclassified",
                cell.first.gpa(),
                cell.read,
                cell.written,
                cell.unclassified
            );
            out += &format!(
                "<rect x=\"{}\" y=\"{top}\" width=\"{side}\" height=\"{side}\" \
                 fill=\"{fill}\"><title>{title}</title></rect>\n",
                LABEL_PX + x * CELL_PX,
                side = CELL_PX - 1,
            );
        }
    }
    out + "</svg>"
}

fn class_colour(cell: &Cell, pages: u64) -> Option<String> {
    let [r, g, b] = match (cell.read > 0, cell.written > 0, cell.unclassified > 0) {
        (false, false, false) => return None,
        (false, false, true) => [0x99, 0x99, 0x99],
        (true, false, _) => [0x3b, 0x7d, 0xd8],
        (false, true, _) => [0xd8, 0x48, 0x3b],
        (true, true, _) => [0x8a, 0x4f, 0xc0],
    };
    let full = (cell.read + cell.written + cell.unclassified) as f64 / pages.max(1) as f64;
    Some(format!("rgba({r},{g},{b},{:.2})", 0.35 + 0.65 * full.min(1.0)))
}

fn order_colour(cell: &Cell) -> Option<String> {
    cell.when.map(|when| format!("hsl(35,90%,{:.0}%)", 65.0 - 50.0 * when.clamp(0.0, 1.0)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{Gfn, SnapshotId};
    use crate::tiering::profile::{Profile, RecorderKind};

    #[test]
    fn text_from_the_profile_is_escaped_and_nothing_is_fetched() {
        let mut profile = Profile::new(SnapshotId::default(), RecorderKind::DirtyLog, "<script>alert('\"&')</script>");
        profile.written.insert(Gfn(5));
        let html = page(&ProfileView { profile, file_bytes: 1, of_snapshot: None });
        assert!(!html.contains("<script") && html.contains("&lt;script&gt;alert(&#39;&quot;&amp;&#39;)"), "{html}");
        assert_eq!(html.matches("http").count(), html.matches("http://www.w3.org/2000/svg").count());
        assert_eq!(html.matches("<rect").count(), 64);
        assert!(html.contains("0x5000: 0 read, 1 written"));
    }
}
