//! `torpor inspect-memory`: what a guest's memory is made of.

use std::path::Path;

use serde::Serialize;
use torpor_anatomy::PageClass;
use torpor_build::PAGE_SIZE;
use torpor_sandbox::inspect::{LookRun, MemoryLook, look_into_build, look_into_sandbox};

use crate::cli::InspectMemoryArgs;
use crate::context::{Context, blocking};
use crate::error::CliError;
use crate::output::{mib, table};
use crate::page_map::{self, Style};

#[derive(Debug, Serialize)]
struct Inspected {
    /// The build or the sandbox.
    whose: String,
    #[serde(flatten)]
    look: MemoryLook,
}

pub(crate) async fn run(context: &Context, args: InspectMemoryArgs) -> Result<(), CliError> {
    let storage = context.open_storage().await?;
    let inspected = blocking(move || {
        let (whose, look) = match (&args.build, &args.sandbox) {
            (Some(named), _) => {
                let build = storage.open_build(&storage.resolve(named)?)?;
                (format!("build {}", build.id()), look_into_build(&build)?)
            }
            (None, Some(name)) => {
                let look = look_into_sandbox(&storage, name)?;
                (format!("sandbox {name}"), look)
            }
            (None, None) => return Err(CliError::Usage("name a build or a sandbox".to_owned())),
        };
        if let Some(path) = &args.svg {
            draw(&whose, &look, path)?;
        }
        Ok(Inspected { whose, look })
    })
    .await?;
    let printed = context.output.result(&inspected, text);
    printed.map_err(CliError::system("print the result"))
}

fn text(inspected: &Inspected) -> String {
    let look = &inspected.look;
    let size = |pages: u64| mib(pages.saturating_mul(PAGE_SIZE as u64));
    let rows: Vec<_> = look
        .classes
        .iter()
        .map(|class| {
            // Nobody looks at what nobody owns.
            let zero = match class.class {
                PageClass::Free | PageClass::Balloon => String::new(),
                _ => size(class.zero_pages),
            };
            vec![
                name_of(class.class).to_owned(),
                class.pages.to_string(),
                size(class.pages),
                zero,
            ]
        })
        .collect();
    format!(
        "memory of {}: {}, Linux {}\n\n{}",
        inspected.whose,
        mib(look.ram_bytes),
        look.kernel_release,
        table(&["", "pages", "size", "of it zero"], &rows)
    )
}

fn draw(whose: &str, look: &MemoryLook, path: &Path) -> Result<(), CliError> {
    let len_pages = look
        .runs
        .last()
        .map_or(0, |last| last.run.first_page + last.run.pages);
    let runs: Vec<_> = look
        .runs
        .iter()
        .map(|run| (run.run, shown_as(run)))
        .collect();
    let title = format!("guest memory of {whose}");
    let picture = page_map::draw(&title, len_pages, &runs, |shown| shown.style());
    std::fs::write(path, picture.to_string()).map_err(|source| CliError::Write {
        path: path.to_owned(),
        source,
    })
}

/// A page's colour: its class, or that it is zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Shown {
    Class(PageClass),
    Zero,
}

fn shown_as(run: &LookRun) -> Shown {
    if run.zero {
        Shown::Zero
    } else {
        Shown::Class(run.class)
    }
}

impl Shown {
    /// Told apart also without colour vision (ColorBrewer's paired scheme, by lightness).
    fn style(self) -> Style {
        let (colour, label) = match self {
            Self::Class(class) => (colour_of(class), name_of(class)),
            Self::Zero => ("#d9d9d9", "zero, in use"),
        };
        Style {
            colour,
            label: label.to_owned(),
        }
    }
}

fn colour_of(class: PageClass) -> &'static str {
    match class {
        PageClass::Free => "#ffffff",
        PageClass::PageCache => "#a6cee3",
        PageClass::Anonymous => "#1f78b4",
        PageClass::Slab => "#ff7f00",
        PageClass::Balloon => "#f0f0f0",
        PageClass::Kernel => "#b15928",
    }
}

fn name_of(class: PageClass) -> &'static str {
    match class {
        PageClass::Free => "free",
        PageClass::PageCache => "page cache",
        PageClass::Anonymous => "anonymous",
        PageClass::Slab => "slab",
        PageClass::Balloon => "balloon",
        PageClass::Kernel => "kernel",
    }
}
