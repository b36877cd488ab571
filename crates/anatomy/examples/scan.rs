//! Scans a guest's memory that lies in a file, and says what that took.
//!
//! ```text
//! cargo run --release -p torpor-anatomy --example scan -- MEMORY NOTE_ADDR [ADDR:LEN[:OFFSET] …]
//! ```
//!
//! MEMORY is a copy of a *stopped* guest's RAM (its memfd, or the file of a memory backend), NOTE_ADDR
//! the first word of its `/sys/kernel/vmcoreinfo`, both in hexadecimal like all numbers here; then the
//! guest's ranges of RAM and where they begin in the file. Without ranges: one, the whole file, at 0.

use std::error::Error;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use torpor_anatomy::{GuestKernel, NoteLocation, PAGE_SIZE, PageClass, PhysicalMemory, RamRange};

/// How often each thing is done; the median counts.
const ROUNDS: usize = 15;

struct FileMemory {
    file: File,
    ranges: Vec<RamRange>,
    offsets: Vec<u64>,
}

impl PhysicalMemory for FileMemory {
    fn ram(&self) -> &[RamRange] {
        &self.ranges
    }

    fn read(&self, addr: u64, buf: &mut [u8]) -> io::Result<()> {
        let range = self.ranges.partition_point(|r| r.end() <= addr);
        let offset = addr - self.ranges[range].addr + self.offsets[range];
        self.file.read_exact_at(buf, offset)
    }
}

#[expect(clippy::print_stdout, reason = "that is what it is for")]
fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let usage = "usage: scan MEMORY NOTE_ADDR [ADDR:LEN[:OFFSET] …]";
    let file = File::open(args.next().ok_or(usage)?)?;
    let note: NoteLocation = format!("{} 0", args.next().ok_or(usage)?).parse()?;
    let memory = memory(file, args)?;

    let (find, kernel) = median(|| GuestKernel::find(&memory, note))?;
    let (scan, free) = median(|| kernel.free_pages(&memory))?;
    let (count, census) = median(|| kernel.census(&memory))?;
    let ram_bytes: u64 = memory.ranges.iter().map(|r| r.len_bytes).sum();
    println!(
        "{}: {} pages of RAM",
        kernel.release(),
        ram_bytes / PAGE_SIZE
    );
    println!(
        "free {} in blocks, {} in the balloon, {} runs; {} bytes of the array in {} reads",
        free.buddy_pages,
        free.balloon_pages,
        free.runs.len(),
        free.array_bytes_read,
        free.reads,
    );
    for class in PageClass::ALL {
        println!("{class:?} {}", census.pages(class));
    }
    let gib = ram_bytes as f64 / f64::from(1 << 30);
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    println!(
        "find {:.3} ms, free pages {:.3} ms, census {:.3} ms; find + free pages {:.3} ms per GiB",
        ms(find),
        ms(scan),
        ms(count),
        ms(find + scan) / gib,
    );
    Ok(())
}

fn memory(file: File, args: impl Iterator<Item = String>) -> Result<FileMemory, Box<dyn Error>> {
    let mut memory = FileMemory {
        file,
        ranges: Vec::new(),
        offsets: Vec::new(),
    };
    let mut next_offset = 0;
    for arg in args {
        let numbers = arg
            .split(':')
            .map(|word| u64::from_str_radix(word, 16))
            .collect::<Result<Vec<_>, _>>()?;
        let (addr, len_bytes, offset) = match numbers[..] {
            [addr, len] => (addr, len, next_offset),
            [addr, len, offset] => (addr, len, offset),
            _ => return Err("a range is ADDR:LEN[:OFFSET]".into()),
        };
        memory.ranges.push(RamRange { addr, len_bytes });
        memory.offsets.push(offset);
        next_offset = offset + len_bytes;
    }
    if memory.ranges.is_empty() {
        let len_bytes = memory.file.metadata()?.len();
        memory.ranges.push(RamRange { addr: 0, len_bytes });
        memory.offsets.push(0);
    }
    Ok(memory)
}

fn median<T, E>(mut action: impl FnMut() -> Result<T, E>) -> Result<(Duration, T), E> {
    let mut times = Vec::with_capacity(ROUNDS);
    loop {
        let start = Instant::now();
        let result = action()?;
        times.push(start.elapsed());
        if times.len() == ROUNDS {
            times.sort_unstable();
            return Ok((times[ROUNDS / 2], result));
        }
    }
}
