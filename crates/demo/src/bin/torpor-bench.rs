//! `make bench`: torpor's figures against their targets, beside QEMU's own way, measured in the same
//! run on the same guest, and beside what the machine itself can do.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser;
use serde::Serialize;
use torpor_build::BuildId;
use torpor_demo::arms::{ArmReport, PLAIN, RECLAIM_DRAIN, prepare};
use torpor_demo::baseline::{self, Baseline};
use torpor_demo::bench_space::BenchSpace;
use torpor_demo::crowd::{self, Crowd};
use torpor_demo::limits::{self, Limit};
use torpor_demo::mib;
use torpor_demo::program::run_to_end;
use torpor_demo::report::{self, table, write_json};
use torpor_demo::series::{self, Mode, Series};
use torpor_demo::targets::{Target, resume_targets, targets};
use torpor_demo::templates::Templates;
use torpor_demo::watch::Watch;
use torpor_sandbox::host::Host;
use torpor_sandbox::vmm::VmmOptions;

/// Three templates, three stages for each of two arms, the series, the clones, and the baseline's two.
const STAGES: u64 = 3 + 2 * 3 + Mode::ALL.len() as u64 + 1 + 2;

/// Measure torpor against its targets, and against QEMU's own way.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Exit codes: 0 measured (met or missed), 1 something failed or a \
    guest was not verified, 130 interrupted.\n\nExample:\n  torpor-bench --iterations 30"
)]
struct Args {
    /// Resumes of each kind
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    iterations: u32,
    /// Clones that are kept alive at once to see what memory they take together
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100))]
    clones: u32,
    /// Where storage and results go; the storage in it is emptied first
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    out: PathBuf,
    /// Where the figures go as JSON [default: report.json in --out]
    #[arg(long, value_name = "PATH")]
    json: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct BenchReport {
    version: u32,
    vmm: String,
    iterations: u32,
    targets: Vec<Target>,
    arms: [ArmReport; 2],
    resume: Vec<Series>,
    clones: Crowd,
    qemu_migrate: Baseline,
    torpor_to_qemu: Ratios,
    limits: Vec<Limit>,
    verified: bool,
}

/// Torpor's figures as ratios to QEMU's own way.
#[derive(Debug, Clone, Serialize)]
struct Ratios {
    /// The build's own memory data and device state on the disk, to the migration's file.
    own_layer_bytes: f64,
    /// The distinct uncompressed memory of all layers, to the same.
    stored_bytes: f64,
    /// The freeze window, to the time from stop to the migration's end.
    freeze: f64,
    /// From stop to durable.
    durable: f64,
    /// The whole pause, reclaim and drain included, to the time from stop to durable.
    pause: f64,
    /// The median resume, warm.
    resume: f64,
}

#[tokio::main]
async fn main() -> ExitCode {
    run_to_end(run, "NO").await
}

async fn run(args: Args) -> Result<bool> {
    let space = BenchSpace::open(&args.out)?;
    let host = space.host(VmmOptions::default()).await?;
    let watch = Watch::new(STAGES);
    let arms = run_arms(&host, &watch).await?;
    let [plain, lean] = &arms;
    let resume = run_series(&host, &lean.build, args.iterations, &watch).await?;
    let clones = Box::pin(crowd::run(
        &host,
        &lean.build,
        args.clones,
        torpor_demo::GUEST_MEMORY_BYTES,
        &watch,
    ))
    .await?;
    let qemu = Box::pin(baseline::run(
        &host,
        &space.file(""),
        args.iterations,
        &watch,
    ))
    .await?;
    watch.end();

    let warm_ms = resume.first().context("no series")?.times.median_ms;
    let mut limits = Vec::new();
    for bytes in [
        lean.memory_stored_bytes,
        plain.memory_stored_bytes,
        qemu.file_bytes,
    ] {
        limits.push(limits::measure(bytes, &space.file(""))?);
    }
    let mut targets = targets(lean, plain, warm_ms);
    targets.extend(resume_targets(&resume));
    let verified = arms.iter().all(|arm| arm.verified) && qemu.verification.verified;
    let report = BenchReport {
        version: 1,
        vmm: host.vmm().identity().to_string(),
        iterations: args.iterations,
        targets,
        torpor_to_qemu: ratios(lean, &qemu, warm_ms),
        arms,
        resume,
        clones,
        qemu_migrate: qemu,
        limits,
        verified,
    };
    let json = args.json.unwrap_or_else(|| space.file("report.json"));
    write_json(&report, &json)?;
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "\n{}\n{}: {}",
        text(&report),
        report.vmm,
        json.display()
    )?;
    Ok(verified)
}

async fn run_series(
    host: &Host,
    build: &BuildId,
    iterations: u32,
    watch: &Watch,
) -> Result<Vec<Series>> {
    let mut all = Vec::new();
    for mode in Mode::ALL {
        all.push(Box::pin(series::run(host, build, mode, iterations, watch)).await?);
    }
    Ok(all)
}

async fn run_arms(host: &Host, watch: &Watch) -> Result<[ArmReport; 2]> {
    let templates = Templates::build(host, watch).await?;
    let mut reports = Vec::new();
    for arm in [PLAIN, RECLAIM_DRAIN] {
        let prepared = Box::pin(prepare(host, &templates, arm, watch)).await?;
        reports.push(Box::pin(prepared.pause(host, watch)).await?.0);
    }
    reports.try_into().ok().context("two arms give two reports")
}

#[expect(clippy::cast_precision_loss, reason = "ratios of sizes below 2^50")]
fn ratios(lean: &ArmReport, qemu: &Baseline, warm_ms: f64) -> Ratios {
    let file = qemu.file_bytes as f64;
    Ratios {
        own_layer_bytes: (lean.memory_compressed_bytes + lean.vmstate_bytes) as f64 / file,
        stored_bytes: lean.memory_stored_bytes as f64 / file,
        freeze: lean.freeze_ms / qemu.freeze_ms,
        durable: lean.durable_ms / qemu.durable_ms,
        pause: lean.pause.total_ms / qemu.durable_ms,
        resume: warm_ms / qemu.resume.median_ms,
    }
}

fn text(report: &BenchReport) -> String {
    let targets = report.targets.iter().map(|target| {
        let measured = target
            .measured
            .map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"));
        let met = if target.met { "met" } else { "MISSED" };
        vec![
            target.what.to_owned(),
            format!("{:.2}", target.at_most),
            measured,
            met.to_owned(),
        ]
    });
    let targets = table(&["target", "at most", "measured", ""], targets);
    let series = report
        .resume
        .iter()
        .map(|series| (series.mode.name(), series.times));
    let series = series
        .chain([("QEMU -incoming", report.qemu_migrate.resume)])
        .map(|(name, times)| {
            let ms = |ms: f64| format!("{ms:.0}");
            vec![
                name.to_owned(),
                ms(times.min_ms),
                ms(times.median_ms),
                ms(times.p95_ms),
            ]
        });
    let series = table(
        &["resume to first answer, ms", "min", "median", "p95"],
        series,
    );
    let arms = report::arms_table(&report.arms);
    [
        targets,
        arms,
        series,
        report.clones.text(),
        beside_text(report),
        limits_text(&report.limits),
    ]
    .join("\n\n")
}

fn beside_text(report: &BenchReport) -> String {
    let ([_, lean], qemu, to) = (&report.arms, &report.qemu_migrate, &report.torpor_to_qemu);
    let row = |what: &str, ours: String, theirs: f64, ratio: f64| {
        vec![
            what.to_owned(),
            ours,
            format!("{theirs:.1}"),
            format!("{ratio:.2}"),
        ]
    };
    let warm = report
        .resume
        .first()
        .map_or(0.0, |series| series.times.median_ms);
    let own = lean.memory_compressed_bytes + lean.vmstate_bytes;
    let file = mib(qemu.file_bytes);
    let rows = [
        row(
            "memory stored, all layers, uncompressed, MiB",
            format!("{:.1}", mib(lean.memory_stored_bytes)),
            file,
            to.stored_bytes,
        ),
        row(
            "this build's own file (its template's come on top), MiB",
            format!("{:.1}", mib(own)),
            file,
            to.own_layer_bytes,
        ),
        row(
            "freeze, ms",
            format!("{:.1}", lean.freeze_ms),
            qemu.freeze_ms,
            to.freeze,
        ),
        row(
            "stop to durable, ms",
            format!("{:.1}", lean.durable_ms),
            qemu.durable_ms,
            to.durable,
        ),
        row(
            "the whole pause, reclaim and drain included, ms",
            format!("{:.1}", lean.pause.total_ms),
            qemu.durable_ms,
            to.pause,
        ),
        row(
            "resume to first answer, median, ms",
            format!("{warm:.1}"),
            qemu.resume.median_ms,
            to.resume,
        ),
    ];
    table(
        &["side by side", "torpor", "QEMU migrate", "ratio"],
        rows.into_iter(),
    )
}

fn limits_text(limits: &[Limit]) -> String {
    let rows = limits.iter().map(|limit| {
        let ms = |ms: f64| format!("{ms:.1}");
        vec![
            format!("{:.1} MiB", mib(limit.bytes)),
            ms(limit.memcpy_ms),
            ms(limit.write_sync_ms),
        ]
    });
    table(&["this machine, ms", "memcpy", "write and sync"], rows)
}
