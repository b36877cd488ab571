//! What the tests share.
#![allow(dead_code, reason = "each test binary uses another part")]
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "test code"
)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use torpor_build::{
    BaseImage, Build, BuildId, BuildInfo, Digest, ImageKind, LayerSummary, PAGE_SIZE, PageContent,
    Result, StagedBuild, Storage,
};
use xxhash_rust::xxh3::Xxh3;

pub struct TestStorage {
    pub storage: Storage,
    pub dir: tempfile::TempDir,
}

impl std::ops::Deref for TestStorage {
    type Target = Storage;

    fn deref(&self) -> &Storage {
        &self.storage
    }
}

/// A storage in memory where there is a tmpfs, as syncing thousands of builds takes its time.
pub fn storage() -> TestStorage {
    let shm = Path::new("/dev/shm");
    let dir = if shm.is_dir() {
        tempfile::tempdir_in(shm).unwrap()
    } else {
        tempfile::tempdir().unwrap()
    };
    TestStorage {
        storage: Storage::open(&dir.path().join("storage")).unwrap(),
        dir,
    }
}

/// A page made from a seed: 0 is all zeros, odd ones are random, even ones compress well.
pub fn page(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut page = Vec::with_capacity(PAGE_SIZE);
    while page.len() < PAGE_SIZE {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let word = match seed {
            0 => 0,
            odd if odd % 2 == 1 => state,
            even => even,
        };
        page.extend_from_slice(&word.to_le_bytes());
    }
    page
}

pub fn pages(seeds: &[u64]) -> Vec<u8> {
    seeds.iter().flat_map(|&seed| page(seed)).collect()
}

/// What a test pushes for some pages.
#[derive(Debug, Clone)]
pub enum Push {
    Parent(u64),
    Free(u64),
    Removed(u64),
    Data(Vec<u64>),
}

impl Push {
    pub fn len(&self) -> u64 {
        match self {
            Self::Parent(n) | Self::Free(n) | Self::Removed(n) => *n,
            Self::Data(seeds) => seeds.len() as u64,
        }
    }
}

pub fn write_image(
    staged: &StagedBuild,
    kind: ImageKind,
    parent: Option<&Build>,
    pushes: &[Push],
) -> Result<LayerSummary> {
    write_referring_image(staged, kind, parent, None, pushes)
}

/// As [`write_image`], with references to a base image.
pub fn write_referring_image(
    staged: &StagedBuild,
    kind: ImageKind,
    parent: Option<&Build>,
    base_image: Option<&Arc<BaseImage>>,
    pushes: &[Push],
) -> Result<LayerSummary> {
    let parent = parent
        .map(|build| build.image(kind).map(Arc::new))
        .transpose()?;
    let len_pages = pushes.iter().map(Push::len).sum();
    let mut writer = staged.image_writer(kind, len_pages, parent)?;
    if let Some(base_image) = base_image {
        writer.refer_to(Arc::clone(base_image))?;
    }
    let mut page = 0;
    for push in pushes {
        let bytes;
        let content = match push {
            Push::Parent(_) => PageContent::Parent,
            Push::Free(_) => PageContent::Free,
            Push::Removed(_) => PageContent::Removed,
            Push::Data(seeds) => {
                bytes = pages(seeds);
                PageContent::Data(&bytes)
            }
        };
        writer.push(page, push.len(), content)?;
        page += push.len();
    }
    writer.finish()
}

pub fn info(parent: Option<&Build>) -> BuildInfo {
    BuildInfo {
        parent: parent.map(Build::id),
        ..BuildInfo::default()
    }
}

/// A whole build: a memory image, a disk of two pages, device state.
pub fn try_store(
    storage: &Storage,
    id: BuildId,
    parent: Option<&Build>,
    memory: &[Push],
) -> Result<(Build, LayerSummary)> {
    let staged = storage.begin_build(id)?;
    let summary = write_image(&staged, ImageKind::Memory, parent, memory)?;
    write_image(&staged, ImageKind::Disk, parent, &[Push::Data(vec![2, 0])])?;
    staged.write_vmstate(b"device state")?;
    Ok((staged.commit(info(parent))?, summary))
}

pub fn store(storage: &Storage, parent: Option<&Build>, memory: &[Push]) -> Build {
    try_store(storage, BuildId::random(), parent, memory)
        .unwrap()
        .0
}

/// Imports a base image of these pages, with `tail` behind them.
pub fn import(storage: &TestStorage, seeds: &[u64], tail: &[u8]) -> Arc<BaseImage> {
    let path = storage.dir.path().join("base image");
    std::fs::write(&path, [&pages(seeds), tail].concat()).unwrap();
    let digest = storage.import_image(&path).unwrap();
    storage.base_image(&digest).unwrap()
}

/// A build of a memory image alone that refers to a base image, and names it.
pub fn store_referring(
    storage: &Storage,
    parent: Option<&Build>,
    base_image: &Arc<BaseImage>,
    memory: &[Push],
) -> (Build, LayerSummary) {
    let staged = storage.begin_build(BuildId::random()).unwrap();
    let summary =
        write_referring_image(&staged, ImageKind::Memory, parent, Some(base_image), memory)
            .unwrap();
    let info = BuildInfo {
        base_image: Some(base_image.digest()),
        ..info(parent)
    };
    (staged.commit(info).unwrap(), summary)
}

pub fn block_index_path(storage: &Storage, image: &Digest) -> PathBuf {
    storage.root().join(format!("block-indexes/{image}"))
}

/// Puts a checksum over everything but its own place, as all binary formats have it.
pub fn sign(bytes: &mut [u8], end: usize) {
    let mut hasher = Xxh3::new();
    hasher.update(&bytes[..16]);
    hasher.update(&bytes[24..end]);
    bytes[16..24].copy_from_slice(&hasher.digest().to_le_bytes());
}

pub fn read_all(build: &Build, kind: ImageKind) -> Result<Vec<u8>> {
    let image = build.image(kind)?;
    let mut bytes = vec![0xaa; usize::try_from(image.len_pages()).unwrap() * PAGE_SIZE];
    image.read_pages(0, &mut bytes)?;
    Ok(bytes)
}

/// Makes a build one of a version that nobody knows yet, its checksum right.
pub fn make_newer(storage: &Storage, build: &BuildId) {
    let path = storage.root().join(format!("builds/{build}/manifest.json"));
    let text = std::fs::read_to_string(&path).unwrap();
    let (_, body) = text.split_once("\n\"manifest\": ").unwrap();
    let body = body.strip_suffix("\n}\n").unwrap();
    let body = body.replace("\"format_version\":1", "\"format_version\":7");
    let checksum = Digest::of(body.as_bytes());
    let text = format!("{{\n\"checksum\": \"{checksum}\",\n\"manifest\": {body}\n}}\n");
    std::fs::write(&path, text).unwrap();
}

/// Names left in a part of the storage.
pub fn names_in(storage: &Storage, part: &str) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(storage.root().join(part))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
