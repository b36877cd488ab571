//! How fast layers are written and pages read: `cargo run --release -p torpor-build --example speed`.
//!
//! Bars (two cores): 300 MB/s for writing random bytes, 40 µs for reading one random page of a
//! file that the host has cached, one second for importing a base image of 225 MB.
#![allow(clippy::print_stdout, reason = "a bench prints its figures")]

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use torpor_build::{
    BaseImage, Build, BuildId, BuildInfo, Error, ImageKind, PAGE_SIZE, PageContent, Result, Storage,
};

const IMAGE_PAGES: u64 = 131_072;
/// Captured memory comes in long runs.
const PUSH_PAGES: u64 = 2048;
const READS: u64 = 20_000;
/// 225 MB, as the Debian base image has.
const BASE_IMAGE_BLOCKS: usize = 55_000;

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

fn write(
    storage: &Storage,
    parent: Option<&Build>,
    base_image: Option<&Arc<BaseImage>>,
    bytes: &[u8],
    what: &str,
) -> Result<Build> {
    let staged = storage.begin_build(BuildId::random())?;
    let reader = parent.map(|p| p.memory().map(Arc::new)).transpose()?;
    let start = Instant::now();
    let mut writer = staged.image_writer(ImageKind::Memory, IMAGE_PAGES, reader)?;
    if let Some(base_image) = base_image {
        writer.refer_to(Arc::clone(base_image))?;
    }
    let chunk_bytes = usize::try_from(PUSH_PAGES).unwrap_or(1) * PAGE_SIZE;
    for (first, chunk) in (0..).step_by(2048).zip(bytes.chunks(chunk_bytes)) {
        writer.push(first, PUSH_PAGES, PageContent::Data(chunk))?;
    }
    let summary = writer.finish()?;
    let speed = mb_per_s(bytes.len() as u64, start);
    let start = Instant::now();
    let info = BuildInfo {
        parent: parent.map(Build::id),
        base_image: base_image.map(|image| image.digest()),
        ..BuildInfo::default()
    };
    let build = staged.commit(info)?;
    println!(
        "write {what:<22} {speed:>6.0} MB/s   {:>4} MiB in the base image, {:>4} MiB stored, \
         {:>4} MiB compressed, commit {:>4} ms",
        summary.base_image_pages >> 8,
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

/// Makes a base image of random blocks and imports it; times what an import and an opening cost.
fn import(storage: &Storage, blocks: &mut [u8]) -> Result<Arc<BaseImage>> {
    let mut state = 99;
    fill(blocks, &mut state, true);
    let path = storage.root().join("image");
    let io = |source| Error::Io {
        action: "write",
        path: path.clone(),
        source,
    };
    std::fs::write(&path, &*blocks).map_err(io)?;
    let digest = storage.import_image(&path)?;
    let index = storage.root().join(format!("block-indexes/{digest}"));
    std::fs::remove_file(index).map_err(io)?;
    for what in ["index made", "index there"] {
        let start = Instant::now();
        drop(storage.base_image(&digest)?);
        println!(
            "base image of {} MB, {what}: opened in {} µs",
            blocks.len() / 1_000_000,
            start.elapsed().as_micros()
        );
    }
    storage.base_image(&digest)
}

/// Memory of which every other 32 KiB are copies of blocks of the image.
fn references(storage: &Storage, bytes: &mut [u8]) -> Result<()> {
    const RUN_BYTES: usize = 8 * PAGE_SIZE;
    let mut blocks = vec![0; BASE_IMAGE_BLOCKS * PAGE_SIZE];
    let base_image = import(storage, &mut blocks)?;
    let mut state = 5;
    fill(bytes, &mut state, true);
    let copies = bytes.chunks_exact_mut(RUN_BYTES).step_by(2);
    for (copy, blocks) in copies.zip(blocks.chunks_exact(RUN_BYTES).cycle()) {
        copy.copy_from_slice(blocks);
    }
    let build = write(storage, None, Some(&base_image), bytes, "half in the image")?;
    read(&build, "half in the image")?;
    discard(write(
        storage,
        Some(&build),
        Some(&base_image),
        bytes,
        "the same on top",
    )?)?;
    discard(build)?;
    discard(write(storage, None, None, bytes, "without references")?)?;
    for copy in bytes.chunks_mut(blocks.len()) {
        copy.copy_from_slice(&blocks[..copy.len()]);
    }
    discard(write(
        storage,
        None,
        Some(&base_image),
        bytes,
        "all in the image",
    )?)
}

/// Gives a build's room back, so that each write finds the same.
fn discard(build: Build) -> Result<()> {
    let (storage, id) = (build.storage().clone(), build.id());
    drop(build);
    storage.delete_build(&id)
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
        let build = write(&storage, None, None, &bytes, what)?;
        read(&build, what)?;
        discard(write(
            &storage,
            Some(&build),
            None,
            &bytes,
            "the same on top",
        )?)?;
        discard(build)?;
    }
    bytes.fill(0);
    discard(write(&storage, None, None, &bytes, "zeros")?)?;
    references(&storage, &mut bytes)?;
    std::fs::remove_dir_all(&dir).map_err(|source| Error::Io {
        action: "remove",
        path: dir.into(),
        source,
    })
}
