//! The driver of `torpor-workload` in the guest: brings it in, starts it, asks it to check itself.
//!
//! The program goes to the guest's disk, like any program: a template holds it, and its pages are
//! page cache that a reclaim may drop. It is started with its standard input open and a tag, so
//! that a driver that comes after a resume finds it.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Serialize;
use serde::de::DeserializeOwned;
use torpor_guest::{Command, Envd, Process, ProcessEvent, Selector};
use torpor_workload::{CHECK_COMMAND, Check, DEMO_SIZE, Ready};

/// The program's name, beside ours and in the guest.
const PROGRAM: &str = "torpor-workload";
/// Where it is in the guest.
const GUEST_PROGRAM: &str = "/usr/local/bin/torpor-workload";
/// Where it keeps its file on the guest's disk.
const GUEST_DIR: &str = "/root/workload";
const TAG: &str = "workload";
/// How much of the program goes with one SendInput: far below envd's limit for a message.
const CHUNK_BYTES: usize = 256 << 10;
/// A static program of ours has about 1 MiB with its symbols stripped; with them a few.
const PROGRAM_BYTES_MAX: u64 = 32 << 20;
/// Longest wait for a short command in the guest.
const COMMAND_MAX: Duration = Duration::from_secs(30);
/// Longest wait for the whole workload: 5 to 10 s emulated, on an idle machine.
const WORK_MAX: Duration = Duration::from_secs(120);
/// The longest line that the workload prints is a few hundred bytes.
const LINE_BYTES_MAX: usize = 16 << 10;
/// Between two looks at the counter, which counts every 5 ms.
const COUNTER_WATCH: Duration = Duration::from_millis(100);
/// How far a resumed guest's clock may be from the host's.
const CLOCK_OFF_MS_MAX: i64 = 1000;

/// Sends the program into the guest.
///
/// # Errors
/// It is not beside ours, or the guest does not take it.
pub async fn install(envd: &Envd) -> Result<()> {
    let path = find_program()?;
    let bytes = std::fs::metadata(&path)?.len();
    ensure!(
        bytes <= PROGRAM_BYTES_MAX,
        "{} has {bytes} bytes: is it the workload?",
        path.display()
    );
    let program =
        std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let line = format!("cat > {GUEST_PROGRAM} && chmod 755 {GUEST_PROGRAM} && sync");
    let receiver = envd
        .start(&Command::shell(line).stdin(), Some(COMMAND_MAX))
        .await?;
    let selector = Selector::Pid(receiver.pid());
    for chunk in program.chunks(CHUNK_BYTES) {
        envd.send_input(&selector, chunk).await?;
    }
    envd.close_stdin(&selector).await?;
    let output = receiver.output().await?;
    ensure!(
        output.exit.success(),
        "{}: {}",
        output.exit.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

fn find_program() -> Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name(PROGRAM);
    ensure!(
        path.is_file(),
        "{} is missing: run `make build`",
        path.display()
    );
    Ok(path)
}

/// Does the demo's workload; it stays in the guest and waits.
///
/// # Errors
/// It fails, or takes too long.
pub async fn work(envd: &Envd) -> Result<Ready> {
    let size = DEMO_SIZE;
    let mut command = Command::new(GUEST_PROGRAM)
        .arg("run")
        .arg(GUEST_DIR)
        .stdin()
        .tag(TAG);
    for mib in [size.cache_mib, size.freed_mib, size.kept_mib] {
        command = command.arg(mib.to_string());
    }
    let mut process = envd.start(&command, None).await?;
    let ready: Ready = read_line(&mut process, WORK_MAX)
        .await
        .context("the workload does not get ready")?;
    ensure!(
        ready.cache_bytes >= size.cache_mib << 20,
        "the guest has only {} bytes of files to read: use a larger base image",
        ready.cache_bytes
    );
    Ok(ready)
}

/// Asks the workload to look at its state.
///
/// # Errors
/// It is not there any more, or does not answer.
pub async fn check(envd: &Envd) -> Result<Check> {
    let selector = Selector::Tag(TAG.to_owned());
    let mut process = envd
        .connect(&selector)
        .await
        .context("the workload is gone")?;
    envd.send_input(&selector, format!("{CHECK_COMMAND}\n").as_bytes())
        .await?;
    read_line(&mut process, COMMAND_MAX)
        .await
        .context("the workload does not check itself")
}

/// What was found in a resumed guest.
#[derive(Debug, Clone, Serialize)]
pub struct Verification {
    /// The kept memory has its checksum.
    pub memory_intact: bool,
    /// The file on disk has its checksum; the guest's page cache was dropped first.
    pub disk_file_intact: bool,
    /// The file in /dev/shm has its checksum.
    pub shm_file_intact: bool,
    /// The counter right before the pause.
    pub counter_before: u64,
    /// The counter after the resume, and a moment later.
    pub counter_after: [u64; 2],
    /// How far the guest's clock is from the host's.
    pub clock_off_ms: i64,
    /// Random bytes of the guest's kernel.
    pub random: String,
    /// Whether all of it is as it should be.
    pub verified: bool,
}

/// Verifies a resumed guest whose workload found `before` right before the pause.
///
/// # Errors
/// The guest or the workload does not answer. Damage is no error, but in the result.
pub async fn verify(envd: &Envd, before: &Check) -> Result<Verification> {
    // Otherwise the file is read from memory, and the disk is not looked at.
    shell(envd, "sync; echo 1 > /proc/sys/vm/drop_caches").await?;
    let first = check(envd).await?;
    let clock_off_ms = clock_off(first.realtime_ms)?;
    tokio::time::sleep(COUNTER_WATCH).await;
    let later = check(envd).await?;
    let intact = [
        first.memory_intact,
        first.disk_file_intact,
        first.shm_file_intact,
    ];
    let counting = before.counter < first.counter && first.counter < later.counter;
    let verified = intact == [true; 3] && counting && clock_off_ms.abs() <= CLOCK_OFF_MS_MAX;
    Ok(Verification {
        memory_intact: first.memory_intact,
        disk_file_intact: first.disk_file_intact,
        shm_file_intact: first.shm_file_intact,
        counter_before: before.counter,
        counter_after: [first.counter, later.counter],
        clock_off_ms,
        random: first.random,
        verified,
    })
}

/// The guest answered a moment ago: that moment counts as its clock's error, in our disfavour.
fn clock_off(guest_ms: u64) -> Result<i64> {
    let host_ms = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
    Ok(i64::try_from(guest_ms)? - i64::try_from(host_ms)?)
}

/// Runs a line in the guest's shell.
///
/// # Errors
/// It fails.
pub async fn shell(envd: &Envd, line: &str) -> Result<String> {
    shell_within(envd, line, COMMAND_MAX).await
}

/// The same, for a line that takes longer.
///
/// # Errors
/// It fails, or is not done within `patience`.
pub async fn shell_within(envd: &Envd, line: &str, patience: Duration) -> Result<String> {
    let output = envd.run(&Command::shell(line), patience).await?;
    ensure!(
        output.exit.success(),
        "`{line}` in the guest: {} {}",
        output.exit.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}

/// Reads the workload's next line.
async fn read_line<T: DeserializeOwned>(process: &mut Process, patience: Duration) -> Result<T> {
    let mut line = Vec::new();
    let read = async {
        loop {
            match process.next().await? {
                Some(ProcessEvent::Stdout(bytes) | ProcessEvent::Pty(bytes)) => line.extend(bytes),
                Some(ProcessEvent::Stderr(bytes)) => {
                    bail!("it says: {}", String::from_utf8_lossy(&bytes).trim())
                }
                Some(ProcessEvent::End(exit)) => bail!("it ended: {}", exit.status),
                None => bail!("it ended"),
            }
            if let Some(end) = line.iter().position(|&byte| byte == b'\n') {
                return Ok(serde_json::from_slice(&line[..end])?);
            }
            ensure!(line.len() <= LINE_BYTES_MAX, "it prints without end");
        }
    };
    tokio::time::timeout(patience, read)
        .await
        .with_context(|| format!("no answer within {} s", patience.as_secs()))?
}
