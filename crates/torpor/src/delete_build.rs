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
    let storage = context.open_storage()?;
    // One piece of blocking work: an interrupt between its steps would leave the name removed.
    let deleted = blocking(move || Ok(delete(&storage, &args.build)?)).await?;
    let printed = context.output.result(&deleted, text);
    printed.map_err(CliError::system("print the result"))
}

fn delete(storage: &Storage, named: &str) -> Result<Deleted, BuildError> {
    let by_id = named.parse::<BuildId>().is_ok();
    let resolved = storage.resolve(named);
    if by_id {
        let id = resolved?;
        storage.delete_build(&id)?;
        return Ok(Deleted {
            build: Some(id),
            template: None,
        });
    }
    let name: Name = named.parse()?;
    let build = match resolved {
        Ok(id) => {
            delete_with_name(storage, &name, &id)?;
            Some(id)
        }
        // The name is all that is left of it.
        Err(BuildError::UnknownBuild { .. }) => {
            storage.remove_template(&name)?;
            None
        }
        Err(error) => return Err(error),
    };
    Ok(Deleted {
        build,
        template: Some(name),
    })
}

/// The name goes first, because a build that is named is not deleted; it comes back when the build
/// stays.
fn delete_with_name(storage: &Storage, name: &Name, id: &BuildId) -> Result<(), BuildError> {
    storage.remove_template(name)?;
    storage.delete_build(id).inspect_err(|_| {
        if let Err(error) = storage.set_template(name, id) {
            tracing::warn!(%name, %id, %error, "the template's name could not be given back");
        }
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
