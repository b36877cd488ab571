//! `torpor inspect-build`: what a build takes, what it leans on, and whether it is whole.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Serialize;
use torpor_build::{
    Build, BuildId, BuildStats, FileRecord, ImageStats, Name, PAGE_SIZE, Storage, ValidateOptions,
};
use torpor_sandbox::pause::report::PauseReport;

use crate::cli::InspectBuildArgs;
use crate::context::{Context, blocking};
use crate::error::CliError;
use crate::list_builds::utc;
use crate::output::{mib, table};
use crate::{memory_map, report};

#[derive(Debug, Serialize)]
struct Inspected {
    /// The build asked for; with `--recursive` then those below it, down to the first.
    builds: Vec<One>,
    #[serde(skip_serializing_if = "Option::is_none")]
    validation: Option<Validated>,
}

#[derive(Debug, Serialize)]
struct One {
    id: BuildId,
    parent: Option<BuildId>,
    template: Option<Name>,
    created: String,
    vmm: String,
    vcpus: u32,
    memory_bytes: u64,
    disk_bytes: u64,
    network: bool,
    free_page_reporting: bool,
    free_page_hinting: bool,
    base_image: Option<String>,
    kernel: Option<String>,
    working_set_bytes: u64,
    files: BTreeMap<String, FileRecord>,
    stats: BuildStats,
    /// As the pause wrote it, whatever version of torpor that was.
    pause_report: serde_json::Value,
}

#[derive(Debug, Serialize)]
struct Validated {
    builds: Vec<BuildId>,
    bytes: u64,
    frames: u64,
    problems: Vec<String>,
}

pub(crate) async fn run(context: &Context, args: InspectBuildArgs) -> Result<(), CliError> {
    let storage = context.open_storage().await?;
    let output = context.output;
    let (inspected, damage) = blocking(move || {
        let build = storage.open_build(&storage.resolve(&args.build)?)?;
        let mut damage = None;
        let mut validation = None;
        if args.validate {
            let bar = output.bytes_bar("read and verify everything");
            let recursive = args.recursive;
            let mut found =
                build.validate_with(ValidateOptions { recursive }, &mut |done, total| {
                    bar.set(done, total);
                });
            drop(bar);
            validation = Some(Validated {
                bytes: found.bytes,
                frames: found.frames,
                problems: found.problems.iter().map(ToString::to_string).collect(),
                builds: std::mem::take(&mut found.builds),
            });
            damage = damaged(build.id(), found.problems);
        }
        let builds = match chain(&storage, &build, args.recursive) {
            Ok(builds) => builds,
            // What the validation has found is the better message.
            Err(_) if damage.is_some() => Vec::new(),
            Err(error) => return Err(error),
        };
        if let Some(path) = &args.svg {
            draw(&build, path)?;
        }
        Ok((Inspected { builds, validation }, damage))
    })
    .await?;
    let printed = context.output.result(&inspected, text);
    printed.map_err(CliError::system("print the result"))?;
    damage.map_or(Ok(()), Err)
}

fn damaged(build: BuildId, problems: Vec<torpor_build::Error>) -> Option<CliError> {
    let count = problems.len();
    problems.into_iter().next().map(|first| CliError::Damaged {
        build,
        problems: count,
        first: Box::new(first),
    })
}

fn chain(storage: &Storage, build: &Build, recursive: bool) -> Result<Vec<One>, CliError> {
    let mut builds = vec![one(build)?];
    let mut seen = BTreeSet::from([build.id()]);
    let mut next = build.manifest().info.parent;
    // A chain that leads back to itself can be made by hand.
    while let Some(id) = next.filter(|id| recursive && seen.insert(*id)) {
        let below = storage.open_build(&id)?;
        builds.push(one(&below)?);
        next = below.manifest().info.parent;
    }
    Ok(builds)
}

fn one(build: &Build) -> Result<One, CliError> {
    let manifest = build.manifest();
    let info = &manifest.info;
    let vmm = &info.vmm;
    let working_set: u64 = info.working_set.iter().map(|run| run.pages).sum();
    Ok(One {
        id: manifest.id,
        parent: info.parent,
        template: info.template.clone(),
        created: utc(manifest.created_unix_ms),
        vmm: format!(
            "{} {} ({}, {})",
            vmm.name, vmm.version, vmm.machine, vmm.accel
        ),
        vcpus: info.vcpus,
        memory_bytes: info.memory_bytes,
        disk_bytes: info.disk_bytes,
        network: info.network,
        free_page_reporting: info.balloon.reporting,
        free_page_hinting: info.balloon.hinting,
        base_image: info.base_image.map(|digest| digest.to_string()),
        kernel: info.kernel.map(|digest| digest.to_string()),
        working_set_bytes: working_set.saturating_mul(PAGE_SIZE as u64),
        files: manifest.files.clone(),
        stats: build.stats()?,
        pause_report: info.pause_report.clone(),
    })
}

fn draw(build: &Build, path: &Path) -> Result<(), CliError> {
    let picture = memory_map::draw(build.memory()?.index()).to_string();
    std::fs::write(path, picture).map_err(|source| CliError::Write {
        path: path.to_owned(),
        source,
    })
}

fn text(inspected: &Inspected) -> String {
    let mut parts: Vec<String> = inspected.builds.iter().map(one_text).collect();
    if let Some(validation) = &inspected.validation {
        let looked_at = format!(
            "{} build(s), {} and {} frames verified",
            validation.builds.len(),
            mib(validation.bytes),
            validation.frames
        );
        parts.push(if validation.problems.is_empty() {
            format!("whole: {looked_at}")
        } else {
            format!("DAMAGED: {looked_at}\n{}", validation.problems.join("\n"))
        });
    }
    parts.join("\n\n")
}

fn one_text(build: &One) -> String {
    let parent = build
        .parent
        .map_or_else(|| "none".to_owned(), |id| id.to_string());
    let template = build.template.as_ref().map_or("none", |name| name.as_str());
    let head = format!(
        "build {}\n  created {}, parent {parent}, template {template}\n  {}, {} vCPU, network {}, \
         page reporting {}, hinting {}\n  working set of the resume before: {}",
        build.id,
        build.created,
        build.vmm,
        build.vcpus,
        on_off(build.network),
        on_off(build.free_page_reporting),
        on_off(build.free_page_hinting),
        mib(build.working_set_bytes),
    );
    let images: Vec<_> = [("memory", &build.stats.memory), ("disk", &build.stats.disk)]
        .into_iter()
        .filter_map(|(name, stats)| Some((name, stats.as_ref()?)))
        .collect();
    let mut parts = vec![head];
    if !images.is_empty() {
        parts.push(sizes_table(&images));
        parts.push(layers_table(build.id, &images));
    }
    parts.push(files_table(build));
    if let Ok(pause) = serde_json::from_value::<PauseReport>(build.pause_report.clone()) {
        parts.push(report::pause_text(&pause));
    }
    parts.join("\n\n")
}

fn on_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

fn pages(pages: u64) -> String {
    mib(pages.saturating_mul(PAGE_SIZE as u64))
}

fn sizes_table(images: &[(&str, &ImageStats)]) -> String {
    let heading = [
        "image",
        "size",
        "zero",
        "removed",
        "free",
        "base image",
        "reached",
        "own",
        "on disk",
    ];
    let rows: Vec<_> = images
        .iter()
        .map(|(name, stats)| {
            vec![
                (*name).to_owned(),
                pages(stats.len_pages),
                pages(stats.pages.zero),
                pages(stats.pages.removed),
                pages(stats.pages.free),
                pages(stats.pages.base_image),
                mib(stats.reachable_stored_bytes),
                pages(stats.own_stored_pages),
                mib(stats.data_file_bytes + stats.index_file_bytes),
            ]
        })
        .collect();
    table(&heading, &rows)
}

fn layers_table(own: BuildId, images: &[(&str, &ImageStats)]) -> String {
    let mut rows = Vec::new();
    for (name, stats) in images {
        for layer in &stats.layers {
            let whose = if layer.build == own {
                " (this build)"
            } else {
                ""
            };
            rows.push(vec![
                format!("{}{whose}", layer.build),
                (*name).to_owned(),
                layer.pages.to_string(),
                layer.distinct_pages.to_string(),
                pages(layer.distinct_pages),
            ]);
        }
    }
    table(&["layer", "image", "pages", "distinct", "bytes"], &rows)
}

fn files_table(build: &One) -> String {
    let rows: Vec<_> = build
        .files
        .iter()
        .map(|(name, file)| {
            vec![
                name.clone(),
                file.bytes.to_string(),
                file.digest.to_string(),
            ]
        })
        .collect();
    table(&["file", "bytes", "BLAKE3"], &rows)
}
