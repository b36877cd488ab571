//! A guest that lies: every lie is refused for its own reason, without a panic and at a bounded cost.

mod support;

use proptest::prelude::*;
use support::{GIB, Guest, Leaves, MIB, Shape, Style, harness, range};
use torpor_anatomy::{AnatomyError, GuestKernel, NoteLocation, PhysicalMemory, RAM_RANGES_MAX};

fn guest() -> Guest {
    let mut guest = Guest::new(Shape::default());
    guest.free_block(0x8000, 10);
    guest
}

macro_rules! refused {
    ($guest:expr, $pattern:pat) => {
        let error = $guest.refused();
        assert!(matches!(error, $pattern), "{error}");
        harness::check(&$guest);
    };
}

#[test]
fn a_note_outside_ram_or_that_is_none_is_refused() {
    for addr in [u64::MAX, u64::MAX - 4095, 3 * GIB, 256 * MIB - 8] {
        let mut guest = guest();
        guest.note.addr = addr;
        refused!(guest, AnatomyError::OutsideRam { .. });
    }
    let mut guest = guest();
    guest.note.addr += 4;
    refused!(guest, AnatomyError::NotANote { .. });
}

#[test]
fn a_note_may_be_longer_than_a_page_but_not_than_two() {
    let mut guest = guest();
    guest.add("SYMBOL(something)", "f".repeat(5000));
    assert_eq!(guest.scan().unwrap().buddy_pages, 1024);
    guest.add("SYMBOL(more)", "f".repeat(2500));
    refused!(guest, AnatomyError::NotANote { .. });
    guest
        .memory
        .write(guest.note.addr + 4, &u32::MAX.to_le_bytes());
    refused!(guest, AnatomyError::NotANote { .. });
}

#[test]
fn a_note_that_ends_with_ram_is_read() {
    let mut guest = guest();
    guest.note.addr = 256 * MIB - 4096;
    guest.write_note();
    assert_eq!(guest.scan().unwrap().buddy_pages, 1024);
}

#[test]
fn a_needed_line_that_is_missing_or_comes_twice_is_named() {
    let keys = [
        "OSRELEASE",
        "PAGESIZE",
        "SYMBOL(swapper_pg_dir)",
        "NUMBER(phys_base)",
        "SYMBOL(mem_section)",
        "LENGTH(mem_section)",
        "SIZE(mem_section)",
        "OFFSET(mem_section.section_mem_map)",
        "NUMBER(SECTION_SIZE_BITS)",
        "SIZE(page)",
        "OFFSET(page.flags)",
        "OFFSET(page.mapping)",
        "OFFSET(page.private)",
        "OFFSET(page._mapcount)",
        "OFFSET(page._refcount)",
        "OFFSET(page.compound_head)",
        "NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)",
    ];
    for expected in keys {
        let mut without = guest();
        without.forget(expected);
        let error = without.refused();
        assert!(
            matches!(error, AnatomyError::KeyMissing { key } if key == expected),
            "{error}"
        );
        let mut twice = guest();
        twice.add(expected, "1");
        let error = twice.refused();
        assert!(
            matches!(error, AnatomyError::KeyTwice { key } if key == expected),
            "{error}"
        );
    }
}

#[test]
fn values_that_no_kernel_has_are_refused() {
    let lies = [
        ("OSRELEASE", "6.12 \u{1b}[2J"),
        ("OSRELEASE", ""),
        ("PAGESIZE", "65536"),
        ("SYMBOL(swapper_pg_dir)", "-1"),
        ("NUMBER(phys_base)", "much"),
        ("NUMBER(sme_mask)", "140737488355328"),
        ("SIZE(page)", "0"),
        ("SIZE(page)", "60"),
        ("SIZE(page)", "72"),
        ("SIZE(page)", "18446744073709551615"),
        ("OFFSET(page.private)", "60"),
        ("OFFSET(page.private)", "18446744073709551608"),
        ("OFFSET(page._mapcount)", "49"),
        ("NUMBER(SECTION_SIZE_BITS)", "12"),
        ("NUMBER(SECTION_SIZE_BITS)", "64"),
        ("SIZE(mem_section)", "24"),
        ("OFFSET(mem_section.section_mem_map)", "16"),
        ("NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)", "-1"),
        ("NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)", "0"),
        ("NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)", "-251658240"),
    ];
    for (name, value) in lies {
        let mut guest = guest();
        guest.say(name, value);
        let error = guest.refused();
        assert!(
            matches!(error, AnatomyError::KeyValue { key, .. } if key == name),
            "{error}"
        );
    }
}

#[test]
fn addresses_that_are_not_the_kernels_are_refused() {
    for vaddr in ["0", "7fffffffffff", "ffff000000000000", "800000000000"] {
        let mut guest = guest();
        guest.say("SYMBOL(mem_section)", vaddr);
        refused!(guest, AnatomyError::NotKernelAddress { .. });
    }
    // Mapped with five levels, no kernel address with four.
    let mut guest = guest();
    guest.say("SYMBOL(mem_section)", "ff11000000000000");
    refused!(guest, AnatomyError::NotKernelAddress { .. });
    // Runs over the end of the address space.
    guest.say("SYMBOL(mem_section)", "fffffffffffffff8");
    refused!(guest, AnatomyError::NotMapped { .. });
}

#[test]
fn tables_outside_ram_are_refused() {
    let mut guest = guest();
    guest.say("NUMBER(phys_base)", i64::MIN);
    refused!(guest, AnatomyError::OutsideRam { .. });
    let mut guest = Guest::new(Shape::default());
    for entry in 0..512 {
        guest
            .memory
            .write_u64(guest.top_table + entry * 8, (3 * GIB) | 0x63);
    }
    refused!(
        guest,
        AnatomyError::OutsideRam {
            what: "page table",
            ..
        }
    );
}

#[test]
fn an_array_that_is_not_mapped_or_not_in_ram_is_refused() {
    let mut unmapped = guest();
    let vmemmap = unmapped.vmemmap;
    unmapped.map(vmemmap, 0, 2);
    let entry = *unmapped
        .tables
        .iter()
        .find(|table| unmapped.memory.read_u64(**table) & 0x80 != 0)
        .unwrap();
    unmapped.memory.write_u64(entry, 0);
    refused!(unmapped, AnatomyError::NotMapped { level: 2, .. });
    let mut outside = guest();
    outside.map(vmemmap, 3 * GIB, 2);
    refused!(
        outside,
        AnatomyError::OutsideRam {
            what: "page array",
            ..
        }
    );
}

#[test]
fn tables_that_point_at_themselves_end_the_walk() {
    for five_levels in [false, true] {
        let mut guest = Guest::new(Shape {
            five_levels,
            ..Shape::default()
        });
        for table in guest.tables.clone() {
            for entry in 0..512 {
                guest
                    .memory
                    .write_u64(table + entry * 8, guest.top_table | 0x63);
            }
        }
        // Every address is then the top table itself, read as whatever is asked for.
        harness::check(&guest);
        assert!(guest.scan().is_err());
    }
}

#[test]
fn the_two_ways_to_the_array_must_agree() {
    let mut guest = guest();
    let lie = format!("{:x}", guest.vmemmap + 4096);
    guest.say("SYMBOL(vmemmap)", lie);
    refused!(guest, AnatomyError::Disagree { section: 0, .. });
    let mut other = Guest::new(Shape::default());
    let moved = other.vmemmap + 4096;
    other
        .memory
        .write_u64(other.sections + 32 * 16, moved | 0x1f);
    refused!(other, AnatomyError::Disagree { section: 32, .. });
}

#[test]
fn more_ram_than_the_kernel_has_sections_is_refused() {
    let mut guest = guest();
    guest.say("LENGTH(mem_section)", 0);
    refused!(guest, AnatomyError::SectionNumber { section: 0, max: 0 });
}

#[test]
fn an_array_in_too_many_places_is_refused() {
    let leaves = Leaves::Scattered;
    let guest = Guest::new(Shape {
        leaves,
        ..Shape::default()
    });
    refused!(guest, AnatomyError::Scattered { max: 128 });
}

#[test]
fn a_free_block_that_contradicts_itself_refuses_the_whole_scan() {
    type Lie = fn(&mut Guest);
    let lies: [(&str, Lie); 7] = [
        ("order is over 10", |g| g.free_block(0x8800, 11)),
        ("order is over 10", |g| g.free_block(0x8800, u64::MAX)),
        ("not aligned", |g| g.free_block(0x8801, 1)),
        ("reaches beyond", |g| g.free_block(0xfc00, 10)),
        ("reference", |g| {
            g.free_block(0x8800, 0);
            let refcount = g.field(0x8800, "_refcount");
            g.memory.write(refcount, &1_u32.to_le_bytes());
        }),
        ("compound", |g| {
            g.free_block(0x8800, 0);
            g.set(0x8800, "compound_head", g.vmemmap | 1);
        }),
        ("slab", |g| {
            g.free_block(0x8800, 0);
            g.set(0x8800, "flags", g.marks.slab_flag);
        }),
    ];
    for (reason, lie) in lies {
        let mut guest = Guest::new(Shape {
            ram: vec![range(0, 254 * MIB)],
            style: Style::V6_1,
            ..Shape::default()
        });
        guest.free_block(0x8000, 10);
        lie(&mut guest);
        let error = guest.refused();
        assert!(matches!(error, AnatomyError::FreeBlock { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains(reason), "{text}");
        harness::check(&guest);
    }
}

#[test]
fn memory_that_cannot_be_read_is_an_error_that_names_the_place() {
    let mut guest = guest();
    guest.memory.broken = Some(guest.field(0x8000, "flags") / 4096);
    let error = guest.refused();
    assert!(matches!(error, AnatomyError::Read { .. }), "{error}");
    assert!(error.to_string().contains("a broken page"));
}

#[test]
fn ranges_of_ram_are_checked() {
    let lists = [
        vec![],
        vec![range(0, 0)],
        vec![range(1, 4096)],
        vec![range(0, 4097)],
        vec![range(MIB, MIB), range(0, MIB)],
        vec![range(0, 2 * MIB), range(MIB, MIB)],
        vec![range(4096, u64::MAX - 4095)],
        (0..=RAM_RANGES_MAX as u64)
            .map(|n| range(n * 8192, 4096))
            .collect(),
    ];
    for ram in lists {
        let memory = Ranges(ram);
        let note = NoteLocation {
            addr: 0,
            len_bytes: 0,
        };
        let error = GuestKernel::find(&memory, note).unwrap_err();
        assert!(matches!(error, AnatomyError::Ram { .. }), "{error}");
    }
    let kernel = guest().find().unwrap();
    let other = Ranges(vec![range(0, MIB)]);
    assert!(matches!(
        kernel.free_pages(&other),
        Err(AnatomyError::Ram { .. })
    ));
}

struct Ranges(Vec<torpor_anatomy::RamRange>);

impl PhysicalMemory for Ranges {
    fn ram(&self) -> &[torpor_anatomy::RamRange] {
        &self.0
    }

    fn read(&self, _: u64, _: &mut [u8]) -> std::io::Result<()> {
        unreachable!("nothing is read");
    }
}

#[test]
fn what_the_guest_says_of_its_note_is_parsed_strictly() {
    let parse = |text: &str| text.parse::<NoteLocation>().ok();
    let location = NoteLocation {
        addr: 0x487_e000,
        len_bytes: 0x1024,
    };
    assert_eq!(parse("0x000000000487e000 1024\n"), Some(location));
    assert_eq!(parse("487e000 1024"), Some(location));
    for text in [
        "",
        "1",
        "1 2 3",
        "-1 2",
        "+1 2",
        "0x 2",
        "g 2",
        "11112222333344445 1",
    ] {
        assert_eq!(parse(text), None, "{text}");
    }
    let json = serde_json::to_string(&location).unwrap();
    assert_eq!(
        serde_json::from_str::<NoteLocation>(&json).unwrap(),
        location
    );
}

/// The pattern that makes most reads, and the one that makes most runs.
#[test]
fn the_most_expensive_arrays_stay_within_the_bound() {
    for entry_bytes in [56, 64] {
        let ram = vec![range(0, GIB)];
        let mut guest = Guest::new(Shape {
            ram,
            entry_bytes,
            ..Shape::default()
        });
        for pfn in (0x1_0000..0x4_0000).step_by(256) {
            guest.free_block(pfn, 8);
        }
        harness::check(&guest);
        for pfn in (0x1_0000..0x4_0000).step_by(2) {
            guest.free_block(pfn, 0);
        }
        harness::check(&guest);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn whatever_the_guest_writes_costs_little_and_breaks_nothing(
        input in prop::collection::vec(any::<u8>(), 0..120),
    ) {
        harness::run(&input);
    }
}
