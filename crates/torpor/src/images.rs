//! `torpor list-images` and `torpor delete-image`: base images, and the builds that keep them.

use serde::Serialize;
use torpor_build::{BuildId, Digest, Error as BuildError, ListedImage, Storage};

use crate::cli::DeleteImageArgs;
use crate::context::{Context, blocking};
use crate::error::CliError;
use crate::output::{mib, table};

#[derive(Debug, Serialize)]
struct Row {
    image: Digest,
    bytes: u64,
    /// What it takes on the disk: an image is sparse.
    stored_bytes: u64,
    /// The builds that name it: it is their guests' disk, and pages of theirs refer to it.
    builds: Vec<BuildId>,
}

impl From<ListedImage> for Row {
    fn from(listed: ListedImage) -> Self {
        Self {
            image: listed.digest,
            bytes: listed.bytes,
            stored_bytes: listed.stored_bytes,
            builds: listed.builds,
        }
    }
}

#[derive(Debug, Serialize)]
struct Images {
    images: Vec<Row>,
}

pub(crate) async fn list(context: &Context) -> Result<(), CliError> {
    let storage = context.open_storage().await?;
    let images = blocking(move || Ok(storage.list_images()?)).await?;
    let images = Images {
        images: images.into_iter().map(Row::from).collect(),
    };
    let printed = context.output.result(&images, list_text);
    printed.map_err(CliError::system("print the result"))
}

fn list_text(images: &Images) -> String {
    if images.images.is_empty() {
        return "no base images yet; `torpor create-build --template NAME` brings one".to_owned();
    }
    let rows: Vec<_> = images
        .images
        .iter()
        .map(|row| {
            vec![
                row.image.to_string(),
                row.builds.len().to_string(),
                mib(row.bytes),
                mib(row.stored_bytes),
            ]
        })
        .collect();
    table(&["base image", "builds", "size", "on disk"], &rows)
}

#[derive(Debug, Serialize)]
struct Deleted {
    deleted: Vec<Digest>,
}

pub(crate) async fn delete(context: &Context, args: DeleteImageArgs) -> Result<(), CliError> {
    let storage = context.open_storage().await?;
    let deleted = blocking(move || match &args.image {
        Some(image) => {
            storage.delete_image(image)?;
            Ok(vec![*image])
        }
        None => delete_unused(&storage),
    })
    .await?;
    let printed = context.output.result(&Deleted { deleted }, |done| {
        let rows = done.deleted.iter().map(|image| format!("deleted {image}"));
        let lines: Vec<_> = rows.collect();
        if lines.is_empty() {
            "every base image is needed by a build".to_owned()
        } else {
            lines.join("\n")
        }
    });
    printed.map_err(CliError::system("print the result"))
}

fn delete_unused(storage: &Storage) -> Result<Vec<Digest>, CliError> {
    let mut deleted = Vec::new();
    for listed in storage.list_images()? {
        match storage.delete_image(&listed.digest) {
            Ok(()) => deleted.push(listed.digest),
            // Named by a build, or by a sandbox that has none yet.
            Err(BuildError::ImageNeeded { .. } | BuildError::ImageInUse { .. }) => {}
            // Somebody else was faster.
            Err(BuildError::UnknownImage { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(deleted)
}
