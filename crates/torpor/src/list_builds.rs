//! `torpor list-builds`: all builds, and the templates that name them.

use std::time::{Duration, UNIX_EPOCH};

use serde::Serialize;
use torpor_build::{BuildId, ListedBuild, Name, Storage};

use crate::context::{Context, blocking};
use crate::error::CliError;
use crate::output::{mib, table};

#[derive(Debug, Serialize)]
struct List {
    builds: Vec<Row>,
    /// Names that mean nothing (any more).
    broken_templates: Vec<BrokenTemplate>,
}

#[derive(Debug, Serialize)]
struct Row {
    id: BuildId,
    templates: Vec<Name>,
    #[serde(flatten)]
    build: Legible,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Legible {
    Whole(Whole),
    Broken { error: String },
}

#[derive(Debug, Serialize)]
struct Whole {
    parent: Option<BuildId>,
    created: String,
    memory_bytes: u64,
    stored_bytes: u64,
}

#[derive(Debug, Serialize)]
struct BrokenTemplate {
    name: Name,
    error: String,
}

pub(crate) async fn run(context: &Context) -> Result<(), CliError> {
    let storage = context.open_storage().await?;
    let list = blocking(move || list(&storage)).await?;
    let printed = context.output.result(&list, text);
    printed.map_err(CliError::system("print the result"))
}

fn list(storage: &Storage) -> Result<List, CliError> {
    let builds = storage.list_builds()?;
    let mut broken_templates = Vec::new();
    let mut named = Vec::new();
    for (name, build) in storage.list_templates()? {
        match build {
            Ok(id) if builds.iter().any(|build| build.id == id) => named.push((name, id)),
            Ok(id) => broken_templates.push(BrokenTemplate {
                name,
                error: format!("its build {id} does not exist"),
            }),
            Err(error) => broken_templates.push(BrokenTemplate {
                name,
                error: error.to_string(),
            }),
        }
    }
    let templates_of = |id: BuildId| {
        let names = named.iter().filter(|(_, named)| *named == id);
        names.map(|(name, _)| name.clone()).collect()
    };
    let row = |listed: ListedBuild| Row {
        id: listed.id,
        templates: templates_of(listed.id),
        build: match listed.manifest {
            Ok(manifest) => Legible::Whole(Whole {
                parent: manifest.info.parent,
                created: utc(manifest.created_unix_ms),
                memory_bytes: manifest.info.memory_bytes,
                stored_bytes: manifest.files.values().map(|file| file.bytes).sum(),
            }),
            Err(error) => Legible::Broken {
                error: error.to_string(),
            },
        },
    };
    Ok(List {
        builds: builds.into_iter().map(row).collect(),
        broken_templates,
    })
}

/// `2026-01-31T12:00:00Z`.
pub(crate) fn utc(unix_ms: u64) -> String {
    // A manifest may say anything; years beyond 9999 cannot be written.
    let time = UNIX_EPOCH + Duration::from_millis(unix_ms.min(LAST_UNIX_MS));
    humantime::format_rfc3339_seconds(time).to_string()
}

/// The last second of the year 9999.
const LAST_UNIX_MS: u64 = 253_402_300_799_000;

fn text(list: &List) -> String {
    if list.builds.is_empty() && list.broken_templates.is_empty() {
        return "no builds yet; `torpor create-build --template NAME` makes one".to_owned();
    }
    let mut rows = Vec::new();
    let mut remarks = String::new();
    for row in &list.builds {
        let names: Vec<_> = row.templates.iter().map(Name::as_str).collect();
        let mut cells = vec![row.id.to_string(), names.join(" ")];
        match &row.build {
            Legible::Whole(build) => cells.extend([
                build
                    .parent
                    .map_or_else(|| "-".to_owned(), |id| id.to_string()),
                build.created.clone(),
                mib(build.memory_bytes),
                mib(build.stored_bytes),
            ]),
            Legible::Broken { error } => {
                cells.push("broken".to_owned());
                remarks += &format!("\n{}: {}", row.id, error);
            }
        }
        rows.push(cells);
    }
    for broken in &list.broken_templates {
        remarks += &format!("\ntemplate {}: {}", broken.name, broken.error);
    }
    let heading = [
        "id",
        "templates",
        "parent",
        "created (UTC)",
        "memory",
        "stored",
    ];
    format!("{}\n{remarks}", table(&heading, &rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_in_utc_whatever_a_manifest_says() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(1_700_000_000_999), "2023-11-14T22:13:20Z");
        assert_eq!(utc(u64::MAX), "9999-12-31T23:59:59Z");
    }
}
