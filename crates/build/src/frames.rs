//! Writes a data file: frames go in, compressed by as many cores as help, and come out in order.
//!
//! ```text
//! caller ──frame n──▶ worker n mod W ──compressed──▶ caller: write, hash
//! ```
//!
//! The caller's thread sends and writes; the workers only compress. Frames are dealt out in turn
//! and collected in turn, so they keep their order without a queue that sorts. Bounded: at most
//! [`FRAMES_PER_WORKER`] frames are with each worker. The first [`INLINE_FRAMES`] are compressed
//! without any worker, so that small layers start no thread.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use crate::data::{
    DATA_FRAMES_MAX, FRAME_BYTES, FrameRecord, HEADER_BYTES, encode_footer, encode_frame,
    encode_header,
};
use crate::durable;
use crate::error::{Error, IoContext, Result};
use crate::ids::BuildId;
use crate::manifest::FileRecord;
use crate::page::ImageKind;

/// Frames compressed by the caller itself: 1 MiB, a millisecond or two.
const INLINE_FRAMES: usize = 16;
/// Frames with one worker: enough that it has work while the caller writes. With two buffers each,
/// 2 MiB per worker.
const FRAMES_PER_WORKER: usize = 16;
/// Most workers: LZ4 is fast enough that four of them outrun the caller's hashing and writing.
const WORKERS_MAX: usize = 4;
/// Bytes collected before a write: makes one system call and one run of the hash out of several
/// frames.
const OUTPUT_BYTES: usize = 1 << 20;

/// A file that is hashed while it is written.
#[derive(Debug)]
pub(crate) struct HashedFile {
    path: PathBuf,
    file: File,
    hasher: blake3::Hasher,
    written_bytes: u64,
    pending: Vec<u8>,
}

impl HashedFile {
    pub(crate) fn create(path: PathBuf) -> Result<Self> {
        let file = durable::create_file(&path)?;
        let hasher = blake3::Hasher::new();
        Ok(Self {
            path,
            file,
            hasher,
            written_bytes: 0,
            pending: Vec::new(),
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn len_bytes(&self) -> u64 {
        self.written_bytes + self.pending.len() as u64
    }

    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.pending.extend_from_slice(bytes);
        if self.pending.len() >= OUTPUT_BYTES {
            self.flush()
        } else {
            Ok(())
        }
    }

    fn flush(&mut self) -> Result<()> {
        durable::step("data-write", &self.path, || {
            self.file
                .write_all(&self.pending)
                .context("write", &self.path)
        })?;
        self.hasher.update(&self.pending);
        self.written_bytes += self.pending.len() as u64;
        self.pending.clear();
        Ok(())
    }

    /// All bytes written, not yet synced.
    pub(crate) fn finish(mut self) -> Result<(File, FileRecord)> {
        self.flush()?;
        let digest = self.hasher.finalize().into();
        Ok((
            self.file,
            FileRecord {
                bytes: self.written_bytes,
                digest,
            },
        ))
    }
}

/// Writes the frames of one data file.
#[derive(Debug)]
pub(crate) struct FrameWriter {
    out: HashedFile,
    records: Vec<FrameRecord>,
    sent_frames: usize,
    workers: Workers,
    /// Buffers to be used again, as many as were ever in flight.
    spare: Vec<Vec<u8>>,
}

impl FrameWriter {
    pub(crate) fn create(path: PathBuf, build: &BuildId, kind: ImageKind) -> Result<Self> {
        let mut out = HashedFile::create(path)?;
        out.append(&encode_header(build, kind))?;
        let workers = Workers::default();
        Ok(Self {
            out,
            records: Vec::new(),
            sent_frames: 0,
            workers,
            spare: Vec::new(),
        })
    }

    pub(crate) fn path(&self) -> &Path {
        self.out.path()
    }

    /// An empty buffer with room for a frame.
    pub(crate) fn buffer(&mut self) -> Vec<u8> {
        self.spare
            .pop()
            .unwrap_or_else(|| Vec::with_capacity(FRAME_BYTES))
    }

    /// Adds a frame; every one but the last must be full.
    pub(crate) fn push(&mut self, raw: Vec<u8>) -> Result<()> {
        if self.sent_frames as u64 >= DATA_FRAMES_MAX {
            let (found, max) = (self.sent_frames as u64 + 1, DATA_FRAMES_MAX);
            return Err(Error::TooLarge {
                what: "the number of frames",
                found,
                max,
            });
        }
        self.sent_frames += 1;
        if self.sent_frames == INLINE_FRAMES {
            self.workers = Workers::start();
        }
        let mut job = Job {
            raw,
            out: self.buffer(),
            record: None,
        };
        if self.workers.list.is_empty() {
            job.compress();
            return self.write(job);
        }
        if self.workers.are_full() {
            let done = self.workers.receive(self.out.path())?;
            self.write(done)?;
        }
        self.workers.send(job, self.out.path())
    }

    fn write(&mut self, mut job: Job) -> Result<()> {
        let lost = || {
            Error::io(
                "compress for",
                self.out.path(),
                std::io::Error::other("no result"),
            )
        };
        self.records.push(job.record.take().ok_or_else(lost)?);
        self.out.append(&job.out)?;
        for mut buffer in [job.raw, job.out] {
            buffer.clear();
            self.spare.push(buffer);
        }
        Ok(())
    }

    /// Writes what is on its way, and the footer. Gives the bytes that the frames take.
    pub(crate) fn finish(mut self, pages: u64) -> Result<(File, FileRecord, u64)> {
        while self.workers.in_flight > 0 {
            let done = self.workers.receive(self.out.path())?;
            self.write(done)?;
        }
        let table_offset = self.out.len_bytes();
        self.out
            .append(&encode_footer(&self.records, pages, table_offset))?;
        let (file, record) = self.out.finish()?;
        Ok((file, record, table_offset - HEADER_BYTES as u64))
    }
}

#[derive(Debug)]
struct Job {
    raw: Vec<u8>,
    out: Vec<u8>,
    record: Option<FrameRecord>,
}

impl Job {
    fn compress(&mut self) {
        self.record = Some(encode_frame(&self.raw, &mut self.out));
    }
}

#[derive(Debug)]
struct Worker {
    jobs: SyncSender<Job>,
    done: Receiver<Job>,
    thread: JoinHandle<()>,
}

impl Worker {
    fn start() -> std::io::Result<Self> {
        let (jobs, todo) = sync_channel::<Job>(FRAMES_PER_WORKER);
        let (results, done) = sync_channel(FRAMES_PER_WORKER);
        let thread = std::thread::Builder::new()
            .name("torpor-compress".to_owned())
            .spawn(move || {
                // Ends when the caller hangs up.
                while let Ok(mut job) = todo.recv() {
                    job.compress();
                    if results.send(job).is_err() {
                        break;
                    }
                }
            })?;
        Ok(Self { jobs, done, thread })
    }
}

#[derive(Debug, Default)]
struct Workers {
    list: Vec<Worker>,
    next_to_send: usize,
    next_to_receive: usize,
    in_flight: usize,
}

impl Workers {
    /// As many as there are cores; none where one core must do everything, or where no thread can
    /// be had.
    fn start() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let wanted = if cores == 1 {
            0
        } else {
            cores.min(WORKERS_MAX)
        };
        let list = (0..wanted).map_while(|_| Worker::start().ok()).collect();
        Self {
            list,
            ..Self::default()
        }
    }

    fn are_full(&self) -> bool {
        self.in_flight == self.list.len() * FRAMES_PER_WORKER
    }

    fn send(&mut self, job: Job, path: &Path) -> Result<()> {
        let worker = &self.list[self.next_to_send % self.list.len()];
        worker.jobs.send(job).map_err(|_| worker_ended(path))?;
        self.next_to_send += 1;
        self.in_flight += 1;
        Ok(())
    }

    fn receive(&mut self, path: &Path) -> Result<Job> {
        let worker = &self.list[self.next_to_receive % self.list.len()];
        let job = worker.done.recv().map_err(|_| worker_ended(path))?;
        self.next_to_receive += 1;
        self.in_flight -= 1;
        Ok(job)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for Worker { jobs, done, thread } in self.list.drain(..) {
            drop((jobs, done));
            // A worker that panicked has been noticed by `receive`.
            drop(thread.join());
        }
    }
}

fn worker_ended(path: &Path) -> Error {
    Error::io(
        "compress for",
        path,
        std::io::Error::other("a worker thread ended"),
    )
}
