//! A page array that lies in the builds as badly as its guest can arrange.
//!
//! What a scan of a lazily resumed guest costs beyond the scan itself is decoding the parent's frames.
//! A guest that writes other entries from pause to pause has them stored in many layers, more than a
//! reader keeps open, so that each page of the array would cost a layer's opening and a frame. Made
//! here by the host, with a healthy guest: entries are changed in one build and changed back in the
//! next, so that in the end the memory is what it was.

use std::sync::Arc;

use anyhow::Result;
use torpor_build::{Build, BuildId, ImageKind, OPEN_LAYERS_MAX, PAGE_SIZE, PageContent, PageRun};

/// Layers that the array is spread over: half as many again as a reader keeps open.
const LAYERS: u64 = OPEN_LAYERS_MAX as u64 * 3 / 2;

/// The last of a chain of builds on top of `build`: the same guest, with the pages `array` of its
/// memory spread over many layers.
///
/// # Errors
/// What the storage says.
pub fn scatter(build: &Build, array: PageRun) -> Result<Build> {
    let mut last = build.clone();
    for layer in 0..LAYERS {
        for changed in [true, false] {
            last = write_some(build, &last, array, layer, changed)?;
        }
    }
    Ok(last)
}

/// A build on top of `last` that has some pages of the array as `original` has them, or has not.
fn write_some(
    original: &Build,
    last: &Build,
    array: PageRun,
    layer: u64,
    changed: bool,
) -> Result<Build> {
    let content = original.memory()?;
    let staged = last.storage().begin_build(BuildId::random())?;
    let memory = Arc::new(last.memory()?);
    let len_pages = memory.len_pages();
    let mut writer = staged.image_writer(ImageKind::Memory, len_pages, Some(memory))?;
    let mut at = 0;
    let mut bytes = vec![0; PAGE_SIZE];
    let mut page = array.first_page + layer;
    while page < array.first_page + array.pages {
        if page > at {
            writer.push(at, page - at, PageContent::Parent)?;
        }
        content.read_pages(page, &mut bytes)?;
        if changed {
            bytes.iter_mut().for_each(|byte| *byte ^= 0xa5);
        }
        writer.push(page, 1, PageContent::Data(&bytes))?;
        at = page + 1;
        page += LAYERS;
    }
    writer.push(at, len_pages - at, PageContent::Parent)?;
    writer.finish()?;
    let disk = Arc::new(last.disk()?);
    let len_pages = disk.len_pages();
    let mut writer = staged.image_writer(ImageKind::Disk, len_pages, Some(disk))?;
    writer.push(0, len_pages, PageContent::Parent)?;
    writer.finish()?;
    staged.write_vmstate(&last.read_vmstate()?)?;
    let mut info = last.manifest().info.clone();
    info.parent = Some(last.id());
    Ok(staged.commit(info)?)
}
