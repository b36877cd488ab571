//! `make bench-capture`: the scan of the stopped guest and the references to the base image, against
//! their targets, beside what others do with the same guests and what the machine itself can do, all
//! in one run.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result};
use clap::Parser;
use serde::Serialize;
use torpor_demo::arms::{self, ArmReport, prepare};
use torpor_demo::bench_space::BenchSpace;
use torpor_demo::capture::fragmented::{self, Fragmented};
use torpor_demo::capture::pauses::{self, PauseLimit, PauseSeries};
use torpor_demo::capture::peers::{self, Peers};
use torpor_demo::capture::scan_time::{self, SIZES, ScanTimes};
use torpor_demo::capture::summary::{self, Line, Measured};
use torpor_demo::capture::warm::{self, Warm};
use torpor_demo::capture::{picture, tables};
use torpor_demo::elapsed_ms;
use torpor_demo::program::run_to_end;
use torpor_demo::report::{self, write_json};
use torpor_demo::templates::Templates;
use torpor_demo::watch::Watch;
use torpor_sandbox::host::Host;
use torpor_sandbox::vmm::VmmOptions;

/// The templates, the sizes and the lazily resumed guest, the fragmented guests, the warm resumes, the
/// peers' two guests.
const STAGES_FIXED: u64 = 3 + SIZES.len() as u64 + 1 + 2 + 1 + 2;
/// Of each arm.
const STAGES_PER_ARM: u64 = 3;
/// Of each round of pauses: two for each arm.
const STAGES_PER_ROUND: u64 = 2 * pauses::ARMS.len() as u64;
/// Raised with every change of a field's meaning.
const REPORT_VERSION: u32 = 1;

/// Measure exact capture: the free-page scan and the references to the base image, beside their peers.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Exit codes: 0 measured (met or missed), 1 something failed or a \
    guest was not verified, 130 interrupted.\n\nExample:\n  torpor-bench-capture --iterations 9 \
    --out /var/tmp/torpor-bench-capture"
)]
struct Args {
    /// Pauses, and resumes, of each kind
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    iterations: u32,
    /// Where storage and results go; the storage in it is emptied first
    #[arg(long, value_name = "DIR", default_value = "target/bench-capture")]
    out: PathBuf,
    /// Where the figures go as JSON [default: report.json in --out]
    #[arg(long, value_name = "PATH")]
    json: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct CaptureReport {
    version: u32,
    vmm: String,
    iterations: u32,
    summary: Vec<Line>,
    scan: ScanTimes,
    arms: Vec<ArmReport>,
    fragmented: Fragmented,
    pauses: Vec<PauseSeries>,
    pause_limit: PauseLimit,
    warm: Warm,
    peers: Peers,
    verified: bool,
    total_ms: f64,
}

#[tokio::main]
async fn main() -> ExitCode {
    run_to_end(run, "NO").await
}

async fn run(args: Args) -> Result<bool> {
    let space = BenchSpace::open(&args.out)?;
    let host = space.host(VmmOptions::default()).await?;
    let report = Box::pin(measure(&host, &space.file(""), args.iterations)).await?;
    let json = args.json.unwrap_or_else(|| space.file("report.json"));
    write_json(&report, &json)?;
    let svg = space.file("report.svg");
    svg::save(&svg, &picture::draw(&measured(&report)))
        .with_context(|| format!("cannot write {}", svg.display()))?;
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "\n{}\n\n{} in {:.0} s: {}, {}",
        text(&report),
        report.vmm,
        report.total_ms / 1e3,
        json.display(),
        svg.display()
    )?;
    Ok(report.verified)
}

/// One after the other: two guests at once would disturb each other's figures.
async fn measure(host: &Host, dir: &Path, iterations: u32) -> Result<CaptureReport> {
    let started = Instant::now();
    let rounds = u64::from(iterations) * STAGES_PER_ROUND;
    let watch = Watch::new(STAGES_FIXED + arms::ALL.len() as u64 * STAGES_PER_ARM + rounds);
    let templates = Templates::build(host, &watch).await?;
    let scan = Box::pin(scan_time::run(host, iterations, &watch)).await?;
    let mut arms = Vec::new();
    for arm in arms::ALL {
        let prepared = Box::pin(prepare(host, &templates, arm, &watch)).await?;
        arms.push(Box::pin(prepared.pause(host, &watch)).await?.0);
    }
    let fragmented = Box::pin(fragmented::run(host, &watch)).await?;
    let pauses = Box::pin(pauses::run(host, &templates, iterations, &watch)).await?;
    let warm = Box::pin(warm::run(host, &templates, iterations, &watch)).await?;
    let peers = Box::pin(peers::run(host, dir, &watch)).await?;
    let pause_limit = PauseLimit::measure(&pauses, dir)?;
    watch.end();
    let verified = arms.iter().all(|arm| arm.verified);
    let mut report = CaptureReport {
        version: REPORT_VERSION,
        vmm: host.vmm().identity().to_string(),
        iterations,
        summary: Vec::new(),
        scan,
        arms,
        fragmented,
        pauses,
        pause_limit,
        warm,
        peers,
        verified,
        total_ms: elapsed_ms(started),
    };
    report.summary = summary::lines(&measured(&report));
    Ok(report)
}

fn measured(report: &CaptureReport) -> Measured<'_> {
    Measured {
        scan: &report.scan,
        arms: &report.arms,
        fragmented: &report.fragmented,
        pauses: &report.pauses,
        pause_limit: report.pause_limit,
        warm: &report.warm,
        peers: &report.peers,
    }
}

fn text(report: &CaptureReport) -> String {
    [
        tables::summary(&report.summary),
        tables::scan(&report.scan),
        report::arms_table(&report.arms),
        tables::fragmented(&report.fragmented),
        tables::pauses(&report.pauses),
        tables::warm(&report.warm),
        tables::peers(&report.peers),
    ]
    .join("\n\n")
}
