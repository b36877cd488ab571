//! The guest kernel's crash note (vmcoreinfo): what the kernel tells tools that read its memory.
//!
//! ```text
//! name length 11 │ text length │ type 0 │ "VMCOREINFO\0" + 1 │ KEY=value\nKEY=value\n …
//! 4 bytes        │ 4           │ 4      │ 12                 │ text length
//! ```
//!
//! The text differs between kernels: a line that this module does not know is skipped, one that it
//! needs and does not find is an error, and so is one that comes twice. What the lines mean:
//! `Documentation/admin-guide/kdump/vmcoreinfo.rst`; which are written: `kernel/vmcore_info.c`
//! (`kernel/crash_core.c` before 6.9) and `arch/x86/kernel/vmcore_info_64.c`.
//!
//! It only reads values and checks each by itself. What they lead to is checked where it is used.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::AnatomyError;
use crate::entry::{EntryLayout, SlabMark};
use crate::memory::Ram;

/// Most that is read of a note (bytes): two pages. The kernel keeps its text in one (VMCOREINFO_BYTES
/// in `include/linux/vmcore_info.h`), the headers come on top.
const NOTE_BYTES_MAX: u64 = 8192;
const NAME: &[u8] = b"VMCOREINFO\0";
/// Where the text begins: three words and the name, filled up to a multiple of four.
const TEXT_OFFSET: usize = 24;
/// Longest kernel release (bytes): `__NEW_UTS_LEN` in `include/uapi/linux/utsname.h`.
const RELEASE_BYTES_MAX: usize = 64;
/// Sizes of `struct page` (bytes): 64 in every usual x86-64 kernel, 56 without memory cgroups. Larger ones
/// are those of KMSAN, which must not be scanned anyway. The upper limit bounds the array, and so the
/// work: no line of the note can make it larger than an honest guest's.
const ENTRY_BYTES: std::ops::RangeInclusive<u64> = 56..=64;
/// Sizes of a memory section, as a power of two: 27 on every x86-64 kernel. The lower limit bounds the
/// number of sections per GiB.
const SECTION_BITS: std::ops::RangeInclusive<u64> = 27..=34;

/// Where the guest says its crash note lies: the text of `/sys/kernel/vmcoreinfo`, parsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NoteLocation {
    /// Guest-physical address of the ELF note.
    pub addr: u64,
    /// Its room (bytes), as the guest says. Not relied upon: the note's own header tells its length.
    pub len_bytes: u64,
}

/// The text is not `<hex address> <hex size>`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not the text of /sys/kernel/vmcoreinfo, which is a hexadecimal address and size")]
pub struct ParseNoteLocationError;

impl FromStr for NoteLocation {
    type Err = ParseNoteLocationError;

    /// Parses what the kernel prints (`kernel/ksysfs.c`: `%pa %x`, the first with `0x`).
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut words = text.split_ascii_whitespace().map(hexadecimal);
        match (words.next(), words.next(), words.next()) {
            (Some(Some(addr)), Some(Some(len_bytes)), None) => Ok(Self { addr, len_bytes }),
            _ => Err(ParseNoteLocationError),
        }
    }
}

/// A hexadecimal number with or without `0x`; no sign, unlike `from_str_radix`.
fn hexadecimal(word: &str) -> Option<u64> {
    let digits = word.strip_prefix("0x").unwrap_or(word);
    let plain = digits.bytes().all(|b| b.is_ascii_hexdigit());
    plain.then(|| u64::from_str_radix(digits, 16).ok())?
}

/// What this crate wants to know of a kernel.
#[derive(Debug)]
pub(crate) struct KernelNote {
    pub(crate) release: String,
    /// Guest-physical address of the kernel's top page table.
    pub(crate) top_table: u64,
    pub(crate) five_levels: bool,
    /// Virtual address of page 0's entry, where the kernel has all entries in one virtual array.
    pub(crate) vmemmap: Option<u64>,
    pub(crate) sections: SectionLayout,
    pub(crate) entry: EntryLayout,
}

/// Where the kernel keeps its memory sections (`include/linux/mmzone.h`, SPARSEMEM_EXTREME: an array of
/// pointers to pages of `struct mem_section`).
#[derive(Debug)]
pub(crate) struct SectionLayout {
    /// Virtual address of the array of pointers.
    pub(crate) roots: u64,
    pub(crate) roots_len: u64,
    /// Size of a `struct mem_section` (bytes), a power of two.
    pub(crate) section_bytes: u64,
    pub(crate) mem_map_offset: usize,
    /// Pages of a section, as a power of two.
    pub(crate) pages_bits: u32,
}

/// Reads the note and what it says.
pub(crate) fn read(ram: &Ram<'_>, location: NoteLocation) -> Result<KernelNote, AnatomyError> {
    let addr = location.addr;
    let room = usize::try_from(ram.bytes_from(addr, NOTE_BYTES_MAX)).unwrap_or(0);
    let mut bytes = vec![0; room.max(TEXT_OFFSET)];
    ram.read("crash note", addr, &mut bytes)?;
    let text = text_of(&bytes).map_err(|what| AnatomyError::NotANote { addr, what })?;
    Lines(text).kernel_note()
}

fn text_of(bytes: &[u8]) -> Result<&[u8], &'static str> {
    let word = |at: usize| {
        bytes[at..]
            .first_chunk()
            .map_or(0, |b| u32::from_le_bytes(*b))
    };
    if word(0) as usize != NAME.len() || !bytes[12..].starts_with(NAME) {
        return Err("its name is another");
    }
    let len = word(4) as usize;
    bytes[TEXT_OFFSET..]
        .get(..len)
        .ok_or("it is longer than two pages, or than the RAM behind it")
}

/// The note's text. Looked through for each key: it is short, and a map would have to be bounded.
struct Lines<'a>(&'a [u8]);

impl<'a> Lines<'a> {
    fn find(&self, key: &'static str) -> Result<Option<&'a str>, AnatomyError> {
        let mut found = None;
        for line in self.0.split(|b| *b == b'\n') {
            let value = line
                .strip_prefix(key.as_bytes())
                .and_then(|rest| rest.strip_prefix(b"="));
            let Some(value) = value else { continue };
            if found.is_some() {
                return Err(AnatomyError::KeyTwice { key });
            }
            let what = "not text";
            let text = std::str::from_utf8(value);
            found = Some(text.map_err(|_| AnatomyError::KeyValue { key, what })?);
        }
        Ok(found)
    }

    fn parsed<T>(
        &self,
        key: &'static str,
        what: &'static str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, AnatomyError> {
        let value = self.find(key)?.map(str::trim_ascii);
        value
            .map(|text| parse(text).ok_or(AnatomyError::KeyValue { key, what }))
            .transpose()
    }

    /// `SYMBOL(…)`: `%lx`.
    fn symbol(&self, key: &'static str) -> Result<Option<u64>, AnatomyError> {
        self.parsed(key, "not a hexadecimal number", hexadecimal)
    }

    /// `NUMBER(…)`: `%ld`.
    fn number(&self, key: &'static str) -> Result<Option<i64>, AnatomyError> {
        self.parsed(key, "not a number", |text| text.parse().ok())
    }

    /// `SIZE(…)`, `OFFSET(…)`, `LENGTH(…)`: `%lu`.
    fn size(&self, key: &'static str) -> Result<u64, AnatomyError> {
        needed(
            key,
            self.parsed(key, "not a size", |text| text.parse().ok())?,
        )
    }

    /// The offset of a field of `field_bytes` bytes, aligned, inside a structure of `size` bytes.
    fn field(&self, key: &'static str, field_bytes: u64, size: u64) -> Result<usize, AnatomyError> {
        let offset = self.size(key)?;
        let inside = offset <= size - field_bytes && offset % field_bytes == 0;
        let what = "not the place of a field in that structure";
        usize::try_from(offset)
            .ok()
            .filter(|_| inside)
            .ok_or(AnatomyError::KeyValue { key, what })
    }

    /// The bit number of a page flag, as a mask.
    fn flag(&self, key: &'static str) -> Result<Option<u64>, AnatomyError> {
        self.parsed(key, "not a bit of 64", |text| {
            1_u64.checked_shl(text.parse().ok()?)
        })
    }

    /// A page type: a negative 32-bit number. −1 is every page that nothing maps.
    fn page_type(&self, key: &'static str) -> Result<Option<u32>, AnatomyError> {
        self.parsed(key, "not a page type", |text| {
            let value: i32 = text.parse().ok()?;
            (value < -1).then_some(value.cast_unsigned())
        })
    }

    fn kernel_note(&self) -> Result<KernelNote, AnatomyError> {
        if self.size("PAGESIZE")? != crate::PAGE_SIZE {
            let (key, what) = ("PAGESIZE", "only pages of 4 KiB are known");
            return Err(AnatomyError::KeyValue { key, what });
        }
        if self.number("NUMBER(sme_mask)")?.unwrap_or(0) != 0 {
            let (key, what) = ("NUMBER(sme_mask)", "the guest's memory is encrypted");
            return Err(AnatomyError::KeyValue { key, what });
        }
        let key = "SYMBOL(swapper_pg_dir)";
        let swapper = needed(key, self.symbol(key)?)?;
        let key = "NUMBER(phys_base)";
        let phys_base = needed(key, self.number(key)?)?;
        let five_levels = self.number("NUMBER(pgtable_l5_enabled)")?.unwrap_or(0) != 0;
        Ok(KernelNote {
            release: self.release()?,
            // `__pa_symbol`: phys_base may be negative, and a wrong sum is no address in RAM.
            top_table: swapper
                .wrapping_sub(KERNEL_TEXT_BASE)
                .wrapping_add_signed(phys_base),
            five_levels,
            vmemmap: self.symbol("SYMBOL(vmemmap)")?,
            sections: self.section_layout()?,
            entry: self.entry_layout()?,
        })
    }

    /// Checked to be printable: it ends up in reports and on terminals.
    fn release(&self) -> Result<String, AnatomyError> {
        let key = "OSRELEASE";
        let release = needed(key, self.find(key)?)?;
        let printable = release.bytes().all(|b| b.is_ascii_graphic());
        if release.is_empty() || release.len() > RELEASE_BYTES_MAX || !printable {
            let what = "not a kernel's release";
            return Err(AnatomyError::KeyValue { key, what });
        }
        Ok(release.to_owned())
    }

    fn section_layout(&self) -> Result<SectionLayout, AnatomyError> {
        let key = "NUMBER(SECTION_SIZE_BITS)";
        let bits = needed(key, self.number(key)?)?;
        let bits = u64::try_from(bits)
            .ok()
            .filter(|b| SECTION_BITS.contains(b));
        let what = "not a section's size";
        let bits = bits.ok_or(AnatomyError::KeyValue { key, what })?;
        let key = "SIZE(mem_section)";
        let section_bytes = self.size(key)?;
        if !matches!(section_bytes, 16 | 32 | 64) {
            let what = "not 16, 32 or 64";
            return Err(AnatomyError::KeyValue { key, what });
        }
        let key = "SYMBOL(mem_section)";
        Ok(SectionLayout {
            roots: needed(key, self.symbol(key)?)?,
            roots_len: self.size("LENGTH(mem_section)")?,
            section_bytes,
            mem_map_offset: self.field("OFFSET(mem_section.section_mem_map)", 8, section_bytes)?,
            pages_bits: u32::try_from(bits).unwrap_or(0) - crate::PAGE_SIZE.ilog2(),
        })
    }

    fn entry_layout(&self) -> Result<EntryLayout, AnatomyError> {
        let key = "SIZE(page)";
        let stride = self.size(key)?;
        if !ENTRY_BYTES.contains(&stride) || stride % 8 != 0 {
            let what = "no struct page has this size";
            return Err(AnatomyError::KeyValue { key, what });
        }
        let key = "NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)";
        let buddy = needed(key, self.page_type(key)?)?;
        let offline = self.page_type("NUMBER(PAGE_OFFLINE_MAPCOUNT_VALUE)")?;
        if offline == Some(buddy) {
            let what = "the same as an offline page's";
            return Err(AnatomyError::KeyValue { key, what });
        }
        let slab_type = self.page_type("NUMBER(PAGE_SLAB_MAPCOUNT_VALUE)")?;
        let slab_flag = self.flag("NUMBER(PG_slab)")?;
        Ok(EntryLayout {
            stride: usize::try_from(stride).unwrap_or(usize::MAX),
            flags: self.field("OFFSET(page.flags)", 8, stride)?,
            compound_head: self.field("OFFSET(page.compound_head)", 8, stride)?,
            mapping: self.field("OFFSET(page.mapping)", 8, stride)?,
            private: self.field("OFFSET(page.private)", 8, stride)?,
            mapcount: self.field("OFFSET(page._mapcount)", 4, stride)?,
            refcount: self.field("OFFSET(page._refcount)", 4, stride)?,
            buddy,
            offline,
            hugetlb: self.page_type("NUMBER(PAGE_HUGETLB_MAPCOUNT_VALUE)")?,
            slab: slab_type
                .map(SlabMark::Type)
                .or(slab_flag.map(SlabMark::Flag)),
        })
    }
}

/// Where x86-64 maps the kernel's image (`__START_KERNEL_map` in `asm/page_64_types.h`).
const KERNEL_TEXT_BASE: u64 = 0xffff_ffff_8000_0000;

fn needed<T>(key: &'static str, value: Option<T>) -> Result<T, AnatomyError> {
    value.ok_or(AnatomyError::KeyMissing { key })
}
