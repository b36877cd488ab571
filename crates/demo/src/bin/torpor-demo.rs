//! `make demo`: the main job on a real Linux guest.
//!
//! Builds three templates, pauses one workload in seven ways, resumes and verifies each build, resumes
//! the last one twice, and prints what each way stores and how long it takes.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result};
use clap::Parser;
use torpor_demo::arms::{self, ArmReport, prepare};
use torpor_demo::bench_space::BenchSpace;
use torpor_demo::clones::resume_twice;
use torpor_demo::program::run_to_end;
use torpor_demo::report::{self, DemoReport, REPORT_VERSION, write_json};
use torpor_demo::templates::Templates;
use torpor_demo::watch::Watch;
use torpor_demo::{elapsed_ms, picture};
use torpor_sandbox::host::Host;
use torpor_sandbox::vmm::{VmmKind, VmmOptions};
use torpor_workload::Check;

/// Three templates, three stages for each arm, and the clones.
const STAGES: u64 = 3 + 3 * arms::ALL.len() as u64 + 1;

/// Show torpor's main job on a real Linux guest: seven ways to pause, each resumed and verified.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Exit codes: 0 all verified, 1 something failed or is not as it \
    should be, 130 interrupted.\n\nExample:\n  torpor-demo --out /var/tmp/torpor-demo"
)]
struct Args {
    /// Where storage and results go; the storage in it is emptied first
    #[arg(long, value_name = "DIR", default_value = "target/demo")]
    out: PathBuf,

    /// Which VMM runs the guests: qemu or firecracker [default: qemu, for figures to compare]
    #[arg(long, value_name = "VMM")]
    vmm: Option<VmmKind>,

    /// The Firecracker to use, 1.10 or newer [default: firecracker from PATH]
    #[arg(long, value_name = "PATH", env = "TORPOR_FIRECRACKER")]
    firecracker: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> ExitCode {
    run_to_end(run, "NO and DAMAGED").await
}

async fn run(args: Args) -> Result<bool> {
    let started = Instant::now();
    let space = BenchSpace::open(&args.out)?;
    let vmm = VmmOptions {
        kind: args.vmm,
        firecracker: args.firecracker,
        ..VmmOptions::default()
    };
    let host = space.host(vmm).await?;
    let watch = Watch::new(STAGES);
    let templates = Templates::build(&host, &watch).await?;
    let (arms, before) = run_arms(&host, &templates, &watch).await?;
    let last = arms.last().context("no arm ran")?;
    let clones = {
        let _stage = watch.stage("the last build, resumed twice");
        Box::pin(resume_twice(&host, &last.build, &before)).await?
    };
    watch.end();

    let verified = clones.verified && arms.iter().all(|arm| arm.verified);
    let vmm = host.vmm().identity().to_string();
    let total_ms = elapsed_ms(started);
    let report = DemoReport {
        version: REPORT_VERSION,
        vmm,
        arms,
        clones,
        verified,
        total_ms,
    };
    let (json, svg) = (space.file("report.json"), space.file("report.svg"));
    write_json(&report, &json)?;
    svg::save(&svg, &picture::draw(&report.arms))
        .with_context(|| format!("cannot write {}", svg.display()))?;
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "\n{}\n\n{}\n",
        report::arms_table(&report.arms),
        report::steps_table(&report.arms)
    )?;
    writeln!(out, "{}\n", report::clones_text(&report.clones))?;
    writeln!(
        out,
        "{} in {:.0} s: {}, {}",
        report.vmm,
        total_ms / 1e3,
        json.display(),
        svg.display()
    )?;
    Ok(verified)
}

/// One after the other: two guests at once would disturb each other's figures.
async fn run_arms(
    host: &Host,
    templates: &Templates,
    watch: &Watch,
) -> Result<(Vec<ArmReport>, Check)> {
    let mut reports = Vec::new();
    let mut last = None;
    for arm in arms::ALL {
        let prepared = Box::pin(prepare(host, templates, arm, watch)).await?;
        let (report, before) = Box::pin(prepared.pause(host, watch)).await?;
        reports.push(report);
        last = Some(before);
    }
    Ok((reports, last.context("there are arms")?))
}
