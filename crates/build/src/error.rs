//! What can go wrong, with the file, the offset and the next step.

use std::io;
use std::path::{Path, PathBuf};

use crate::ids::{BuildId, Digest, Name, ParseIdError};

/// This crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong with a build or its storage.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb: "read", "create".
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// No room: the disk, the quota or the process's file size limit is full.
    #[error(
        "no room to {action} {}: {source}; free space on that file system, or use another \
         --storage, and try again",
        path.display()
    )]
    Full {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// ENOSPC, EDQUOT or EFBIG.
        source: io::Error,
    },
    /// A file does not verify.
    #[error(
        "{} is damaged at byte {offset}: {what}; restore it from a copy, or delete what it \
         belongs to",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where in it, in bytes.
        offset: u64,
        /// What was expected and found.
        what: String,
    },
    /// A file of a format that this version does not know.
    #[error(
        "{} has format version {found}, this torpor reads up to {known}: use a newer torpor",
        path.display()
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest version known here.
        known: u32,
    },
    /// No build has this id.
    #[error("there is no build {id}; `torpor list-builds` shows what there is")]
    UnknownBuild {
        /// The id asked for.
        id: BuildId,
    },
    /// No template has this name.
    #[error("there is no template {name}; `torpor list-builds` shows what there is")]
    UnknownTemplate {
        /// The name asked for.
        name: Name,
    },
    /// A base image is not (or no longer) in the storage.
    #[error("base image {digest} is not in {}; import it again", path.display())]
    UnknownImage {
        /// The digest asked for.
        digest: Digest,
        /// Where it was looked for.
        path: PathBuf,
    },
    /// Builds refer to this base image.
    #[error(
        "base image {digest} is needed by build {}: delete that first",
        list(builds)
    )]
    ImageNeeded {
        /// The image that was to be deleted.
        digest: Digest,
        /// The builds whose base image it is.
        builds: Vec<BuildId>,
    },
    /// Builds that cannot be read may refer to this base image.
    #[error(
        "base image {digest} cannot be deleted: build {} cannot be read and may need it; repair \
         or delete that first",
        list(unreadable)
    )]
    ImageMayBeNeeded {
        /// The image that was to be deleted.
        digest: Digest,
        /// Builds whose manifest does not tell their base image.
        unreadable: Vec<BuildId>,
    },
    /// The base image is open somewhere.
    #[error("base image {digest} is in use by a sandbox or a pause: end that first")]
    ImageInUse {
        /// The image that was to be deleted.
        digest: Digest,
    },
    /// Pages would refer to another base image than the build's.
    #[error(
        "build {id}: its {image} image refers to blocks of base image {referred}, but the build's \
         base image is {}",
        found.map_or_else(|| "none".to_owned(), |found| found.to_string())
    )]
    BaseImageMismatch {
        /// The build being written.
        id: BuildId,
        /// The image.
        image: &'static str,
        /// The base image that its pages refer to.
        referred: Digest,
        /// The base image that was given beside it.
        found: Option<Digest>,
    },
    /// A kernel is not (or no longer) in the storage.
    #[error("kernel {digest} is not in {}; import it again", path.display())]
    UnknownKernel {
        /// The digest asked for.
        digest: Digest,
        /// Where it was looked for.
        path: PathBuf,
    },
    /// Text that is neither a build id nor a name.
    #[error(transparent)]
    Id(#[from] ParseIdError),
    /// A template may not be called like a build.
    #[error("a template cannot be called {name}: that is a build id; choose another name")]
    NameIsAnId {
        /// The name asked for.
        name: Name,
    },
    /// The id is taken: builds are immutable.
    #[error("build {id} exists already and builds are immutable: choose another id")]
    BuildExists {
        /// The id asked for.
        id: BuildId,
    },
    /// Someone else is committing this id right now.
    #[error(
        "build {id} is being written by another torpor: wait until it ends, or choose another id"
    )]
    BuildBusy {
        /// The id asked for.
        id: BuildId,
    },
    /// The build is open somewhere.
    #[error("build {id} is in use by a sandbox or a pause: end that first")]
    BuildInUse {
        /// The build that was to be deleted.
        id: BuildId,
    },
    /// Other builds stand on this one.
    #[error("build {id} has children: delete {} first", list(children))]
    HasChildren {
        /// The build that was to be deleted.
        id: BuildId,
        /// Builds whose parent it is.
        children: Vec<BuildId>,
    },
    /// Builds that cannot be read may stand on this one.
    #[error(
        "build {id} cannot be deleted: {} cannot be read and may stand on it; repair or delete \
         that first",
        list(unreadable)
    )]
    MayHaveChildren {
        /// The build that was to be deleted.
        id: BuildId,
        /// Builds whose manifest does not tell their parent.
        unreadable: Vec<BuildId>,
    },
    /// Templates name this build.
    #[error(
        "build {id} is what template {} names: give the template another build, or delete the \
         template, first",
        list(templates)
    )]
    NamedByTemplate {
        /// The build that was to be deleted.
        id: BuildId,
        /// The templates.
        templates: Vec<Name>,
    },
    /// The parent went away while its child was written.
    #[error("build {id} cannot be committed: its parent {parent} has been deleted meanwhile")]
    ParentGone {
        /// The build that was to be committed.
        id: BuildId,
        /// What it stands on.
        parent: BuildId,
    },
    /// An image was written on another build than the one that the manifest calls the parent.
    #[error(
        "build {id} cannot be committed: its {image} image stands on {}, its manifest on {}",
        or_none(image_parent.as_ref()), or_none(manifest_parent.as_ref())
    )]
    ParentMismatch {
        /// The build that was to be committed.
        id: BuildId,
        /// The image.
        image: &'static str,
        /// The build whose image was given to the writer.
        image_parent: Option<BuildId>,
        /// The parent to be recorded.
        manifest_parent: Option<BuildId>,
    },
    /// The build was committed while one of its files was still being written.
    #[error("build {id} cannot be committed: its file {file} was begun and not finished")]
    Unfinished {
        /// The build that was to be committed.
        id: BuildId,
        /// The file.
        file: String,
    },
    /// The build does not have this file.
    #[error("build {id} has no {file}: it was stored without")]
    Missing {
        /// The build.
        id: BuildId,
        /// The file.
        file: String,
    },
    /// Another torpor held the storage's lock for too long.
    #[error(
        "{} is locked by another torpor for more than {waited_ms} ms: if none is at work, look \
         for a stopped one with `fuser`",
        path.display()
    )]
    StorageBusy {
        /// The lock file.
        path: PathBuf,
        /// How long we waited, in milliseconds.
        waited_ms: u64,
    },
    /// A running sandbox owns this id.
    #[error("sandbox {sandbox} is running already: stop it first, or choose another id")]
    SandboxBusy {
        /// The sandbox.
        sandbox: Name,
    },
    /// Pages came out of order: a mistake of the program, not of the user.
    #[error("page {found} was pushed where page {expected} was due (image of {len_pages} pages)")]
    OutOfOrder {
        /// The page that was due.
        expected: u64,
        /// The page that came.
        found: u64,
        /// The image's length.
        len_pages: u64,
    },
    /// A buffer is not a whole number of pages, or not as many as announced.
    #[error("a buffer of {found_bytes} bytes was given for {pages} pages")]
    BadBuffer {
        /// Pages announced.
        pages: u64,
        /// Bytes given.
        found_bytes: usize,
    },
    /// Pages past the end of an image.
    #[error(
        "pages {first_page} to {} are outside of an image of {len_pages} pages",
        first_page.saturating_add(*pages)
    )]
    OutOfBounds {
        /// First page asked for.
        first_page: u64,
        /// How many.
        pages: u64,
        /// The image's length.
        len_pages: u64,
    },
    /// More than a format or this crate's limits allow.
    #[error("{what} is {found}, more than the limit of {max}")]
    TooLarge {
        /// What.
        what: &'static str,
        /// How large it is.
        found: u64,
        /// How large it may be.
        max: u64,
    },
    /// An earlier error left this writer unusable.
    #[error("{} cannot be written any further after an earlier error", path.display())]
    WriterFailed {
        /// The data file.
        path: PathBuf,
    },
}

impl Error {
    /// Wraps an [`io::Error`]; what means "full" becomes [`Error::Full`].
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::FileTooLarge => Self::Full {
                action,
                path,
                source,
            },
            _ => Self::Io {
                action,
                path,
                source,
            },
        }
    }

    pub(crate) fn damaged(path: &Path, offset: u64, what: impl Into<String>) -> Self {
        Self::Damaged {
            path: path.to_owned(),
            offset,
            what: what.into(),
        }
    }

    /// Whether the operating system said that the file does not exist.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// Adds what was tried, and on which file, to an I/O result.
pub(crate) trait IoContext<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T>;
}

impl<T, E: Into<io::Error>> IoContext<T> for std::result::Result<T, E> {
    fn context(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| Error::io(action, path, source.into()))
    }
}

/// Bytes that are not what they should be, before it is known which file they came from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Does not verify.
    #[error("damaged at byte {offset}: {what}")]
    Damaged {
        /// Where, in bytes.
        offset: u64,
        /// What was expected and found.
        what: String,
    },
    /// A version that is not known here.
    #[error("format version {found}, this torpor reads up to {known}")]
    Newer {
        /// The version found.
        found: u32,
        /// The newest one known.
        known: u32,
    },
}

impl FormatError {
    pub(crate) fn damaged(offset: usize, what: impl Into<String>) -> Self {
        Self::Damaged {
            offset: offset as u64,
            what: what.into(),
        }
    }

    pub(crate) fn in_file(self, path: &Path) -> Error {
        match self {
            Self::Damaged { offset, what } => Error::Damaged {
                path: path.to_owned(),
                offset,
                what,
            },
            Self::Newer { found, known } => Error::Newer {
                path: path.to_owned(),
                found,
                known,
            },
        }
    }
}

fn list<T: ToString>(items: &[T]) -> String {
    items
        .iter()
        .map(T::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}

fn or_none(id: Option<&BuildId>) -> String {
    id.map_or_else(|| "no build".to_owned(), BuildId::to_string)
}
