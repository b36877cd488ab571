//! A synthetic guest kernel: note, page tables, memory sections and page array laid out in a sparse
//! memory, the way Linux lays them out. Everything in it can be made a lie afterwards.

#![allow(dead_code, reason = "each test program uses another part of it")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's own mistake ends it"
)]
#![allow(
    unreachable_pub,
    reason = "shared by several test programs and the fuzz target"
)]

pub mod harness;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;

use torpor_anatomy::{
    AnatomyError, Census, FreePages, GuestKernel, NoteLocation, PhysicalMemory, RamRange,
};

pub const PAGE: u64 = 4096;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
const TEXT_BASE: u64 = 0xffff_ffff_8000_0000;
const SECTION_BYTES: u64 = 128 * MIB;

/// Guest memory that holds only the pages that were written, and counts what is read.
#[derive(Clone)]
pub struct Sparse {
    ram: Vec<RamRange>,
    pages: BTreeMap<u64, Box<[u8; 4096]>>,
    pub reads: Cell<u64>,
    pub bytes: Cell<u64>,
    /// Reads of this page fail.
    pub broken: Option<u64>,
}

impl PhysicalMemory for Sparse {
    fn ram(&self) -> &[RamRange] {
        &self.ram
    }

    fn read(&self, addr: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = addr.checked_add(buf.len() as u64).unwrap();
        let inside = |r: &RamRange| r.addr <= addr && end <= r.end();
        assert!(self.ram.iter().any(inside), "asked for {addr:#x}..{end:#x}");
        self.reads.set(self.reads.get() + 1);
        self.bytes.set(self.bytes.get() + buf.len() as u64);
        let mut at = addr;
        let mut rest = buf;
        while !rest.is_empty() {
            if self.broken == Some(at / PAGE) {
                return Err(io::Error::other("a broken page"));
            }
            let offset = usize::try_from(at % PAGE).unwrap();
            let here = rest.len().min(4096 - offset);
            match self.pages.get(&(at / PAGE)) {
                Some(page) => rest[..here].copy_from_slice(&page[offset..offset + here]),
                None => rest[..here].fill(0),
            }
            at += here as u64;
            rest = &mut rest[here..];
        }
        Ok(())
    }
}

impl Sparse {
    pub fn write(&mut self, addr: u64, bytes: &[u8]) {
        let mut at = addr;
        let mut rest = bytes;
        while !rest.is_empty() {
            let offset = usize::try_from(at % PAGE).unwrap();
            let (now, later) = rest.split_at(rest.len().min(4096 - offset));
            let page = self.pages.entry(at / PAGE);
            let page = page.or_insert_with(|| Box::new([0; 4096]));
            page[offset..offset + now.len()].copy_from_slice(now);
            at += now.len() as u64;
            rest = later;
        }
    }

    pub fn write_u64(&mut self, addr: u64, value: u64) {
        self.write(addr, &value.to_le_bytes());
    }

    pub fn read_u64(&self, addr: u64) -> u64 {
        let mut bytes = [0; 8];
        self.read(addr, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }
}

/// How the kernel maps its page array.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leaves {
    Gib1,
    Mib2,
    Kib4,
    /// 4 KiB leaves, each in another place.
    Scattered,
}

/// Which kernel's way of marking pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// 6.1: PG_slab is a flag, types are inverted bits.
    V6_1,
    /// 6.12: types are the upper byte.
    V6_12,
}

/// What kernel to build.
#[derive(Debug, Clone)]
pub struct Shape {
    pub ram: Vec<RamRange>,
    pub style: Style,
    pub five_levels: bool,
    pub leaves: Leaves,
    pub entry_bytes: u64,
    pub names_vmemmap: bool,
    /// KASLR: where the kernel's image lies, relative to where it was linked (2 MiB steps).
    pub text_slide: u64,
    /// KASLR: where the virtual areas begin (1 GiB steps).
    pub area_slide: u64,
    /// Sections that the kernel does not have.
    pub absent_sections: Vec<u64>,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            ram: vec![range(0, 256 * MIB), range(4 * GIB, 128 * MIB)],
            style: Style::V6_12,
            five_levels: false,
            leaves: Leaves::Mib2,
            entry_bytes: 64,
            names_vmemmap: true,
            text_slide: 0x1_2600_0000 - 0x1_0000_0000,
            area_slide: 17 * GIB,
            absent_sections: Vec::new(),
        }
    }
}

pub fn range(addr: u64, len_bytes: u64) -> RamRange {
    RamRange { addr, len_bytes }
}

/// The values that the note names.
#[derive(Debug, Clone, Copy)]
pub struct Marks {
    pub buddy: i32,
    pub offline: i32,
    pub slab: i32,
    pub slab_flag: u64,
}

/// A synthetic guest, stopped.
#[derive(Clone)]
pub struct Guest {
    pub memory: Sparse,
    pub shape: Shape,
    pub note: NoteLocation,
    pub marks: Marks,
    /// The note's lines; [`Guest::write_note`] puts them into memory.
    pub lines: Vec<(String, String)>,
    pub top_table: u64,
    /// Guest-physical addresses of all tables, and of the pages of sections and their pointers.
    pub tables: Vec<u64>,
    pub roots: u64,
    pub sections: u64,
    pub vmemmap: u64,
    array: BTreeMap<u64, u64>,
    next_page: u64,
}

/// Where the guest's own structures lie: behind the first mebibyte, …
const NOTE: u64 = MIB;
const STRUCTURES: u64 = 2 * MIB;
/// … and its page array behind those.
const ARRAY: u64 = 16 * MIB;

impl Guest {
    pub fn new(shape: Shape) -> Self {
        let (areas, direct) = if shape.five_levels {
            (0xffd4_0000_0000_0000, 0xff11_0000_0000_0000)
        } else {
            (0xffff_ea00_0000_0000, 0xffff_8880_0000_0000)
        };
        let in_leaf = if shape.leaves == Leaves::Gib1 {
            ARRAY
        } else {
            0
        };
        let marks = match shape.style {
            Style::V6_1 => Marks {
                buddy: -129,
                offline: -257,
                slab: 0,
                slab_flag: 1 << 9,
            },
            Style::V6_12 => Marks {
                buddy: -268_435_456,
                offline: -251_658_240,
                slab: -184_549_376,
                slab_flag: 0,
            },
        };
        let mut guest = Self {
            memory: Sparse {
                ram: shape.ram.clone(),
                pages: BTreeMap::new(),
                reads: Cell::new(0),
                bytes: Cell::new(0),
                broken: None,
            },
            note: NoteLocation {
                addr: NOTE,
                len_bytes: 0x1024,
            },
            marks,
            lines: Vec::new(),
            top_table: 0,
            tables: Vec::new(),
            roots: 0,
            sections: 0,
            vmemmap: areas + shape.area_slide + in_leaf,
            array: BTreeMap::new(),
            next_page: STRUCTURES,
            shape,
        };
        guest.top_table = guest.table();
        let direct = direct + guest.shape.area_slide;
        guest.lay_out_array();
        guest.lay_out_sections(direct);
        guest.say_everything(direct);
        guest.write_note();
        guest
    }

    fn page(&mut self) -> u64 {
        let page = self.next_page;
        self.next_page += PAGE;
        assert!(page < ARRAY);
        page
    }

    fn table(&mut self) -> u64 {
        let table = self.page();
        self.tables.push(table);
        table
    }

    /// Maps `vaddr` to `addr` by a leaf of this level: 1 (4 KiB), 2 or 3.
    pub fn map(&mut self, vaddr: u64, addr: u64, leaf: u32) {
        let mut table = self.top_table;
        let levels = if self.shape.five_levels { 5 } else { 4 };
        for level in (leaf + 1..=levels).rev() {
            let entry = table + index(vaddr, level) * 8;
            if self.memory.read_u64(entry) == 0 {
                let below = self.table();
                self.memory.write_u64(entry, below | 0x63);
            }
            table = self.memory.read_u64(entry) & 0x000f_ffff_ffff_f000;
        }
        // No-execute and global, as the kernel's own data is; large where it is a large leaf.
        let large = if leaf > 1 { 0x80 } else { 0 };
        let entry = table + index(vaddr, leaf) * 8;
        self.memory
            .write_u64(entry, addr | (1 << 63) | 0x163 | large);
    }

    fn lay_out_array(&mut self) {
        let leaf = match self.shape.leaves {
            Leaves::Gib1 => 3,
            Leaves::Mib2 => 2,
            Leaves::Kib4 | Leaves::Scattered => 1,
        };
        let step = PAGE << (9 * (leaf - 1));
        let mut starts = std::collections::BTreeSet::new();
        for range in self.present_ram() {
            let first = self.vmemmap + range.addr / PAGE * self.shape.entry_bytes;
            let end = self.vmemmap + range.end() / PAGE * self.shape.entry_bytes;
            let mut at = first & !(step - 1);
            while at < end {
                starts.insert(at);
                at += step;
            }
        }
        let count = starts.len() as u64;
        for (i, vaddr) in (0..).zip(starts) {
            let addr = match self.shape.leaves {
                Leaves::Gib1 => 0,
                Leaves::Scattered => ARRAY + (count - 1 - i) * step,
                _ => ARRAY + i * step,
            };
            self.map(vaddr, addr, leaf);
            for page in 0..step / PAGE {
                self.array.insert(vaddr + page * PAGE, addr + page * PAGE);
            }
        }
    }

    /// RAM without the sections that the kernel does not have.
    fn present_ram(&self) -> Vec<RamRange> {
        let mut present = Vec::new();
        for ram in &self.shape.ram {
            let mut at = ram.addr;
            while at < ram.end() {
                let end = (at / SECTION_BYTES + 1) * SECTION_BYTES;
                let end = end.min(ram.end());
                if !self.shape.absent_sections.contains(&(at / SECTION_BYTES)) {
                    present.push(range(at, end - at));
                }
                at = end;
            }
        }
        present
    }

    fn lay_out_sections(&mut self, direct: u64) {
        (self.roots, self.sections) = (self.page(), self.page());
        self.memory.write_u64(self.roots, direct + self.sections);
        for range in self.present_ram() {
            let section = range.addr / SECTION_BYTES;
            assert!(section < 256, "one page of sections");
            self.memory
                .write_u64(self.sections + section * 16, self.vmemmap | 0x1f);
        }
        for page in [self.roots, self.sections] {
            self.map(direct + page, page, 1);
        }
    }

    fn say_everything(&mut self, direct: u64) {
        // The image was linked at 16 MiB and loaded elsewhere: phys_base makes up for it, and is
        // negative here whenever the text slides further than the load address.
        let swapper = TEXT_BASE + 0x0200_0000 + self.shape.text_slide;
        let phys_base = self.top_table.cast_signed() - (swapper - TEXT_BASE).cast_signed();
        let release = if self.shape.style == Style::V6_1 {
            "6.1.0-test"
        } else {
            "6.12.1-test"
        };
        let mut say = |key: &str, value: String| self.lines.push((key.into(), value));
        say("OSRELEASE", release.into());
        say("BUILD-ID", "0123456789abcdef".into());
        say("PAGESIZE", "4096".into());
        say("SYMBOL(swapper_pg_dir)", format!("{swapper:x}"));
        say("SYMBOL(mem_section)", format!("{:x}", direct + self.roots));
        say("LENGTH(mem_section)", "2048".into());
        say("SIZE(mem_section)", "16".into());
        say("OFFSET(mem_section.section_mem_map)", "0".into());
        say("NUMBER(SECTION_SIZE_BITS)", "27".into());
        say("SIZE(page)", self.shape.entry_bytes.to_string());
        for (field, offset) in FIELDS {
            say(&format!("OFFSET(page.{field})"), offset.to_string());
        }
        if self.shape.names_vmemmap {
            say("SYMBOL(vmemmap)", format!("{:x}", self.vmemmap));
        }
        say(
            "NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)",
            self.marks.buddy.to_string(),
        );
        say(
            "NUMBER(PAGE_OFFLINE_MAPCOUNT_VALUE)",
            self.marks.offline.to_string(),
        );
        match self.shape.style {
            Style::V6_1 => say("NUMBER(PG_slab)", "9".into()),
            Style::V6_12 => say(
                "NUMBER(PAGE_SLAB_MAPCOUNT_VALUE)",
                self.marks.slab.to_string(),
            ),
        }
        say("NUMBER(phys_base)", phys_base.to_string());
        let five_levels = u8::from(self.shape.five_levels);
        say("NUMBER(pgtable_l5_enabled)", five_levels.to_string());
        say("NUMBER(sme_mask)", "0".into());
    }

    /// Changes a line of the note.
    pub fn say(&mut self, key: &str, value: impl ToString) {
        let line = self.lines.iter_mut().find(|(k, _)| k == key);
        line.unwrap_or_else(|| panic!("no {key}")).1 = value.to_string();
        self.write_note();
    }

    /// Adds a line to the note.
    pub fn add(&mut self, key: &str, value: impl ToString) {
        self.lines.push((key.into(), value.to_string()));
        self.write_note();
    }

    /// Takes a line out of the note.
    pub fn forget(&mut self, key: &str) {
        self.lines.retain(|(k, _)| k != key);
        self.write_note();
    }

    pub fn write_note(&mut self) {
        let text: String = self
            .lines
            .iter()
            .map(|(k, v)| format!("{k}={v}\n"))
            .collect();
        let mut note = Vec::new();
        for word in [11, u32::try_from(text.len()).unwrap(), 0] {
            note.extend(word.to_le_bytes());
        }
        note.extend(b"VMCOREINFO\0\0");
        note.extend(text.as_bytes());
        self.memory.write(self.note.addr, &note);
    }

    /// Where a field of a page's entry lies.
    pub fn field(&self, pfn: u64, name: &str) -> u64 {
        let offset = FIELDS.iter().find(|(n, _)| *n == name).unwrap().1;
        let vaddr = self.vmemmap + pfn * self.shape.entry_bytes + offset;
        self.array[&(vaddr & !(PAGE - 1))] + vaddr % PAGE
    }

    pub fn set(&mut self, pfn: u64, name: &str, value: u64) {
        self.memory.write_u64(self.field(pfn, name), value);
    }

    pub fn set_type(&mut self, pfn: u64, value: i32) {
        self.memory
            .write(self.field(pfn, "_mapcount"), &value.to_le_bytes());
    }

    /// Marks a free block; the entries of its other pages stay as they are.
    pub fn free_block(&mut self, pfn: u64, order: u64) {
        self.set(pfn, "private", order);
        self.set(pfn, "lru", self.vmemmap);
        self.set_type(pfn, self.marks.buddy);
    }

    pub fn balloon(&mut self, pfn: u64) {
        self.set_type(pfn, self.marks.offline);
    }

    /// A compound page: this head, and so many pages behind it.
    pub fn tails(&mut self, pfn: u64, count: u64) {
        let head = self.vmemmap + pfn * self.shape.entry_bytes;
        for tail in pfn + 1..=pfn + count {
            self.set(tail, "compound_head", head | 1);
            self.set(tail, "mapping", 0x400);
            self.set_type(tail, -1);
        }
    }

    pub fn slab(&mut self, pfn: u64) {
        match self.shape.style {
            Style::V6_1 => self.set(pfn, "flags", self.marks.slab_flag | 1 << 40),
            Style::V6_12 => self.set_type(pfn, self.marks.slab),
        }
        self.set(pfn, "mapping", self.vmemmap | 1);
    }

    pub fn anonymous(&mut self, pfn: u64) {
        self.set(pfn, "mapping", 0xffff_8880_1234_5600 | 1);
    }

    pub fn cached(&mut self, pfn: u64) {
        self.set(pfn, "mapping", 0xffff_8880_6543_2100);
        self.set_type(pfn, -1);
    }

    pub fn find(&self) -> Result<GuestKernel, AnatomyError> {
        GuestKernel::find(&self.memory, self.note)
    }

    pub fn scan(&self) -> Result<FreePages, AnatomyError> {
        self.find()?.free_pages(&self.memory)
    }

    pub fn census(&self) -> Result<Census, AnatomyError> {
        self.find()?.census(&self.memory)
    }

    /// What the scan says when it refuses.
    pub fn refused(&self) -> AnatomyError {
        match self.scan() {
            Ok(found) => panic!("{} pages free", found.pages()),
            Err(error) => error,
        }
    }
}

/// Fields of `struct page` in 6.1 and 6.12 alike.
const FIELDS: [(&str, u64); 7] = [
    ("flags", 0),
    ("compound_head", 8),
    ("lru", 8),
    ("mapping", 24),
    ("private", 40),
    ("_mapcount", 48),
    ("_refcount", 52),
];

fn index(vaddr: u64, level: u32) -> u64 {
    vaddr >> (12 + 9 * (level - 1)) & 511
}
