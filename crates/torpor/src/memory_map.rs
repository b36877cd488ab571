//! A picture of a build's memory: one cell for some pages, coloured by what most of them are.
//!
//! It shows at a glance what a build stores itself, what it leans on its ancestors for, and what
//! costs nothing.

use std::collections::HashMap;

use svg::Document;
use svg::node::element::{Rectangle, Text, Title};
use torpor_build::{Entry, Index, PAGE_SIZE, Run};

/// Cells in a row and rows at most: with 512 MiB one cell is 64 KiB.
const COLUMNS: u64 = 128;
const ROWS_MAX: u64 = 64;
/// Side of a cell, in pixels, its gap included.
const CELL_PX: u64 = 7;
const MARGIN_PX: u64 = 16;
const LEGEND_LINE_PX: u64 = 20;
/// Own layer first, then its ancestors from the youngest: told apart also without colour vision
/// (ColorBrewer's blues to oranges).
const LAYER_COLOURS: [&str; 6] = [
    "#08519c", "#3182bd", "#6baed6", "#fd8d3c", "#e6550d", "#a63603",
];
const OLDER_LAYERS: &str = "#7f2704";

/// What a cell can be, in the order of the legend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Cell {
    Layer(u32),
    BaseImage,
    Zero,
    Removed,
    Free,
}

impl Cell {
    fn of(entry: Entry) -> Self {
        match entry {
            Entry::Layer { layer, .. } => Self::Layer(layer),
            Entry::BaseImage { .. } => Self::BaseImage,
            Entry::Zero => Self::Zero,
            Entry::Removed => Self::Removed,
            Entry::Free => Self::Free,
        }
    }

    fn colour(self, index: &Index) -> &'static str {
        match self {
            Self::Layer(layer) => LAYER_COLOURS
                .get(age(index, layer))
                .copied()
                .unwrap_or(OLDER_LAYERS),
            Self::BaseImage => "#31a354",
            Self::Zero => "#d9d9d9",
            Self::Removed => "#f0f0f0",
            Self::Free => "#ffffff",
        }
    }

    fn label(self, index: &Index) -> String {
        match self {
            Self::Layer(layer) => {
                let id = index.layers().get(layer as usize).map(ToString::to_string);
                let id = id.unwrap_or_default();
                if age(index, layer) == 0 {
                    format!("this build {id}")
                } else {
                    format!("layer {id}")
                }
            }
            Self::BaseImage => "in the base image".to_owned(),
            Self::Zero => "zero".to_owned(),
            Self::Removed => "removed".to_owned(),
            Self::Free => "free".to_owned(),
        }
    }
}

/// 0 for the build's own layer, then counting down its layer table: later layers are younger.
fn age(index: &Index, layer: u32) -> usize {
    let own = index.layers().iter().position(|id| *id == index.build_id());
    let last = index.layers().len().saturating_sub(1);
    match own {
        Some(own) if own == layer as usize => 0,
        _ => last.saturating_sub(layer as usize) + 1,
    }
}

/// Draws the map.
pub(crate) fn draw(index: &Index) -> Document {
    let pages_per_cell = index.len_pages().div_ceil(COLUMNS * ROWS_MAX).max(1);
    let cells = index.len_pages().div_ceil(pages_per_cell);
    let rows = cells.div_ceil(COLUMNS);
    let mut totals: HashMap<Cell, u64> = HashMap::new();
    for run in index.runs() {
        *totals.entry(Cell::of(run.what)).or_default() += run.pages;
    }
    let mut legend: Vec<(Cell, u64)> = totals.into_iter().collect();
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
        .add(heading(index, pages_per_cell));
    for cell in 0..cells {
        let first = cell * pages_per_cell;
        let pages = pages_per_cell.min(index.len_pages() - first);
        let most = majority(index.runs_in(first, pages));
        picture = picture.add(
            square(cell, most.colour(index), CELL_PX - 1).add(Title::new(format!(
                "pages {first} to {}: {}",
                first + pages - 1,
                most.label(index)
            ))),
        );
    }
    for (line, (cell, pages)) in legend.iter().enumerate() {
        let y = map_bottom + line as u64 * LEGEND_LINE_PX;
        picture = picture.add(swatch(y, cell.colour(index))).add(
            Text::new(format!("{}: {}", cell.label(index), size(*pages)))
                .set("x", MARGIN_PX + 20)
                .set("y", y + 11),
        );
    }
    picture
}

fn heading(index: &Index, pages_per_cell: u64) -> Text {
    Text::new(format!(
        "guest memory of build {}: {}, a cell is {} KiB",
        index.build_id(),
        size(index.len_pages()),
        pages_per_cell * (PAGE_SIZE as u64 >> 10),
    ))
    .set("x", MARGIN_PX)
    .set("y", MARGIN_PX + 10)
}

fn square(cell: u64, colour: &str, side: u64) -> Rectangle {
    Rectangle::new()
        .set("x", MARGIN_PX + cell % COLUMNS * CELL_PX)
        .set("y", MARGIN_PX + LEGEND_LINE_PX + cell / COLUMNS * CELL_PX)
        .set("width", side)
        .set("height", side)
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

/// What most of some pages are; of equals the one that costs more.
fn majority(runs: impl Iterator<Item = Run>) -> Cell {
    let mut pages: HashMap<Cell, u64> = HashMap::new();
    for run in runs {
        *pages.entry(Cell::of(run.what)).or_default() += run.pages;
    }
    let most = pages
        .into_iter()
        .max_by_key(|(cell, pages)| (*pages, std::cmp::Reverse(*cell)));
    most.map_or(Cell::Zero, |(cell, _)| cell)
}

#[cfg(test)]
mod tests {
    use super::*;
    use torpor_build::{BuildId, ImageKind, IndexBuilder};

    #[test]
    fn the_map_names_each_layer_and_what_costs_nothing() {
        let (parent, own) = (BuildId::random(), BuildId::random());
        let mut builder = IndexBuilder::new(own, ImageKind::Memory);
        let parent_layer = builder.add_layer(parent).unwrap();
        let own_layer = builder.add_layer(own).unwrap();
        builder
            .append(
                100,
                Entry::Layer {
                    layer: parent_layer,
                    offset_pages: 0,
                },
            )
            .unwrap();
        builder.append(50, Entry::Removed).unwrap();
        builder
            .append(
                50,
                Entry::Layer {
                    layer: own_layer,
                    offset_pages: 0,
                },
            )
            .unwrap();
        let picture = draw(&builder.finish()).to_string();
        assert!(picture.contains(&format!("layer {parent}")), "{picture}");
        assert!(picture.contains(&format!("this build {own}")));
        assert!(picture.contains("removed: 0.2 MiB"));
    }
}
