//! What the kernel itself says of its pages: `/proc/kpageflags`, read by root.

use std::fs::File;
use std::io::{self, BufRead as _, Read as _};

use torpor_workload::{CHECK_COMMAND, FreePages};

/// `KPF_BUDDY`: in a free block of the buddy allocator, its head or not
/// (include/uapi/linux/kernel-page-flags.h).
const KPF_BUDDY: u32 = 10;
const ENTRY_BYTES: usize = 8;
/// Read at once; whole entries.
const CHUNK_BYTES: usize = 256 << 10;

/// Answers each [`CHECK_COMMAND`] with a line.
pub(crate) fn run() -> io::Result<()> {
    // Room for the answer before the first look, so that looking changes little.
    let mut buffer = vec![0; CHUNK_BYTES];
    crate::say(&look(&mut buffer)?)?;
    for line in io::stdin().lock().lines() {
        if line?.trim() == CHECK_COMMAND {
            crate::say(&look(&mut buffer)?)?;
        }
    }
    Ok(())
}

fn look(buffer: &mut [u8]) -> io::Result<FreePages> {
    let mut flags = File::open("/proc/kpageflags")?;
    let mut runs: Vec<(u64, u64)> = Vec::new();
    let mut pfn = 0;
    loop {
        let got = flags.read(buffer)?;
        if got == 0 {
            break;
        }
        for entry in buffer[..got].as_chunks::<ENTRY_BYTES>().0 {
            if u64::from_le_bytes(*entry) >> KPF_BUDDY & 1 == 1 {
                match runs.last_mut() {
                    Some((first, pages)) if *first + *pages == pfn => *pages += 1,
                    _ => runs.push((pfn, 1)),
                }
            }
            pfn += 1;
        }
    }
    Ok(FreePages {
        runs,
        mem_free_kib: mem_free_kib()?,
    })
}

fn mem_free_kib() -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    text.lines()
        .find_map(|line| {
            line.strip_prefix("MemFree:")?
                .trim()
                .strip_suffix(" kB")?
                .parse()
                .ok()
        })
        .ok_or_else(|| io::Error::other("/proc/meminfo has no MemFree"))
}
