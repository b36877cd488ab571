//! A picture of memory: one cell for some pages, coloured by what most of them are.

use std::collections::HashMap;
use std::hash::Hash;

use svg::Document;
use svg::node::element::{Rectangle, Text, Title};
use torpor_build::{PAGE_SIZE, PageRun};

/// Cells in a row and rows at most: with 512 MiB one cell is 64 KiB.
const COLUMNS: u64 = 128;
const ROWS_MAX: u64 = 64;
/// Side of a cell, in pixels, its gap included.
const CELL_PX: u64 = 7;
const MARGIN_PX: u64 = 16;
const LEGEND_LINE_PX: u64 = 20;

/// How a kind of page is shown.
#[derive(Debug, Clone)]
pub(crate) struct Style {
    pub(crate) colour: &'static str,
    pub(crate) label: String,
}

/// Draws pages by kind. `runs` are in page order; what they leave out stays empty. The legend has
/// the kinds' order; of kinds that are equally many in a cell the first is shown.
pub(crate) fn draw<K: Copy + Ord + Hash>(
    title: &str,
    len_pages: u64,
    runs: &[(PageRun, K)],
    style: impl Fn(K) -> Style,
) -> Document {
    let pages_per_cell = len_pages.div_ceil(COLUMNS * ROWS_MAX).max(1);
    let rows = len_pages.div_ceil(pages_per_cell).div_ceil(COLUMNS);
    let mut legend: Vec<(K, u64)> = sum_by_kind(runs.iter().copied()).into_iter().collect();
    legend.sort_unstable();
    let width = 2 * MARGIN_PX + COLUMNS * CELL_PX;
    let map_bottom = 2 * MARGIN_PX + LEGEND_LINE_PX + rows * CELL_PX;
    let height = map_bottom + MARGIN_PX + legend.len() as u64 * LEGEND_LINE_PX;
    let mut picture = Document::new()
        .set("viewBox", (0, 0, width, height))
        .set("font-family", "sans-serif")
        .set("font-size", 13)
        .add(
            Rectangle::new()
                .set("width", width)
                .set("height", height)
                .set("fill", "#fafafa"),
        )
        .add(heading(title, len_pages, pages_per_cell));
    for (cell, kind) in cells(len_pages, pages_per_cell, runs) {
        let style = style(kind);
        let first = cell * pages_per_cell;
        let last = len_pages.min(first + pages_per_cell) - 1;
        let told = Title::new(format!("pages {first} to {last}: {}", style.label));
        picture = picture.add(square(cell, style.colour).add(told));
    }
    for (line, (kind, pages)) in legend.into_iter().enumerate() {
        let y = map_bottom + line as u64 * LEGEND_LINE_PX;
        let style = style(kind);
        picture = picture.add(swatch(y, style.colour)).add(
            Text::new(format!("{}: {}", style.label, size(pages)))
                .set("x", MARGIN_PX + 20)
                .set("y", y + 11),
        );
    }
    picture
}

/// What most pages of each cell are.
fn cells<K: Copy + Ord + Hash>(
    len_pages: u64,
    pages_per_cell: u64,
    runs: &[(PageRun, K)],
) -> Vec<(u64, K)> {
    let mut shown = Vec::new();
    let mut next = 0;
    for cell in 0..len_pages.div_ceil(pages_per_cell) {
        let (from, until) = (cell * pages_per_cell, (cell + 1) * pages_per_cell);
        let end = |run: &PageRun| run.first_page + run.pages;
        while runs.get(next).is_some_and(|(run, _)| end(run) <= from) {
            next += 1;
        }
        let inside = runs[next..]
            .iter()
            .take_while(|(run, _)| run.first_page < until)
            .map(|(run, kind)| {
                let first_page = run.first_page.max(from);
                let pages = end(run).min(until) - first_page;
                (PageRun { first_page, pages }, *kind)
            });
        let most = sum_by_kind(inside)
            .into_iter()
            .max_by_key(|(kind, pages)| (*pages, std::cmp::Reverse(*kind)));
        shown.extend(most.map(|(kind, _)| (cell, kind)));
    }
    shown
}

fn sum_by_kind<K: Eq + Hash>(runs: impl Iterator<Item = (PageRun, K)>) -> HashMap<K, u64> {
    let mut pages = HashMap::new();
    for (run, kind) in runs {
        *pages.entry(kind).or_default() += run.pages;
    }
    pages
}

fn heading(title: &str, len_pages: u64, pages_per_cell: u64) -> Text {
    Text::new(format!(
        "{title}: {}, a cell is {} KiB",
        size(len_pages),
        pages_per_cell * (PAGE_SIZE as u64 >> 10),
    ))
    .set("x", MARGIN_PX)
    .set("y", MARGIN_PX + 10)
}

fn square(cell: u64, colour: &str) -> Rectangle {
    Rectangle::new()
        .set("x", MARGIN_PX + cell % COLUMNS * CELL_PX)
        .set("y", MARGIN_PX + LEGEND_LINE_PX + cell / COLUMNS * CELL_PX)
        .set("width", CELL_PX - 1)
        .set("height", CELL_PX - 1)
        .set("fill", colour)
}

fn swatch(y: u64, colour: &str) -> Rectangle {
    Rectangle::new()
        .set("x", MARGIN_PX)
        .set("y", y)
        .set("width", 12)
        .set("height", 12)
        .set("fill", colour)
        .set("stroke", "#999999")
}

fn size(pages: u64) -> String {
    crate::output::mib(pages * PAGE_SIZE as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first_page: u64, pages: u64, kind: u8) -> (PageRun, u8) {
        (PageRun { first_page, pages }, kind)
    }

    #[test]
    fn a_cell_shows_what_most_of_it_is_and_a_hole_shows_nothing() {
        let runs = [run(0, 3, 1), run(3, 5, 2), run(8, 2, 1), run(20, 4, 3)];
        assert_eq!(cells(24, 4, &runs), [(0, 1), (1, 2), (2, 1), (5, 3)]);
    }

    #[test]
    fn the_legend_counts_every_page() {
        let style = |kind| Style {
            colour: "#000000",
            label: format!("kind {kind}"),
        };
        let runs = [run(0, 256, 1), run(256, 512, 2), run(768, 256, 1)];
        let picture = draw("some memory", 1024, &runs, style).to_string();
        assert!(picture.contains("some memory: 4.0 MiB"), "{picture}");
        assert!(picture.contains("kind 1: 2.0 MiB"), "{picture}");
        assert!(picture.contains("kind 2: 2.0 MiB"), "{picture}");
    }
}
