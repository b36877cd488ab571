//! Churn: threads that allocate, free, write files and fork without a pause, and verify every byte
//! before they let it go.
//!
//! It is the guest's half of the proof that a page which the host takes for free is nobody's: if
//! one that is in use is overwritten, somebody here finds it.
//!
//! Each piece of data is a run of words that follow from its seed, so a wrong word also tells where
//! it came from. Long-lived pieces stay for many rounds, short-lived ones for none.

use std::fs::File;
use std::io::{self, BufRead as _, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use torpor_workload::{CHECK_COMMAND, Churned, KEEP_COMMAND};

/// Threads that allocate; sizes from a page to what a huge page holds.
const MEMORY_THREADS: u64 = 3;
/// Pieces that a thread keeps at once; the oldest is verified and goes when one comes.
const PIECES_KEPT: usize = 24;
/// The largest piece: 2 MiB, which the kernel may serve with one huge page.
const PIECE_BYTES_MAX: u64 = 2 << 20;
/// What a command takes and keeps: pieces from the first size to the last, each twice the one before,
/// so many times over. 32 MiB, in a guest of 256.
const ON_COMMAND_BYTES_MIN: usize = 64 << 10;
const ON_COMMAND_BYTES_MAX: usize = 8 << 20;
const ON_COMMAND_TIMES: u64 = 2;
/// Files that the file thread keeps in each of its directories.
const FILES_KEPT: usize = 12;
const FILE_BYTES_MAX: u64 = 512 << 10;
/// Between two processes: an emulated guest forks slowly.
const FORK_EVERY: Duration = Duration::from_millis(20);

/// Data, and the seed that its words follow from.
type Piece = (Vec<u8>, u64);

/// What all threads share.
#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    pieces: AtomicU64,
    files: AtomicU64,
    forks: AtomicU64,
    damaged: AtomicU64,
}

impl Shared {
    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    fn verify(&self, data: &[u8], seed: u64, counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
        if !is_intact(data, seed) {
            self.damaged.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// What has been done and found so far; `kept` is verified for it.
    fn counted(&self, kept: &[Piece]) -> Churned {
        let mut kept_bytes = 0;
        for (data, seed) in kept {
            kept_bytes += data.len() as u64;
            if !is_intact(data, *seed) {
                self.damaged.fetch_add(1, Ordering::Relaxed);
            }
        }
        Churned {
            pieces: self.pieces.load(Ordering::Relaxed),
            files: self.files.load(Ordering::Relaxed),
            forks: self.forks.load(Ordering::Relaxed),
            kept_bytes,
            damaged: self.damaged.load(Ordering::Relaxed),
        }
    }
}

/// Churns; answers each [`CHECK_COMMAND`] and [`KEEP_COMMAND`] with a line; stops, verifies all that is left and says
/// so when its standard input ends.
pub(crate) fn run(dir: &Path) -> io::Result<()> {
    let shared = Shared::default();
    let dirs = [dir.to_path_buf(), PathBuf::from("/dev/shm/churn")];
    for dir in &dirs {
        std::fs::create_dir_all(dir)?;
    }
    let done: io::Result<Vec<Piece>> = std::thread::scope(|scope| {
        let memory: Vec<_> = (0..MEMORY_THREADS)
            .map(|number| {
                scope.spawn({
                    let shared = &shared;
                    move || churn_memory(shared, number + 1)
                })
            })
            .collect();
        let files = scope.spawn(|| churn_files(&shared, &dirs));
        let forks = scope.spawn(|| churn_processes(&shared));
        let listened = listen(&shared);
        shared.stop.store(true, Ordering::Relaxed);
        for thread in memory {
            thread
                .join()
                .map_err(|_| io::Error::other("a thread panicked"))?;
        }
        for thread in [files, forks] {
            thread
                .join()
                .map_err(|_| io::Error::other("a thread panicked"))??;
        }
        listened
    });
    let kept = done?;
    crate::say(&shared.counted(&kept))
}

/// Answers commands until there are no more. What is kept by then.
fn listen(shared: &Shared) -> io::Result<Vec<Piece>> {
    let mut kept = Vec::new();
    let mut random = 0x4EE9_u64;
    crate::say(&shared.counted(&kept))?;
    for line in io::stdin().lock().lines() {
        match line?.trim() {
            CHECK_COMMAND => crate::say(&shared.counted(&kept))?,
            KEEP_COMMAND => {
                // First the new: the memory of the old, just freed, would be taken again.
                let new = take(&mut random);
                shared.counted(&kept);
                kept = new;
                crate::say(&shared.counted(&kept))?;
            }
            _ => {}
        }
    }
    Ok(kept)
}

/// The largest first, while large blocks are free; small ones from what is left between.
fn take(random: &mut u64) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut bytes = ON_COMMAND_BYTES_MAX;
    while bytes >= ON_COMMAND_BYTES_MIN {
        for _ in 0..ON_COMMAND_TIMES {
            let seed = next(random);
            let mut data = vec![0; bytes];
            fill(&mut data, seed);
            pieces.push((data, seed));
        }
        bytes /= 2;
    }
    pieces
}

/// xorshift64*: the next of a row of numbers.
fn next(state: &mut u64) -> u64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    state.wrapping_mul(0x2545_F491_4F6C_DD1D)
}

/// One of the first `count` numbers.
fn below(random: &mut u64, count: usize) -> usize {
    usize::try_from(next(random) % count as u64).unwrap_or(0)
}

fn fill(data: &mut [u8], seed: u64) {
    let mut word = seed;
    for chunk in data.chunks_exact_mut(8) {
        word = word.wrapping_add(0x9E37_79B9_7F4A_7C15);
        chunk.copy_from_slice(&word.to_le_bytes());
    }
}

fn is_intact(data: &[u8], seed: u64) -> bool {
    let mut word = seed;
    data.chunks_exact(8).all(|chunk| {
        word = word.wrapping_add(0x9E37_79B9_7F4A_7C15);
        chunk == word.to_le_bytes()
    })
}

/// Sizes from 4 KiB up, small ones more often, in whole words.
fn size(random: &mut u64, max: u64) -> usize {
    let shift = next(random) % 10;
    let bytes = (4096 << shift).min(max);
    let bytes = bytes - bytes / 4 + next(random) % (bytes / 4);
    usize::try_from(bytes & !7).unwrap_or(4096)
}

fn churn_memory(shared: &Shared, number: u64) {
    let mut random = number.wrapping_mul(0x0123_4567_89AB_CDEF) | 1;
    let mut kept: Vec<Piece> = Vec::new();
    while shared.goes_on() {
        let seed = next(&mut random);
        let mut piece = vec![0; size(&mut random, PIECE_BYTES_MAX)];
        fill(&mut piece, seed);
        kept.push((piece, seed));
        if kept.len() > PIECES_KEPT {
            // Not the oldest always: what is freed lies between what is kept.
            let at = below(&mut random, kept.len());
            let (piece, seed) = kept.swap_remove(at);
            shared.verify(&piece, seed, &shared.pieces);
        }
    }
    for (piece, seed) in kept {
        shared.verify(&piece, seed, &shared.pieces);
    }
}

fn churn_files(shared: &Shared, dirs: &[PathBuf]) -> io::Result<()> {
    let mut random = 0xF11E_u64;
    let mut seeds = vec![[None; FILES_KEPT]; dirs.len()];
    let mut data = Vec::new();
    while shared.goes_on() {
        for (dir, seeds) in dirs.iter().zip(&mut seeds) {
            let number = below(&mut random, FILES_KEPT);
            let path = dir.join(format!("file-{number}"));
            if let Some(seed) = seeds[number].take() {
                data.clear();
                File::open(&path)?.read_to_end(&mut data)?;
                shared.verify(&data, seed, &shared.files);
                std::fs::remove_file(&path)?;
            } else {
                let seed = next(&mut random);
                data.resize(size(&mut random, FILE_BYTES_MAX), 0);
                fill(&mut data, seed);
                File::create(&path)?.write_all(&data)?;
                seeds[number] = Some(seed);
            }
        }
    }
    for (dir, seeds) in dirs.iter().zip(&seeds) {
        for (number, seed) in seeds.iter().enumerate() {
            if let Some(seed) = seed {
                data.clear();
                File::open(dir.join(format!("file-{number}")))?.read_to_end(&mut data)?;
                shared.verify(&data, *seed, &shared.files);
            }
        }
    }
    Ok(())
}

/// A process more: page tables, stacks and copied pages come and go.
fn churn_processes(shared: &Shared) -> io::Result<()> {
    while shared.goes_on() {
        let status = Command::new("/bin/true")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()?;
        shared.forks.fetch_add(1, Ordering::Relaxed);
        if !status.success() {
            shared.damaged.fetch_add(1, Ordering::Relaxed);
        }
        std::thread::sleep(FORK_EVERY);
    }
    Ok(())
}
