//! What holds of any memory whatever: no panic, results inside RAM and well formed, work bounded.
//! Shared by the fuzz target and by a proptest that runs without nightly.

use torpor_anatomy::{FreePages, PageClass, PhysicalMemory};

use super::{GIB, Guest, Leaves, MIB, PAGE, Shape, Style, range};

/// Bytes that decide what kernel is built and what is then overwritten; zeroes when they run out.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn number(&mut self, bytes: usize) -> u64 {
        let (now, later) = self.0.split_at(bytes.min(self.0.len()));
        self.0 = later;
        now.iter().fold(0, |n, byte| n << 8 | u64::from(*byte))
    }

    fn below(&mut self, end: u64) -> u64 {
        self.number(4) % end
    }

    fn one_of<'b, T>(&mut self, all: &'b [T]) -> &'b T {
        let n = self.number(4).to_le_bytes();
        &all[usize::from(u16::from_le_bytes([n[0], n[1]])) % all.len()]
    }
}

/// Builds a kernel, spoils it, and looks at it.
pub fn run(input: &[u8]) {
    let mut choices = Choices(input);
    let mut guest = Guest::new(shape(&mut choices));
    for pfn in (0x4000..0x8000).step_by(1024) {
        guest.free_block(pfn, choices.below(11));
    }
    let written_at = guest.note.addr;
    let mut said = written_at;
    while !choices.0.is_empty() {
        spoil(&mut guest, &mut choices);
        if guest.note.addr != written_at {
            said = std::mem::replace(&mut guest.note.addr, written_at);
        }
    }
    guest.note.addr = said;
    check(&guest);
}

fn shape(choices: &mut Choices<'_>) -> Shape {
    let bits = choices.number(1);
    Shape {
        ram: vec![range(0, 128 * MIB), range(4 * GIB, 4 * MIB)],
        style: if bits & 1 == 0 {
            Style::V6_12
        } else {
            Style::V6_1
        },
        five_levels: bits & 2 != 0,
        leaves: if bits & 4 == 0 {
            Leaves::Mib2
        } else {
            Leaves::Kib4
        },
        entry_bytes: if bits & 8 == 0 { 64 } else { 56 },
        names_vmemmap: bits & 16 != 0,
        ..Shape::default()
    }
}

/// Values that hit limits more often than chance would.
fn value(choices: &mut Choices<'_>, guest: &Guest) -> u64 {
    match choices.number(1) % 8 {
        0 => choices.number(8),
        1 => choices.number(1),
        2 => u64::MAX - choices.number(1),
        // A table that points at a table, or at itself.
        3 => choices.one_of(&guest.tables) | 0x63,
        4 => guest.vmemmap.wrapping_add(choices.number(4)),
        5 => choices.below(5 << 30) & !(PAGE - 1) | 0xe3,
        6 => u64::from(guest.marks.buddy.cast_unsigned()),
        _ => 1 << choices.below(64),
    }
}

fn spoil(guest: &mut Guest, choices: &mut Choices<'_>) {
    match choices.number(1) % 6 {
        // A line of the note: another value, gone, or twice.
        0 => {
            let lines: Vec<usize> = (0..guest.lines.len()).collect();
            let line = *choices.one_of(&lines);
            let value = value(choices, guest);
            guest.lines[line].1 = match choices.number(1) % 3 {
                0 => value.to_string(),
                1 => format!("{value:x}"),
                _ => value.cast_signed().to_string(),
            };
            guest.write_note();
        }
        // Any byte of it.
        1 => {
            let at = guest.note.addr + choices.below(1200);
            let byte = choices.number(1).to_le_bytes()[0];
            guest.memory.write(at, &[byte]);
        }
        2 => {
            let table = *choices.one_of(&guest.tables);
            let entry = table + choices.below(512) * 8;
            let value = value(choices, guest);
            guest.memory.write_u64(entry, value);
        }
        3 => {
            let page = if choices.number(1) < 128 {
                guest.roots
            } else {
                guest.sections
            };
            let value = value(choices, guest);
            guest.memory.write_u64(page + choices.below(64) * 8, value);
        }
        4 => {
            let names = ["flags", "lru", "mapping", "private", "_mapcount"];
            let name = choices.one_of(&names);
            let value = value(choices, guest);
            guest.set(choices.below(0x8000), name, value);
        }
        _ => guest.note.addr = value(choices, guest),
    }
}

/// Looks at it in both ways.
pub fn check(guest: &Guest) {
    let memory = &guest.memory;
    let gibs = memory
        .ram()
        .iter()
        .map(|r| r.len_bytes)
        .sum::<u64>()
        .div_ceil(GIB);
    let ranges = memory.ram().len() as u64;
    let work = || (memory.reads.take(), memory.bytes.take());
    work();
    let found = guest.find();
    let (reads, bytes) = work();
    assert!(reads <= 64 * (gibs + ranges), "find: {reads} reads");
    assert!(bytes <= 4096 * reads + 4096, "find: {bytes} bytes");
    let Ok(kernel) = found else { return };
    let free = kernel.free_pages(memory);
    let free_work = work();
    let census = kernel.census(memory);
    for (reads, bytes) in [free_work, work()] {
        assert!(reads <= 1536 * gibs + 4 * ranges, "{reads} reads");
        assert!(bytes <= 16 * MIB * gibs, "{bytes} bytes");
    }
    // Both say no at the same entry, or both agree.
    assert_eq!(free.is_ok(), census.is_ok());
    let (Ok(free), Ok(census)) = (free, census) else {
        return;
    };
    check_runs(guest, &free);
    assert_eq!(census.pages(PageClass::Free), free.buddy_pages);
    assert_eq!(census.pages(PageClass::Balloon), free.balloon_pages);
    let mut runs = census.runs.iter();
    let mut run = (0, 0);
    for range in memory.ram() {
        let mut at = range.addr / PAGE;
        while at < range.end() / PAGE {
            if run.1 == 0 {
                let next = runs.next().expect("all RAM is covered");
                run = (next.first_pfn, next.pages);
            }
            assert_eq!(run.0, at, "no page is left out or comes twice");
            let here = run.1.min(range.end() / PAGE - at);
            at += here;
            run = (at, run.1 - here);
        }
    }
    assert_eq!((run.1, runs.next()), (0, None));
}

fn check_runs(guest: &Guest, free: &FreePages) {
    let mut end = None;
    for run in &free.runs {
        assert!(
            run.pages > 0 && end.is_none_or(|end| run.first_pfn > end),
            "coalesced, in order"
        );
        end = Some(run.end_pfn());
        let ram = &guest.memory.ram();
        let covers = |at: u64| {
            ram.iter()
                .any(|r| r.addr <= at * PAGE && at * PAGE < r.end())
        };
        assert!(covers(run.first_pfn) && covers(run.end_pfn() - 1));
    }
    assert_eq!(free.runs.iter().map(|r| r.pages).sum::<u64>(), free.pages());
}
