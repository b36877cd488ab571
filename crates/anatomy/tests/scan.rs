//! Honest kernels of every shape: exactly their free pages come out.

mod support;

use proptest::prelude::*;
use support::{GIB, Guest, Leaves, MIB, Shape, Style, harness, range};
use torpor_anatomy::{PageClass, PfnRun, PhysicalMemory, RamRange};

fn run(first_pfn: u64, pages: u64) -> PfnRun {
    PfnRun { first_pfn, pages }
}

#[test]
fn a_kernel_without_free_pages_has_none() {
    let guest = Guest::new(Shape::default());
    assert_eq!(guest.find().unwrap().release(), "6.12.1-test");
    let found = guest.scan().unwrap();
    assert_eq!(
        (found.runs, found.buddy_pages, found.balloon_pages),
        (vec![], 0, 0)
    );
}

#[test]
fn neighbouring_blocks_and_balloon_pages_become_one_run() {
    for style in [Style::V6_1, Style::V6_12] {
        let mut guest = Guest::new(Shape {
            style,
            ..Shape::default()
        });
        guest.free_block(0x8000, 3);
        guest.free_block(0x8008, 0);
        guest.balloon(0x8009);
        guest.free_block(0x800c, 2);
        guest.free_block(0x10_0000, 10);
        let found = guest.scan().unwrap();
        let runs = [run(0x8000, 10), run(0x800c, 4), run(0x10_0000, 1024)];
        assert_eq!(found.runs, runs);
        assert_eq!(
            (found.buddy_pages, found.balloon_pages),
            (8 + 1 + 4 + 1024, 1)
        );
    }
}

#[test]
fn what_stands_in_the_entries_inside_a_free_block_does_not_matter() {
    let mut guest = Guest::new(Shape::default());
    guest.free_block(0x8000, 10);
    // Remains of former lives: a larger free block, a balloon page, and nonsense.
    guest.free_block(0x8200, 9);
    guest.set(0x8200, "private", 10);
    guest.free_block(0x8001, 99);
    guest.balloon(0x8002);
    assert_eq!(guest.scan().unwrap().runs, [run(0x8000, 1024)]);
}

#[test]
fn the_last_block_of_a_range_ends_with_it() {
    let mut guest = Guest::new(Shape::default());
    guest.free_block(0x1_0000 - 1024, 10);
    guest.free_block(0x10_8000 - 1, 0);
    let runs = [run(0x1_0000 - 1024, 1024), run(0x10_8000 - 1, 1)];
    assert_eq!(guest.scan().unwrap().runs, runs);
}

#[test]
fn ranges_that_touch_are_read_one_at_a_time() {
    let ram = vec![range(0, 17 * MIB), range(17 * MIB, 111 * MIB)];
    let mut guest = Guest::new(Shape {
        ram,
        ..Shape::default()
    });
    // The array lies across the border; so does this run.
    guest.free_block(17 * 256 - 1, 0);
    guest.free_block(17 * 256, 8);
    assert_eq!(guest.scan().unwrap().runs, [run(17 * 256 - 1, 257)]);
    harness::check(&guest);
}

#[test]
fn memory_that_the_kernel_does_not_know_is_not_free() {
    for names_vmemmap in [false, true] {
        let ram = vec![range(0, 512 * MIB)];
        let absent_sections = vec![1, 3];
        let shape = Shape {
            ram,
            absent_sections,
            names_vmemmap,
            ..Shape::default()
        };
        let mut guest = Guest::new(shape);
        guest.free_block(0x7c00, 10);
        guest.free_block(0x1_0000, 10);
        assert_eq!(
            guest.scan().unwrap().runs,
            [run(0x7c00, 1024), run(0x1_0000, 1024)]
        );
        let census = guest.census().unwrap();
        assert!(census.pages(PageClass::Kernel) >= 2 * 0x8000);
        harness::check(&guest);
    }
}

#[test]
fn free_memory_is_found_without_reading_its_entries() {
    let mut guest = Guest::new(Shape {
        ram: vec![range(0, GIB)],
        ..Shape::default()
    });
    for pfn in (0x1_0000..0x4_0000).step_by(1024) {
        guest.free_block(pfn, 10);
    }
    let found = guest.scan().unwrap();
    assert_eq!(found.buddy_pages, 0x3_0000);
    // A quarter of the array is of memory in use; the rest would be 12 MiB.
    let bytes = found.array_bytes_read;
    assert!((4 * MIB..6 * MIB).contains(&bytes), "{bytes} bytes");
}

#[test]
fn every_page_has_one_class() {
    for style in [Style::V6_1, Style::V6_12] {
        let mut guest = Guest::new(Shape {
            style,
            ..Shape::default()
        });
        guest.free_block(0x8000, 4);
        guest.balloon(0x8010);
        guest.slab(0x8020);
        guest.tails(0x8020, 7);
        guest.anonymous(0x8028);
        guest.cached(0x8029);
        guest.anonymous(0x8200);
        guest.tails(0x8200, 511);
        // Movable pages of drivers, and page tables, are the kernel's.
        guest.set(0x8030, "mapping", 0xffff_8880_0000_0002);
        guest.anonymous(0x8031);
        guest.set_type(0x8031, -234_881_024);
        let census = guest.census().unwrap();
        assert_eq!(census.pages(PageClass::Free), 16);
        assert_eq!(census.pages(PageClass::Balloon), 1);
        assert_eq!(census.pages(PageClass::Slab), 8);
        assert_eq!(census.pages(PageClass::Anonymous), 513);
        assert_eq!(census.pages(PageClass::PageCache), 1);
        let all: u64 = guest.memory.ram().iter().map(|r| r.len_bytes / 4096).sum();
        let counted: u64 = PageClass::ALL.iter().map(|c| census.pages(*c)).sum();
        assert_eq!(counted, all);
        harness::check(&guest);
    }
}

fn shapes() -> impl Strategy<Value = Shape> {
    let ram = prop_oneof![
        Just(vec![range(0, 128 * MIB)]),
        Just(vec![range(0, 640 << 10), range(MIB, 127 * MIB)]),
        Just(vec![range(0, 192 * MIB), range(4 * GIB, 64 * MIB)]),
    ];
    let leaves = prop_oneof![Just(Leaves::Gib1), Just(Leaves::Mib2), Just(Leaves::Kib4)];
    let entry_bytes = prop_oneof![3 => Just(64_u64), 1 => Just(56)];
    let style = prop_oneof![Just(Style::V6_1), Just(Style::V6_12)];
    let slides = (0_u64..400, 0_u64..1000);
    (
        ram,
        leaves,
        entry_bytes,
        style,
        any::<bool>(),
        any::<bool>(),
        slides,
    )
        .prop_map(
            |(ram, leaves, entry_bytes, style, five_levels, names_vmemmap, (text, area))| Shape {
                ram,
                style,
                five_levels,
                leaves,
                entry_bytes,
                names_vmemmap,
                text_slide: text * 2 * MIB,
                area_slide: area * GIB,
                absent_sections: Vec::new(),
            },
        )
}

/// Places blocks one behind the other: gap, order.
fn place(ram: &[RamRange], blocks: &[(u64, u32)]) -> Vec<(u64, u32)> {
    let mut placed = Vec::new();
    let mut blocks = blocks.iter();
    for range in ram {
        let (mut at, end) = (range.addr / 4096, range.end() / 4096);
        for (gap, order) in blocks.by_ref() {
            at = (at + gap).next_multiple_of(1 << order);
            if at + (1 << order) > end {
                break;
            }
            placed.push((at, *order));
            at += 1 << order;
        }
    }
    placed
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn exactly_the_free_pages_come_out(
        shape in shapes(),
        blocks in prop::collection::vec((0_u64..600, 0_u32..=10), 0..200),
    ) {
        let mut guest = Guest::new(shape.clone());
        let placed = place(&shape.ram, &blocks);
        let mut expected = std::collections::BTreeSet::new();
        for (pfn, order) in &placed {
            guest.free_block(*pfn, u64::from(*order));
            expected.extend(*pfn..*pfn + (1 << order));
        }
        let found = guest.scan().unwrap();
        let pages: Vec<u64> = found.runs.iter().flat_map(|r| r.first_pfn..r.end_pfn()).collect();
        prop_assert_eq!(found.buddy_pages, expected.len() as u64);
        prop_assert!(pages.into_iter().eq(expected));
        harness::check(&guest);
    }
}
