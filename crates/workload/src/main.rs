//! The demo's workload. `torpor-workload run DIR CACHE_MIB FREED_MIB KEPT_MIB` does the work and
//! then answers commands; `torpor-workload count FILE` is the process that goes on counting;
//! `torpor-workload churn DIR` uses, frees and verifies memory until it is told to stop;
//! `torpor-workload free-pages` watches which pages the kernel calls free, until it is asked.

mod churn;
mod free_pages;

use std::fs::File;
use std::io::{self, BufRead, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use torpor_workload::{CHECK_COMMAND, Check, Ready, WorkloadSize};
use xxhash_rust::xxh3::xxh3_64;

const MIB: u64 = 1 << 20;
/// Size of the file on disk and of the one in /dev/shm.
const FILE_BYTES: usize = 1 << 20;
/// Where the files stand that fill the page cache: whatever distribution the guest has. (`/lib` is
/// part of `/usr` in all of them; reading it again would count the same files twice.)
const CACHE_ROOTS: [&str; 2] = ["/opt", "/usr"];
/// How often the counter counts: often enough to show a stop of a few milliseconds.
const COUNT_EVERY: Duration = Duration::from_millis(5);

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["run", dir, cache, freed, kept] => {
            parse_size(cache, freed, kept).and_then(|size| run(Path::new(dir), size))
        }
        ["count", file] => count(Path::new(file)),
        ["churn", dir] => churn::run(Path::new(dir)),
        ["free-pages"] => free_pages::run(),
        _ => Err(io::Error::other(
            "usage: torpor-workload run DIR CACHE_MIB FREED_MIB KEPT_MIB | count FILE | churn DIR | free-pages",
        )),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nowhere to report a broken standard error to.
            drop(writeln!(io::stderr(), "torpor-workload: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn parse_size(cache: &str, freed: &str, kept: &str) -> io::Result<WorkloadSize> {
    let mib = |text: &str| text.parse::<u64>().map_err(io::Error::other);
    Ok(WorkloadSize {
        cache_mib: mib(cache)?,
        freed_mib: mib(freed)?,
        kept_mib: mib(kept)?,
    })
}

/// What must survive a pause.
struct Kept {
    memory: Vec<u8>,
    memory_sum: u64,
    disk_file: PathBuf,
    shm_file: PathBuf,
    file_sum: u64,
    counter_file: PathBuf,
}

fn run(dir: &Path, size: WorkloadSize) -> io::Result<()> {
    let started = Instant::now();
    std::fs::create_dir_all(dir)?;
    let mut random = Random::new()?;
    // The kept state first: what is freed later must not have been swept up behind it.
    let kept = keep(dir, size, &mut random)?;
    let cache_bytes = fill_page_cache(size.cache_mib * MIB)?;
    let freed_bytes = use_and_free(size.freed_mib * MIB, &mut random)?;
    let ready = Ready {
        cache_bytes,
        freed_bytes,
        kept_bytes: size.kept_mib * MIB,
        elapsed_ms: millis(started.elapsed()),
    };
    say(&ready)?;
    for line in io::stdin().lock().lines() {
        if line?.trim() == CHECK_COMMAND {
            say(&check(&kept)?)?;
        }
    }
    Ok(())
}

fn keep(dir: &Path, size: WorkloadSize, random: &mut Random) -> io::Result<Kept> {
    let memory = random.bytes(to_len(size.kept_mib * MIB)?);
    let contents = random.bytes(FILE_BYTES);
    let disk_file = dir.join("kept");
    let shm_file = PathBuf::from("/dev/shm/kept");
    let counter_file = PathBuf::from("/dev/shm/counter");
    for path in [&disk_file, &shm_file] {
        let mut file = File::create(path)?;
        file.write_all(&contents)?;
        file.sync_all()?;
    }
    File::create(&counter_file)?.write_all(b"0\n")?;
    Command::new(std::env::current_exe()?)
        .arg("count")
        .arg(&counter_file)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()?;
    Ok(Kept {
        memory_sum: xxh3_64(&memory),
        memory,
        disk_file,
        shm_file,
        file_sum: xxh3_64(&contents),
        counter_file,
    })
}

fn fill_page_cache(want_bytes: u64) -> io::Result<u64> {
    let mut read_bytes = 0;
    let mut buffer = vec![0; 1 << 18];
    let mut dirs: Vec<PathBuf> = CACHE_ROOTS.iter().map(PathBuf::from).collect();
    while let Some(dir) = dirs.pop() {
        let Ok(entries) = std::fs::read_dir(&dir) else {
            continue;
        };
        for entry in entries.flatten() {
            if read_bytes >= want_bytes {
                return Ok(read_bytes);
            }
            let Ok(kind) = entry.file_type() else {
                continue;
            };
            if kind.is_dir() {
                dirs.push(entry.path());
            } else if kind.is_file() {
                let mut file = File::open(entry.path())?;
                loop {
                    let got = file.read(&mut buffer)?;
                    if got == 0 {
                        break;
                    }
                    read_bytes += got as u64;
                }
            }
        }
    }
    Ok(read_bytes)
}

fn use_and_free(bytes: u64, random: &mut Random) -> io::Result<u64> {
    let memory = random.bytes(to_len(bytes)?);
    // Seen, as far as the compiler knows: it must not leave the filling out.
    drop(std::hint::black_box(memory));
    Ok(bytes)
}

fn check(kept: &Kept) -> io::Result<Check> {
    let sum_of = |path: &Path| std::fs::read(path).map(|contents| xxh3_64(&contents));
    let memory_intact = xxh3_64(&kept.memory) == kept.memory_sum;
    let disk_file_intact = sum_of(&kept.disk_file)? == kept.file_sum;
    let shm_file_intact = sum_of(&kept.shm_file)? == kept.file_sum;
    let counter = std::fs::read_to_string(&kept.counter_file)?;
    let mut random = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut random)?;
    // Last: who asked compares it with his own clock when the answer arrives.
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_err(io::Error::other)?;
    Ok(Check {
        memory_intact,
        disk_file_intact,
        shm_file_intact,
        counter: counter.trim().parse().map_err(io::Error::other)?,
        realtime_ms: millis(now),
        random: random.iter().map(|byte| format!("{byte:02x}")).collect(),
    })
}

fn count(file: &Path) -> io::Result<()> {
    use std::os::unix::fs::FileExt as _;
    let out = File::options().write(true).open(file)?;
    for counter in 1_u64.. {
        // One write of a fixed length: a reader never sees half a number.
        out.write_all_at(format!("{counter:020}\n").as_bytes(), 0)?;
        std::thread::sleep(COUNT_EVERY);
    }
    Ok(())
}

fn say(line: &impl serde::Serialize) -> io::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, line)?;
    out.write_all(b"\n")?;
    out.flush()
}

fn to_len(bytes: u64) -> io::Result<usize> {
    usize::try_from(bytes).map_err(io::Error::other)
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// xorshift64*, seeded by the kernel: fast under emulation, and no two pages alike.
struct Random(u64);

impl Random {
    fn new() -> io::Result<Self> {
        let mut seed = [0; 8];
        File::open("/dev/urandom")?.read_exact(&mut seed)?;
        Ok(Self(u64::from_le_bytes(seed) | 1))
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        for chunk in bytes.chunks_mut(8) {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            let word = self.0.wrapping_mul(0x2545_F491_4F6C_DD1D);
            chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
        }
        bytes
    }
}
