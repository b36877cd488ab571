//! `torpor delete-build`: deletes a build that no other build stands on.

use serde::Serialize;
use torpor_build::{BuildId, Error as BuildError, Name, Storage};

use crate::cli::DeleteBuildArgs;
use crate::context::{Context, blocking};
use crate::error::CliError;

#[derive(Debug, Serialize)]
struct Deleted {
    /// `None` for a template whose build was gone already.
    build: Option<BuildId>,
    template: Option<Name>,
}

pub(crate) async fn run(context: &Context, args: DeleteBuildArgs) -> Result<(), CliError> {
    let storage = context.open_storage().await?;
    let deleted = blocking(move || Ok(delete(&storage, &args.build)?)).await?;
    let printed = context.output.result(&deleted, text);
    printed.map_err(CliError::system("print the result"))
}

fn delete(storage: &Storage, named: &str) -> Result<Deleted, BuildError> {
    if let Ok(id) = named.parse::<BuildId>() {
        storage.delete_build(&id)?;
        return Ok(Deleted {
            build: Some(id),
            template: None,
        });
    }
    let name: Name = named.parse()?;
    Ok(Deleted {
        build: storage.delete_template_and_build(&name)?,
        template: Some(name),
    })
}

fn text(deleted: &Deleted) -> String {
    match (&deleted.build, &deleted.template) {
        (Some(id), Some(name)) => format!("deleted build {id} and its template {name}"),
        (Some(id), None) => format!("deleted build {id}"),
        (None, Some(name)) => format!("deleted template {name}; its build was gone already"),
        (None, None) => String::new(),
    }
}
