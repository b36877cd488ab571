//! A picture of a build's memory: where each page's content stands.
//!
//! It shows at a glance what a build stores itself, what it leans on its ancestors for, and what
//! costs nothing.

use svg::Document;
use torpor_build::{Entry, Index, PageRun};

use crate::page_map::{self, Style};

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
    let runs: Vec<(PageRun, Cell)> = index
        .runs()
        .map(|run| {
            let (first_page, pages) = (run.first_page, run.pages);
            (PageRun { first_page, pages }, Cell::of(run.what))
        })
        .collect();
    let title = format!("guest memory of build {}", index.build_id());
    page_map::draw(&title, index.len_pages(), &runs, |cell| Style {
        colour: cell.colour(index),
        label: cell.label(index),
    })
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
