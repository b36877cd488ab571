//! Many clones of one idle guest, alive at once: what they take of the host's memory together.
//!
//! Each is resumed to its first answer and then stopped, so that the figures stand still. Memory is
//! counted once however many processes share it: the guest's by the blocks of its memory file, the
//! rest by each process's proportional part of what it has mapped.

use anyhow::{Context as _, Result};
use serde::Serialize;
use torpor_build::BuildId;
use torpor_sandbox::Sandbox;
use torpor_sandbox::host::Host;
use torpor_sandbox::resume::{ResumeOptions, resume};

use crate::watch::Watch;
use crate::{mib, ratio};

/// What some sandboxes take.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Taken {
    /// Guest memory.
    pub guest_bytes: u64,
    /// The VMMs, without it.
    pub vmm_bytes: u64,
    /// This process: their pagers and channels.
    pub keeper_bytes: u64,
}

impl Taken {
    /// All of it.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.guest_bytes + self.vmm_bytes + self.keeper_bytes
    }
}

/// The clones' figures.
#[derive(Debug, Clone, Serialize)]
pub struct Crowd {
    /// How many.
    pub clones: u32,
    /// The first of them, alone.
    pub one: Taken,
    /// All of them.
    pub all: Taken,
    /// All of them to the first alone.
    pub to_one: f64,
    /// All of them to one guest with all of its memory in place.
    pub to_filled: f64,
}

/// Resumes `build` so many times.
///
/// # Errors
/// A resume fails, or the host does not tell what a process takes.
pub async fn run(
    host: &Host,
    build: &BuildId,
    clones: u32,
    guest_memory_bytes: u64,
    watch: &Watch,
) -> Result<Crowd> {
    let _stage = watch.stage(format!("{clones} clones at once"));
    let before = mapped_bytes("self")?;
    let mut sandboxes: Vec<Sandbox> = Vec::new();
    let mut one = Taken::default();
    for clone in 1..=clones {
        let (sandbox, _) = Box::pin(resume(host, build, &ResumeOptions::default()))
            .await
            .with_context(|| format!("clone {clone} of {clones}"))?;
        sandbox.vmm().stop_vcpus().await?;
        sandboxes.push(sandbox);
        if clone == 1 {
            one = taken(&sandboxes, before)?;
        }
    }
    let all = taken(&sandboxes, before)?;
    for sandbox in sandboxes {
        sandbox.end().await;
    }
    let filled_bytes = guest_memory_bytes + one.vmm_bytes + one.keeper_bytes;
    let of = |whole| ratio(all.total_bytes(), whole).context("a sandbox takes no memory");
    Ok(Crowd {
        clones,
        one,
        all,
        to_one: of(one.total_bytes())?,
        to_filled: of(filled_bytes)?,
    })
}

fn taken(sandboxes: &[Sandbox], before_bytes: u64) -> Result<Taken> {
    let now_bytes = mapped_bytes("self")?;
    let mut taken = Taken {
        keeper_bytes: now_bytes.saturating_sub(before_bytes),
        ..Taken::default()
    };
    for sandbox in sandboxes {
        taken.guest_bytes += sandbox.vmm().memory()?.held_bytes()?;
        taken.vmm_bytes += mapped_bytes(&sandbox.vmm().pid().to_string())?;
    }
    Ok(taken)
}

/// A process's part of what it has mapped, memory files left out.
fn mapped_bytes(pid: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let rollup = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let of = |name: &str| -> Result<u64> {
        let value = rollup.lines().find_map(|line| line.strip_prefix(name));
        let kib = value.and_then(|value| value.split_whitespace().next());
        let kib = kib.with_context(|| format!("{path} names no {name}"))?;
        Ok(kib.parse::<u64>()? << 10)
    };
    Ok(of("Pss_Anon:")? + of("Pss_File:")?)
}

impl Crowd {
    /// For a person.
    #[must_use]
    pub fn text(&self) -> String {
        let row = |name: String, taken: &Taken| {
            let parts = [
                taken.guest_bytes,
                taken.vmm_bytes,
                taken.keeper_bytes,
                taken.total_bytes(),
            ];
            let parts = parts.map(|bytes| format!("{:.1}", mib(bytes)));
            std::iter::once(name).chain(parts).collect()
        };
        let rows = [
            row("1".to_owned(), &self.one),
            row(self.clones.to_string(), &self.all),
        ];
        let header = [
            "idle clones, MiB",
            "guest memory",
            "VMMs",
            "torpor",
            "together",
        ];
        format!(
            "{}\n{} clones take {:.1} x what one takes, {:.2} x what one takes with all of its memory in place",
            crate::report::table(&header, rows.into_iter()),
            self.clones,
            self.to_one,
            self.to_filled,
        )
    }
}
