//! How fast layers are written and pages read: `cargo run --release -p torpor-build --example speed`.
//!
//! Bars (two cores): 300 MB/s for writing random bytes, 40 µs for reading one random page of a
//! file that the host has cached.
#![allow(clippy::print_stdout, reason = "a bench prints its figures")]

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use torpor_build::{
    Build, BuildId, BuildInfo, Error, ImageKind, PAGE_SIZE, PageContent, Result, Storage,
};

const IMAGE_PAGES: u64 = 131_072;
const PUSH_PAGES: u64 = 256;
const READS: u64 = 20_000;

/// Bytes that look random, or like text: words of a small vocabulary.
fn fill(bytes: &mut [u8], state: &mut u64, random: bool) {
    for word in bytes.chunks_exact_mut(8) {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        let value = if random {
            *state
        } else {
            0x2020_6572_6f77_0000 | (*state & 0xff)
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

fn mb_per_s(bytes: u64, since: Instant) -> f64 {
    let bytes = u32::try_from(bytes >> 10).unwrap_or(u32::MAX);
    f64::from(bytes) * 1024.0 / 1e6 / since.elapsed().as_secs_f64()
}

fn write(storage: &Storage, parent: Option<&Build>, bytes: &[u8], what: &str) -> Result<Build> {
    let staged = storage.begin_build(BuildId::random())?;
    let reader = parent.map(|p| p.memory().map(Arc::new)).transpose()?;
    let start = Instant::now();
    let mut writer = staged.image_writer(ImageKind::Memory, IMAGE_PAGES, reader)?;
    let chunk_bytes = usize::try_from(PUSH_PAGES).unwrap_or(1) * PAGE_SIZE;
    for (first, chunk) in (0..).step_by(256).zip(bytes.chunks(chunk_bytes)) {
        writer.push(first, PUSH_PAGES, PageContent::Data(chunk))?;
    }
    let summary = writer.finish()?;
    let speed = mb_per_s(bytes.len() as u64, start);
    let start = Instant::now();
    let info = BuildInfo {
        parent: parent.map(Build::id),
        ..BuildInfo::default()
    };
    let build = staged.commit(info)?;
    println!(
        "write {what:<22} {speed:>6.0} MB/s   {:>4} MiB stored, {:>4} MiB compressed, commit {:>4} ms",
        summary.raw_bytes >> 20,
        summary.compressed_bytes >> 20,
        start.elapsed().as_millis(),
    );
    Ok(build)
}

fn read(build: &Build, what: &str) -> Result<()> {
    let reader = build.memory()?;
    let mut page = vec![0; PAGE_SIZE];
    let (mut state, mut times) = (7_u64, Vec::new());
    for _ in 0..READS {
        let mut number = [0; 8];
        fill(&mut number, &mut state, true);
        let start = Instant::now();
        reader.read_pages(u64::from_le_bytes(number) % IMAGE_PAGES, &mut page)?;
        times.push(start.elapsed().as_nanos());
    }
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100] / 100;
    let us = |tenths: u128| format!("{}.{}", tenths / 10, tenths % 10);
    println!(
        "read  {what:<22} random page: median {} µs, p95 {} µs, p99 {} µs",
        us(at(50)),
        us(at(95)),
        us(at(99))
    );
    let start = Instant::now();
    for number in 0..READS {
        reader.read_pages(number, &mut page)?;
    }
    println!(
        "read  {what:<22} page by page: {:.0} MB/s",
        mb_per_s(READS * 4096, start)
    );
    let mut all = vec![0; 1 << 20];
    let start = Instant::now();
    for number in (0..IMAGE_PAGES).step_by(256) {
        reader.read_pages(number, &mut all)?;
    }
    println!(
        "read  {what:<22} by the MiB: {:.0} MB/s",
        mb_per_s(IMAGE_PAGES * 4096, start)
    );
    Ok(())
}

fn main() -> Result<()> {
    let dir = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "target/speed".to_owned());
    let storage = Storage::open(Path::new(&dir))?;
    let mut bytes = vec![0; usize::try_from(IMAGE_PAGES).unwrap_or(1) * PAGE_SIZE];
    let mut state = 1;
    for (random, what) in [(true, "random"), (false, "compressible")] {
        fill(&mut bytes, &mut state, random);
        let build = write(&storage, None, &bytes, what)?;
        read(&build, what)?;
        drop(write(&storage, Some(&build), &bytes, "the same on top")?);
    }
    bytes.fill(0);
    drop(write(&storage, None, &bytes, "zeros")?);
    std::fs::remove_dir_all(&dir).map_err(|source| Error::Io {
        action: "remove",
        path: dir.into(),
        source,
    })
}
