//! Images made of layers read as if they had been stored whole.
#![allow(missing_docs, clippy::unwrap_used, reason = "test code")]

mod common;

use common::{Push, page, pages, read_all, storage, store, try_store, write_image};
use proptest::collection::vec;
use proptest::prelude::*;
use torpor_build::{
    Build, BuildId, Entry, Error, FrameCache, ImageKind, OPEN_LAYERS_MAX, PAGE_SIZE, PageContent,
    Run, ValidateOptions,
};

/// What the image must be: each page's bytes (by seed) and the kind that its index must give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ModelPage {
    seed: u64,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Free,
    Removed,
    Zero,
    Stored,
}

const ZERO: ModelPage = ModelPage {
    seed: 0,
    kind: Kind::Zero,
};

/// The reference: plain vectors. Also gives the seeds that this layer must store.
fn model(parent: &[ModelPage], pushes: &[Push]) -> (Vec<ModelPage>, Vec<u64>) {
    let (mut image, mut stored) = (Vec::new(), Vec::new());
    for push in pushes {
        for n in 0..push.len() {
            let of_parent = parent.get(image.len()).copied().unwrap_or(ZERO);
            image.push(match push {
                Push::Parent(_) => of_parent,
                Push::Free(_) => ModelPage {
                    seed: 0,
                    kind: Kind::Free,
                },
                Push::Removed(_) => ModelPage {
                    seed: 0,
                    kind: Kind::Removed,
                },
                Push::Data(seeds) => match seeds[usize::try_from(n).unwrap()] {
                    0 => ZERO,
                    seed => {
                        if seed != of_parent.seed && !stored.contains(&seed) {
                            stored.push(seed);
                        }
                        ModelPage {
                            seed,
                            kind: Kind::Stored,
                        }
                    }
                },
            });
        }
    }
    (image, stored)
}

fn pushes() -> impl Strategy<Value = Vec<Push>> {
    let push = prop_oneof![
        (0..40_u64).prop_map(Push::Parent),
        (1..10_u64).prop_map(Push::Free),
        (1..10_u64).prop_map(Push::Removed),
        // Few seeds, so that pages meet their like in the parent and in the layer.
        vec(0..12_u64, 1..40).prop_map(Push::Data),
    ];
    vec(push, 0..8)
}

fn kind_at(build: &Build, page: usize) -> Kind {
    match build
        .memory()
        .unwrap()
        .index()
        .run_at(page as u64)
        .unwrap()
        .what
    {
        Entry::Free => Kind::Free,
        Entry::Removed => Kind::Removed,
        Entry::Zero => Kind::Zero,
        Entry::Layer { .. } | Entry::BaseImage { .. } => Kind::Stored,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_chain_of_layers_reads_like_the_plain_pages(
        chain in vec(pushes(), 1..5),
        windows in vec((0..200_usize, 1..40_usize), 8),
    ) {
        let storage = storage();
        let mut parent: Option<Build> = None;
        let mut image = Vec::new();
        for pushes in &chain {
            let (next, must_store) = model(&image, pushes);
            image = next;
            let (build, summary) =
                try_store(&storage, BuildId::random(), parent.as_ref(), pushes).unwrap();
            prop_assert_eq!(summary.stored_pages, must_store.len() as u64);
            prop_assert_eq!(summary.raw_bytes, (must_store.len() * PAGE_SIZE) as u64);

            let seeds: Vec<u64> = image.iter().map(|page| page.seed).collect();
            prop_assert!(read_all(&build, ImageKind::Memory).unwrap() == pages(&seeds));
            let reader = build.memory().unwrap();
            for &(first, len) in &windows {
                let Some(part) = seeds.get(first..(first + len).min(seeds.len())) else { continue };
                let mut bytes = vec![0xaa; part.len() * PAGE_SIZE];
                reader.read_pages(first as u64, &mut bytes).unwrap();
                prop_assert!(bytes == pages(part), "pages {first} and on");
            }
            for (number, page) in image.iter().enumerate() {
                prop_assert_eq!(kind_at(&build, number), page.kind, "page {}", number);
            }
            prop_assert!(build.validate(ValidateOptions::default()).is_whole());
            parent = Some(build);
        }
        let mut distinct: Vec<_> = stored_offsets(parent.as_ref().unwrap());
        distinct.sort_unstable();
        distinct.dedup();
        let stats = parent.as_ref().unwrap().stats().unwrap().memory.unwrap();
        prop_assert_eq!(stats.reachable_stored_bytes, (distinct.len() * PAGE_SIZE) as u64);
    }
}

/// Where each stored page of the memory stands, page by page.
fn stored_offsets(build: &Build) -> Vec<(u32, u64)> {
    let reader = build.memory().unwrap();
    (0..reader.len_pages())
        .filter_map(|page| match reader.index().run_at(page).unwrap().what {
            Entry::Layer {
                layer,
                offset_pages,
            } => Some((layer, offset_pages)),
            _ => None,
        })
        .collect()
}

#[test]
fn the_same_bytes_are_stored_once_and_the_parents_not_at_all() {
    let storage = storage();
    let base = store(&storage, None, &[Push::Data(vec![1, 1, 3, 0, 5])]);
    let (_, summary) = try_store(
        &storage,
        BuildId::random(),
        Some(&base),
        // The same, the same, another, zero over data's neighbour, a copy of a page elsewhere.
        &[Push::Data(vec![1, 1, 7, 0, 7])],
    )
    .unwrap();
    assert_eq!(summary.same_as_parent_pages, 2);
    assert_eq!(summary.stored_pages, 1);
    assert_eq!(summary.duplicate_pages, 1);
    assert_eq!(summary.pages.zero, 1);
}

#[test]
fn a_chain_300_deep_reads_right_with_few_files_open() {
    const DEPTH: u64 = 300;
    let storage = storage();
    let mut build = store(&storage, None, &[Push::Data(vec![1; 301])]);
    for depth in 1..=DEPTH {
        // Each layer owns one page of the image for good.
        let pushes = [
            Push::Parent(depth),
            Push::Data(vec![1000 + depth]),
            Push::Parent(DEPTH - depth),
        ];
        build = store(&storage, Some(&build), &pushes);
    }
    let reader = build.memory().unwrap();
    assert_eq!(reader.index().layers().len(), 301);
    let mut bytes = vec![0; PAGE_SIZE];
    for number in (0..=DEPTH).chain((0..=DEPTH).rev()) {
        reader.read_pages(number, &mut bytes).unwrap();
        let seed = if number == 0 { 1 } else { 1000 + number };
        assert!(bytes == page(seed), "page {number}");
        assert!(reader.open_layers() <= OPEN_LAYERS_MAX);
    }
    let all = build.validate(ValidateOptions { recursive: true });
    assert!(all.is_whole(), "{:?}", all.problems);
    assert_eq!(all.builds.len(), 301);
}

#[test]
fn layers_that_no_page_needs_any_more_are_not_named() {
    let storage = storage();
    let base = store(&storage, None, &[Push::Data(vec![1, 3])]);
    let child = store(&storage, Some(&base), &[Push::Data(vec![5, 7])]);
    assert_eq!(child.memory().unwrap().index().layers(), [child.id()]);
}

#[test]
fn a_parent_of_another_length_is_zero_past_its_end() {
    let storage = storage();
    let base = store(&storage, None, &[Push::Data(vec![1, 3])]);
    let longer = store(&storage, Some(&base), &[Push::Parent(4)]);
    assert_eq!(
        read_all(&longer, ImageKind::Memory).unwrap(),
        pages(&[1, 3, 0, 0])
    );
    let shorter = store(&storage, Some(&longer), &[Push::Parent(1)]);
    assert_eq!(read_all(&shorter, ImageKind::Memory).unwrap(), page(1));
}

#[test]
fn parent_without_a_parent_means_zero() {
    let storage = storage();
    let build = store(&storage, None, &[Push::Parent(3)]);
    let runs: Vec<Run> = build.memory().unwrap().index().runs().collect();
    assert_eq!(
        runs,
        [Run {
            first_page: 0,
            pages: 3,
            what: Entry::Zero
        }]
    );
}

#[test]
fn a_large_layer_keeps_its_order_through_the_workers() {
    let storage = storage();
    // 48 MiB, so that every worker's queue is full several times over.
    let seeds: Vec<u64> = (1..=12_288).collect();
    let build = store(&storage, None, &[Push::Data(seeds.clone())]);
    assert!(read_all(&build, ImageKind::Memory).unwrap() == pages(&seeds));
}

#[test]
fn many_threads_may_read_one_image() {
    let storage = storage();
    let seeds: Vec<u64> = (0..400).collect();
    let build = store(&storage, None, &[Push::Data(seeds)]);
    let reader = build.memory().unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let reader = &reader;
            scope.spawn(move || {
                let mut bytes = vec![0; PAGE_SIZE];
                for n in 0..2000_u64 {
                    let number = (n * 7 + thread * 101) % 400;
                    reader.read_pages(number, &mut bytes).unwrap();
                    assert!(bytes == page(number), "page {number}");
                }
            });
        }
    });
}

#[test]
fn a_writer_refuses_what_is_out_of_order_and_goes_on() {
    let storage = storage();
    let staged = storage.begin_build(BuildId::random()).unwrap();
    let mut writer = staged.image_writer(ImageKind::Memory, 3, None).unwrap();
    writer.push(0, 1, PageContent::Data(&page(1))).unwrap();
    let again = writer.push(0, 1, PageContent::Free).unwrap_err();
    assert!(
        matches!(
            again,
            Error::OutOfOrder {
                expected: 1,
                found: 0,
                ..
            }
        ),
        "{again}"
    );
    let too_many = writer.push(1, 3, PageContent::Free).unwrap_err();
    assert!(matches!(too_many, Error::OutOfOrder { .. }), "{too_many}");
    let half = writer
        .push(1, 1, PageContent::Data(&page(1)[1..]))
        .unwrap_err();
    assert!(matches!(half, Error::BadBuffer { pages: 1, .. }), "{half}");
    writer.push(1, 2, PageContent::Removed).unwrap();
    assert_eq!(writer.finish().unwrap().pages.removed, 2);
}

#[test]
fn an_image_with_pages_missing_is_not_finished() {
    let storage = storage();
    let staged = storage.begin_build(BuildId::random()).unwrap();
    let mut writer = staged.image_writer(ImageKind::Memory, 3, None).unwrap();
    writer.push(0, 2, PageContent::Free).unwrap();
    let error = writer.finish().unwrap_err();
    assert!(
        matches!(
            error,
            Error::OutOfOrder {
                expected: 2,
                found: 3,
                ..
            }
        ),
        "{error}"
    );
    let error = staged.commit(common::info(None)).unwrap_err();
    assert!(matches!(error, Error::Unfinished { .. }), "{error}");
}

#[test]
fn reading_past_the_end_or_half_a_page_is_an_error() {
    let storage = storage();
    let build = store(&storage, None, &[Push::Data(vec![1, 3])]);
    let reader = build.memory().unwrap();
    let mut bytes = vec![0; 2 * PAGE_SIZE];
    for first in [1, 2, u64::MAX] {
        let error = reader.read_pages(first, &mut bytes).unwrap_err();
        assert!(
            matches!(error, Error::OutOfBounds { len_pages: 2, .. }),
            "{error}"
        );
    }
    let error = reader.read_pages(0, &mut bytes[1..]).unwrap_err();
    assert!(matches!(error, Error::BadBuffer { .. }), "{error}");
    reader.read_pages(2, &mut []).unwrap();
}

#[test]
fn pages_whose_parent_cannot_be_read_are_stored() {
    let storage = storage();
    let base = store(&storage, None, &[Push::Data(vec![1, 3])]);
    let data = base.path().join("memory.data");
    let mut bytes = std::fs::read(&data).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&data, bytes).unwrap();
    let staged = storage.begin_build(BuildId::random()).unwrap();
    let pushes = [Push::Data(vec![1, 5])];
    let summary = write_image(&staged, ImageKind::Memory, Some(&base), &pushes).unwrap();
    assert_eq!(
        (summary.parent_unreadable_pages, summary.stored_pages),
        (2, 2)
    );
}

#[test]
fn a_walk_along_pages_of_many_layers_decodes_each_frame_once() {
    const LAYERS: u64 = 40;
    const PAGES_OF_EACH: u64 = 16;
    let storage = storage();
    let mut build: Option<Build> = None;
    for layer in 0..LAYERS {
        let pushes: Vec<Push> = (0..PAGES_OF_EACH)
            .flat_map(|turn| {
                let seed = 1 + layer + turn * LAYERS;
                let (before, after) = (layer, LAYERS - 1 - layer);
                [
                    Push::Parent(before),
                    Push::Data(vec![seed]),
                    Push::Parent(after),
                ]
            })
            .filter(|push| push.len() > 0)
            .collect();
        build = Some(store(&storage, build.as_ref(), &pushes));
    }
    let reader = build.unwrap().memory().unwrap();
    assert_eq!(reader.index().layers().len() as u64, LAYERS);
    let walk = FrameCache::for_walk();
    let mut buf = vec![0; PAGE_SIZE];
    for number in 0..LAYERS * PAGES_OF_EACH {
        reader.read_pages_through(&walk, number, &mut buf).unwrap();
        assert!(buf == page(1 + number), "page {number}");
    }
    // Each opened (three frames' worth), and its one frame decoded.
    assert_eq!(walk.cost_frames(), 4 * LAYERS);
}
