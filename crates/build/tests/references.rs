//! Pages that are copies of the base image's blocks become references, and read as before.
#![allow(missing_docs, clippy::unwrap_used, reason = "test code")]

mod common;

use std::sync::{Arc, Barrier};

use common::{
    Push, block_index_path, import, info, page, pages, read_all, storage, store_referring,
    write_image, write_referring_image,
};
use proptest::collection::vec;
use proptest::prelude::*;
use torpor_build::{
    BaseImage, Build, BuildId, BuildInfo, Digest, Entry, Error, ImageKind, IndexBuilder,
    LayerSummary, PAGE_SIZE, PageContent, Run, Storage, ValidateOptions,
};

fn runs(build: &Build) -> Vec<Run> {
    build.memory().unwrap().index().runs().collect()
}

fn reference(first_page: u64, pages: u64, block: u64) -> Run {
    let what = Entry::BaseImage { block };
    Run {
        first_page,
        pages,
        what,
    }
}

fn memory_is(build: &Build, seeds: &[u64]) -> bool {
    read_all(build, ImageKind::Memory).unwrap() == pages(seeds)
}

/// What a page must be, and what it must be recorded as.
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
    BaseImage,
}

#[derive(Debug, Default)]
struct Expected {
    image: Vec<ModelPage>,
    summary: LayerSummary,
}

/// The reference: plain vectors, one page at a time.
fn model(parent: &[ModelPage], base_image: &[u64], pushes: &[Push]) -> Expected {
    let zero = |kind| ModelPage { seed: 0, kind };
    let mut expected = Expected::default();
    let mut stored: Vec<u64> = Vec::new();
    let pushed = pushes.iter().flat_map(|push| {
        (0..usize::try_from(push.len()).unwrap()).map(move |position| (push, position))
    });
    for (number, (push, position)) in pushed.enumerate() {
        let of_parent = parent.get(number).copied().unwrap_or(zero(Kind::Zero));
        let summary = &mut expected.summary;
        expected.image.push(match push {
            Push::Parent(_) => of_parent,
            Push::Free(_) => zero(Kind::Free),
            Push::Removed(_) => zero(Kind::Removed),
            Push::Data(seeds) => match seeds[position] {
                0 => zero(Kind::Zero),
                seed if seed == of_parent.seed => {
                    summary.same_as_parent_pages += 1;
                    of_parent
                }
                seed if base_image.contains(&seed) => {
                    summary.base_image_pages += 1;
                    let kind = Kind::BaseImage;
                    ModelPage { seed, kind }
                }
                seed => {
                    if stored.contains(&seed) {
                        summary.duplicate_pages += 1;
                    } else {
                        stored.push(seed);
                        summary.stored_pages += 1;
                    }
                    let kind = Kind::Stored;
                    ModelPage { seed, kind }
                }
            },
        });
    }
    expected
}

fn pushes() -> impl Strategy<Value = Vec<Push>> {
    let push = prop_oneof![
        (0..40_u64).prop_map(Push::Parent),
        (1..10_u64).prop_map(Push::Free),
        (1..10_u64).prop_map(Push::Removed),
        // Few seeds, so that pages meet their like everywhere.
        vec(0..16_u64, 1..90).prop_map(Push::Data),
        // Long stretches of the image.
        (1..8_u64, 1..80_u64).prop_map(|(from, len)| {
            Push::Data((from..from + len).map(|seed| 1 + seed % 12).collect())
        }),
    ];
    vec(push, 0..6)
}

/// Every page of the build is what the model says, in bytes and in kind.
fn check(build: &Build, expected: &Expected, base_image: &[u64]) -> Result<(), TestCaseError> {
    let seeds: Vec<u64> = expected.image.iter().map(|page| page.seed).collect();
    prop_assert!(memory_is(build, &seeds));
    let reader = build.memory().unwrap();
    let mut blocks = Vec::new();
    for (number, page) in (0..).zip(&expected.image) {
        let kind = match reader.index().run_at(number).unwrap().what {
            Entry::Free => Kind::Free,
            Entry::Removed => Kind::Removed,
            Entry::Zero => Kind::Zero,
            Entry::Layer { .. } => Kind::Stored,
            Entry::BaseImage { block } => {
                prop_assert_eq!(base_image[usize::try_from(block).unwrap()], page.seed);
                blocks.push(block);
                Kind::BaseImage
            }
        };
        prop_assert_eq!(kind, page.kind, "page {}", number);
    }
    let of_image = reader.stats().unwrap().base_image;
    prop_assert_eq!(of_image.is_some(), !blocks.is_empty());
    if let Some(of_image) = of_image {
        prop_assert_eq!(of_image.pages, blocks.len() as u64);
        blocks.sort_unstable();
        blocks.dedup();
        prop_assert_eq!(of_image.distinct_blocks, blocks.len() as u64);
    }
    let found = build.validate(ValidateOptions::default());
    prop_assert!(found.is_whole(), "{:?}", found.problems);
    prop_assert_eq!(found.blocks, blocks.len() as u64);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_chain_of_layers_on_a_base_image_reads_like_the_plain_pages(
        base_image in vec(0..12_u64, 0..60),
        tail_bytes in 0..PAGE_SIZE,
        chain in vec(pushes(), 1..4),
    ) {
        let storage = storage();
        let image = import(&storage, &base_image, &page(1)[..tail_bytes]);
        prop_assert_eq!(image.len_blocks(), base_image.len() as u64);
        let mut parent: Option<Build> = None;
        let mut before = Expected::default();
        for pushes in &chain {
            let expected = model(&before.image, &base_image, pushes);
            let (build, found) = store_referring(&storage, parent.as_ref(), &image, pushes);
            let counts = |s: &LayerSummary| {
                (s.same_as_parent_pages, s.base_image_pages, s.duplicate_pages, s.stored_pages)
            };
            prop_assert_eq!(counts(&found), counts(&expected.summary));
            check(&build, &expected, &base_image)?;
            (parent, before) = (Some(build), expected);
        }
    }
}

#[test]
fn copies_of_blocks_that_follow_one_another_are_one_run() {
    let storage = storage();
    // The blocks 1 and 4 are equal, as are 2 and 5.
    let image = import(&storage, &[1, 3, 5, 7, 3, 5, 9], b"");
    let memory = [Push::Data(vec![3, 5, 7, 7, 3, 5, 9])];
    let (build, summary) = store_referring(&storage, None, &image, &memory);
    assert_eq!((summary.base_image_pages, summary.stored_pages), (7, 0));
    assert_eq!((summary.pages.base_image, summary.raw_bytes), (7, 0));
    assert_eq!(runs(&build), [reference(0, 3, 1), reference(3, 4, 3)]);
    assert!(memory_is(&build, &[3, 5, 7, 7, 3, 5, 9]));
}

#[test]
fn a_large_image_of_references_and_data_keeps_its_order() {
    let storage = storage();
    let blocks: Vec<u64> = (1..=2000).collect();
    let image = import(&storage, &blocks, b"");
    // Longer than a window, by no round number; every third page is no copy.
    let seeds: Vec<u64> = (1..=2999)
        .map(|n| if n % 3 == 0 { 10_000 + n } else { 1 + n % 2000 })
        .collect();
    let memory = [Push::Free(5), Push::Data(seeds.clone())];
    let (build, summary) = store_referring(&storage, None, &image, &memory);
    assert_eq!(
        (summary.base_image_pages, summary.stored_pages),
        (2000, 999)
    );
    assert!(memory_is(&build, &[&[0; 5][..], &seeds].concat()));
}

#[test]
fn a_page_that_changes_and_changes_back_is_a_reference_again() {
    let storage = storage();
    let image = import(&storage, &[2, 4, 6], b"");
    let (first, _) = store_referring(&storage, None, &image, &[Push::Data(vec![4, 11])]);
    let (second, summary) =
        store_referring(&storage, Some(&first), &image, &[Push::Data(vec![9, 11])]);
    assert_eq!((summary.stored_pages, summary.same_as_parent_pages), (1, 1));
    let (third, summary) =
        store_referring(&storage, Some(&second), &image, &[Push::Data(vec![4, 11])]);
    assert_eq!((summary.base_image_pages, summary.stored_pages), (1, 0));
    assert_eq!(runs(&third)[0], reference(0, 1, 1));
    for (build, seeds) in [(&first, [4, 11]), (&second, [9, 11]), (&third, [4, 11])] {
        assert!(memory_is(build, &seeds));
    }
    let all = third.validate(ValidateOptions { recursive: true });
    assert!(all.is_whole(), "{:?}", all.problems);
}

#[test]
fn the_parents_references_are_inherited_by_every_child_even_one_that_makes_none() {
    let storage = storage();
    let image = import(&storage, &[2, 4, 6, 8], b"");
    let memory = [Push::Data(vec![4, 6, 8, 11])];
    let (parent, _) = store_referring(&storage, None, &image, &memory);
    for pushes in [
        vec![Push::Parent(4)],
        // Equal bytes are the parent's entry, before anything else is asked.
        vec![Push::Data(vec![4, 6, 8, 11])],
        vec![Push::Parent(1), Push::Data(vec![6, 8]), Push::Parent(1)],
    ] {
        let staged = storage.begin_build(BuildId::random()).unwrap();
        let summary = write_image(&staged, ImageKind::Memory, Some(&parent), &pushes).unwrap();
        assert_eq!((summary.stored_pages, summary.base_image_pages), (0, 0));
        let info = BuildInfo {
            base_image: Some(image.digest()),
            ..info(Some(&parent))
        };
        let child = staged.commit(info).unwrap();
        assert_eq!(runs(&child), runs(&parent));
        assert!(memory_is(&child, &[4, 6, 8, 11]));
    }
}

#[test]
fn blocks_of_zeros_and_a_part_of_a_block_are_never_referred_to() {
    let storage = storage();
    let image = import(&storage, &[0, 2], &page(4)[..PAGE_SIZE - 1]);
    assert_eq!(image.len_blocks(), 2);
    for (seed, block) in [(0, None), (2, Some(1)), (4, None)] {
        let page = page(seed);
        assert_eq!(image.find(&page, &Digest::of(&page)), block, "{seed}");
    }
    let error = image.read_blocks(2, &mut [0; PAGE_SIZE]).unwrap_err();
    assert!(matches!(error, Error::OutOfBounds { .. }), "{error}");
    let (_, summary) = store_referring(&storage, None, &image, &[Push::Data(vec![0, 2, 4])]);
    assert_eq!((summary.pages.zero, summary.base_image_pages), (1, 1));
    assert_eq!(summary.stored_pages, 1);
}

#[test]
fn equal_hashes_alone_make_no_reference() {
    let storage = storage();
    let image = import(&storage, &[2, 4], b"");
    // As if another page had the hash of block 1.
    assert_eq!(image.find(&page(6), &Digest::of(&page(4))), None);
}

#[test]
fn an_image_of_no_block_at_all_has_nothing_to_refer_to() {
    let storage = storage();
    for tail in [&b""[..], b"short"] {
        let image = import(&storage, &[], tail);
        let (build, summary) = store_referring(&storage, None, &image, &[Push::Data(vec![2])]);
        assert_eq!((summary.base_image_pages, summary.stored_pages), (0, 1));
        assert!(memory_is(&build, &[2]));
    }
}

#[test]
fn a_build_that_was_not_told_to_refer_stores_its_pages() {
    let storage = storage();
    let image = import(&storage, &[2, 4], b"");
    let staged = storage.begin_build(BuildId::random()).unwrap();
    let memory = [Push::Data(vec![2, 4])];
    let summary = write_image(&staged, ImageKind::Memory, None, &memory).unwrap();
    assert_eq!((summary.stored_pages, summary.base_image_pages), (2, 0));
    let info = BuildInfo {
        base_image: Some(image.digest()),
        ..BuildInfo::default()
    };
    let build = staged.commit(info).unwrap();
    assert_eq!(build.memory().unwrap().referred_image(), None);
}

#[test]
fn references_to_another_base_image_than_the_builds_are_refused() {
    let storage = storage();
    let image = import(&storage, &[2, 4], b"");
    let other = import(&storage, &[2, 4, 6], b"");
    let (parent, _) = store_referring(&storage, None, &image, &[Push::Data(vec![2])]);
    let mismatch = |error: Error| {
        let names = error.to_string().contains(&image.digest().to_string());
        assert!(
            matches!(error, Error::BaseImageMismatch { .. }) && names,
            "{error}"
        );
    };
    let staged = storage.begin_build(BuildId::random()).unwrap();
    let reader = Arc::new(parent.memory().unwrap());
    let mut writer = staged
        .image_writer(ImageKind::Memory, 1, Some(reader))
        .unwrap();
    mismatch(writer.refer_to(Arc::clone(&other)).unwrap_err());
    writer.refer_to(Arc::clone(&image)).unwrap();
    mismatch(writer.refer_to(Arc::clone(&other)).unwrap_err());
    // The parent's references, and no base image or another one in the manifest.
    writer.push(0, 1, PageContent::Parent).unwrap();
    writer.finish().unwrap();
    mismatch(staged.commit(info(Some(&parent))).unwrap_err());
    let staged = storage.begin_build(BuildId::random()).unwrap();
    let memory = [Push::Data(vec![4])];
    write_referring_image(&staged, ImageKind::Memory, None, Some(&image), &memory).unwrap();
    let info = BuildInfo {
        base_image: Some(other.digest()),
        ..BuildInfo::default()
    };
    mismatch(staged.commit(info).unwrap_err());
}

#[test]
fn an_index_that_names_blocks_past_the_images_end_is_refused() {
    let storage = storage();
    let image = import(&storage, &[2, 4, 6], b"");
    let (build, _) = store_referring(&storage, None, &image, &[Push::Data(vec![4, 6])]);
    let path = build.path().join("memory.index");
    let refer_to = |block| {
        let mut index = IndexBuilder::new(build.id(), ImageKind::Memory);
        index.append(2, Entry::BaseImage { block }).unwrap();
        std::fs::write(&path, index.finish().encode().unwrap()).unwrap();
    };
    refer_to(1);
    assert!(memory_is(&build, &[4, 6]));
    for past_the_end in [2, (1 << 56) - 4] {
        refer_to(past_the_end);
        let error = build.memory().unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
        assert!(error.contains("holds 3 blocks"), "{error}");
    }
}

#[test]
fn a_report_of_an_older_version_knows_no_base_image_pages() {
    let summary = LayerSummary {
        duplicate_pages: 3,
        base_image_pages: 5,
        ..LayerSummary::default()
    };
    let mut json = serde_json::to_value(summary).unwrap();
    json.as_object_mut().unwrap().remove("base_image_pages");
    let older: LayerSummary = serde_json::from_value(json).unwrap();
    assert_eq!((older.duplicate_pages, older.base_image_pages), (3, 0));
}

#[test]
fn an_older_storage_gets_its_index_when_the_image_is_first_referred_to() {
    let storage = storage();
    let digest = import(&storage, &[2, 4, 6], b"").digest();
    let index = block_index_path(&storage, &digest);
    let original = std::fs::read(&index).unwrap();
    std::fs::remove_dir_all(storage.root().join("block-indexes")).unwrap();
    let reopened = Storage::open(storage.root()).unwrap();
    let image = reopened.base_image(&digest).unwrap();
    let (build, summary) = store_referring(&reopened, None, &image, &[Push::Data(vec![4])]);
    assert_eq!(summary.base_image_pages, 1);
    assert_eq!(std::fs::read(&index).unwrap(), original);
    // And where one is read, and by an import of an image that is there already.
    std::fs::remove_file(&index).unwrap();
    assert!(memory_is(&build, &[4]));
    assert_eq!(std::fs::read(&index).unwrap(), original);
    std::fs::remove_file(&index).unwrap();
    drop(import(&storage, &[2, 4, 6], b""));
    assert_eq!(std::fs::read(&index).unwrap(), original);
}

#[test]
fn many_may_import_and_open_one_image_at_once() {
    const RIVALS: usize = 8;
    let storage = storage();
    let seeds: Vec<u64> = (0..600).collect();
    let path = storage.dir.path().join("base image");
    std::fs::write(&path, pages(&seeds)).unwrap();
    let digest = Digest::of(&pages(&seeds));
    let start = Barrier::new(RIVALS);
    let check = |image: &BaseImage| {
        for (seed, block) in [(1, Some(1)), (599, Some(599)), (600, None)] {
            let page = page(seed);
            assert_eq!(image.find(&page, &Digest::of(&page)), block);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..RIVALS {
            scope.spawn(|| {
                start.wait();
                assert_eq!(storage.import_image(&path).unwrap(), digest);
                check(&storage.base_image(&digest).unwrap());
            });
        }
    });
    std::fs::remove_file(block_index_path(&storage, &digest)).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..RIVALS {
            scope.spawn(|| {
                start.wait();
                check(&storage.base_image(&digest).unwrap());
            });
        }
    });
    assert_eq!(common::names_in(&storage, "images").len(), 1);
    assert_eq!(common::names_in(&storage, "block-indexes").len(), 1);
    assert!(common::names_in(&storage, "staging").is_empty());
}
