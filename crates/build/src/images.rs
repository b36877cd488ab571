//! Which base images there are, who refers to them, and how they go.
//!
//! An image is needed by every build whose manifest names it, whether or not a page refers to it:
//! it is also the guest's disk. Builds that do not tell what they need keep all images.

use std::fs::{self, File};

use rustix::fs::{FlockOperation, flock};

use crate::build::read_bounded;
use crate::durable;
use crate::error::{Error, IoContext, Result};
use crate::ids::{BuildId, Digest};
use crate::manifest::{MANIFEST_BYTES_MAX, MANIFEST_FILE, Manifest, base_image_if_legible};
use crate::storage::{Storage, list_dir};

/// What [`Storage::list_images`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedImage {
    /// The image.
    pub digest: Digest,
    /// Its length, in bytes.
    pub bytes: u64,
    /// What it takes on the disk, in bytes: less, where it has holes.
    pub stored_bytes: u64,
    /// The builds that refer to it. Those that cannot be read may do so as well; they are in
    /// [`Storage::list_builds`].
    pub builds: Vec<BuildId>,
}

/// Which builds refer to which image.
#[derive(Debug, Default)]
struct Referrers {
    known: Vec<(Digest, BuildId)>,
    /// Builds whose manifest does not tell.
    unreadable: Vec<BuildId>,
}

impl Referrers {
    fn of(&self, image: &Digest) -> Vec<BuildId> {
        let of_image = self.known.iter().filter(|(digest, _)| digest == image);
        of_image.map(|(_, id)| *id).collect()
    }
}

impl Storage {
    /// All base images, by digest.
    ///
    /// # Errors
    /// When a folder cannot be listed.
    pub fn list_images(&self) -> Result<Vec<ListedImage>> {
        use std::os::unix::fs::MetadataExt;
        let referrers = self.referrers()?;
        let images = self.dir("images");
        let mut listed = Vec::new();
        for name in list_dir(&images)? {
            let Ok(digest) = name.parse::<Digest>() else {
                continue;
            };
            // Deleted meanwhile.
            let Ok(meta) = fs::metadata(images.join(&name)) else {
                continue;
            };
            listed.push(ListedImage {
                digest,
                bytes: meta.len(),
                stored_bytes: meta.blocks() * 512,
                builds: referrers.of(&digest),
            });
        }
        Ok(listed)
    }

    /// Deletes a base image and the index of its blocks.
    ///
    /// # Errors
    /// [`Error::UnknownImage`]; [`Error::ImageNeeded`] while builds refer to it,
    /// [`Error::ImageMayBeNeeded`] while there are builds that do not tell,
    /// [`Error::ImageInUse`] while a [`BaseImage`](crate::BaseImage) of it lives.
    pub fn delete_image(&self, digest: &Digest) -> Result<()> {
        let lock = self.lock()?;
        let path = self.image_path(digest)?;
        let digest = *digest;
        // Under the lock: a build that is being committed is seen, or sees that its image is gone.
        let referrers = self.referrers()?;
        let builds = referrers.of(&digest);
        if !builds.is_empty() {
            return Err(Error::ImageNeeded { digest, builds });
        }
        if !referrers.unreadable.is_empty() {
            let unreadable = referrers.unreadable;
            return Err(Error::ImageMayBeNeeded { digest, unreadable });
        }
        let file = File::open(&path).context("open", &path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(Error::ImageInUse { digest }),
            Err(e) => return Err(Error::io("lock", &path, e.into())),
        }
        // The index first: an image without one gets it back when it is used, and an index without
        // an image would stay for ever.
        let index = self.block_index_path(&digest);
        match fs::remove_file(&index) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("delete", &index, e));
            }
            _ => {}
        }
        durable::step("image-remove", &path, || {
            fs::remove_file(&path).context("delete", &path)
        })?;
        let images = self.dir("images");
        durable::step("image-remove-sync", &images, || durable::sync_dir(&images))?;
        drop(lock);
        // The bytes of a large image are given back when the last one closes it: not under the
        // lock.
        drop(file);
        Ok(())
    }

    fn referrers(&self) -> Result<Referrers> {
        let mut referrers = Referrers::default();
        for id in self.build_ids()? {
            match self.base_image_of(&id) {
                Some(Some(digest)) => referrers.known.push((digest, id)),
                Some(None) => {}
                // Deleted meanwhile, or cannot be read.
                None if !self.build_path(&id).exists() => {}
                None => referrers.unreadable.push(id),
            }
        }
        Ok(referrers)
    }

    /// A build's base image; `None` where the manifest does not tell.
    fn base_image_of(&self, id: &BuildId) -> Option<Option<Digest>> {
        let path = self.build_path(id).join(MANIFEST_FILE);
        let bytes = read_bounded(&path, MANIFEST_BYTES_MAX).ok()?;
        match Manifest::decode(&bytes) {
            Ok(manifest) => Some(manifest.info.base_image),
            Err(crate::FormatError::Newer { .. }) => base_image_if_legible(&bytes),
            Err(crate::FormatError::Damaged { .. }) => None,
        }
    }
}
