//! The pager as its owner sees it: start, prefetch, settle, dirty pages, stop.
//!
//! The order of a pause: stop the vCPUs, [`Pager::settle`], [`Pager::dirty`]. Both may be called
//! again after a pause that failed: the dirty set counts from the resume, not from the last call.
//!
//! Pages in this interface are base pages, whatever backs the guest. Memory of huge pages is served,
//! tracked and given back in whole huge pages, so that here they come in runs of 512.
//!
//! The pager must outlive the guest: a guest whose userfaultfd nobody serves hangs. So the VMM is
//! killed first, then the pager is shut down.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::ahead::ReadAhead;
use crate::bulk::READ_PAGES_MAX;
use crate::error::PagerError;
use crate::failure::FailureSignal;
use crate::huge_source::HugeSource;
use crate::kernel::{Backing, HostKernel, Regions, memfd_runs};
use crate::machine::{DirtyPages, Held, Machine};
use crate::page_set::{PAGE_SIZE_U64, PageRun, PageSet};
use crate::pagemap::Pagemap;
use crate::region::Region;
use crate::service::Service;
use crate::source::PageSource;
use crate::stats::{Counters, Latencies, PagerStats};
use crate::tracking::WriteTracking;
use crate::uffd::Uffd;
use crate::{threads, working_set};

/// Pages around a fault that are filled along with it: 64 KiB, the frame of a build.
const FAULT_AROUND_PAGES: u64 = 16;

/// Most workers: they share one lock, so more of them only help against slow storage.
const WORKERS_MAX: usize = 16;

/// Most runs that wait to be prefetched: a working set is an eighth of that.
const PREFETCH_RUNS_MAX: usize = 32_768;

const _: () = assert!(PREFETCH_RUNS_MAX >= working_set::WORKING_SET_RUNS_MAX);

/// The guest's memory may span this many pages: 1 TiB. The states cost a byte for each.
const SPAN_PAGES_MAX: u64 = 1 << 28;

/// How often settling looks again at what it waits for.
const SETTLE_POLL: Duration = Duration::from_micros(200);

/// How long a stopping pager waits for its threads. Only a source that hangs takes longer.
const SHUTDOWN_WAIT: Duration = Duration::from_secs(5);

/// How often a stopping pager looks whether its threads have ended.
const SHUTDOWN_POLL: Duration = Duration::from_millis(1);

/// What a pager needs to know. [`PagerConfig::new`] fills in the usual.
pub struct PagerConfig {
    /// Negotiated, with all regions registered.
    pub uffd: Uffd,
    /// The guest's memory.
    pub regions: Vec<Region>,
    /// Its content.
    pub source: Arc<dyn PageSource>,
    /// What kind of memory it is.
    pub backing: Backing,
    /// What `uffd` was negotiated for.
    pub tracking: WriteTracking,
    /// The VMM's process, whose /proc/PID/pagemap is read. Needed for asynchronous tracking and
    /// for tracking on anonymous memory.
    pub pagemap_pid: Option<i32>,
    /// What to bring in at once, in this order.
    pub prefetch: Vec<PageRun>,
    /// What is being read already; it is brought in before `prefetch`. Not for huge pages.
    pub read_ahead: Option<ReadAhead>,
    /// Pages around a fault that are filled along with it (an aligned window, which grows while
    /// faults are sequential; 1 turns it off).
    pub fault_around_pages: u64,
    /// Threads that fetch content from the source.
    pub workers: usize,
}

impl PagerConfig {
    /// The usual configuration: no prefetch, 16 pages around each fault, one worker, writes not
    /// tracked.
    #[must_use]
    pub fn new(
        uffd: Uffd,
        regions: Vec<Region>,
        source: Arc<dyn PageSource>,
        backing: Backing,
    ) -> Self {
        Self {
            uffd,
            regions,
            source,
            backing,
            tracking: WriteTracking::Off,
            pagemap_pid: None,
            prefetch: Vec::new(),
            read_ahead: None,
            fault_around_pages: FAULT_AROUND_PAGES,
            workers: 1,
        }
    }
}

impl std::fmt::Debug for PagerConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PagerConfig")
            .field("regions", &self.regions)
            .field("backing", &self.backing)
            .field("tracking", &self.tracking)
            .field("prefetch_runs", &self.prefetch.len())
            .finish_non_exhaustive()
    }
}

/// A running pager.
pub struct Pager {
    service: Arc<Service>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    regions: Vec<Region>,
    /// Base pages, as everywhere in this interface.
    span_pages: u64,
    /// Base pages of a page of the guest's memory: the service counts in those.
    base_pages: u64,
    memfd: Option<std::os::fd::OwnedFd>,
    pagemap: Option<Arc<Pagemap>>,
    tracking: WriteTracking,
}

impl std::fmt::Debug for Pager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pager")
            .field("regions", &self.regions)
            .field("tracking", &self.tracking)
            .finish_non_exhaustive()
    }
}

fn host(step: &'static str) -> impl Fn(std::io::Error) -> PagerError {
    move |source| PagerError::Host { step, source }
}

impl Pager {
    /// Starts serving. A shared memfd is emptied first: what the VMM left there while it set
    /// itself up would shadow the build's content.
    ///
    /// # Errors
    /// The configuration contradicts itself, or the host refuses a thread or a file.
    pub fn start(config: PagerConfig) -> Result<Self, PagerError> {
        let regions = Regions::new(config.regions.clone())?;
        check(&config, &regions)?;
        let base_pages = regions.page_bytes() / PAGE_SIZE_U64;
        let span = regions.span_pages();
        let machine = Machine::new(span, regions.page_bytes());
        let pagemap = config
            .pagemap_pid
            .map(Pagemap::of_process)
            .transpose()
            .map_err(host("open the VMM's pagemap"))?
            .map(Arc::new);
        let memfd = match &config.backing {
            Backing::Anonymous => None,
            Backing::SharedMemfd(fd) => Some(
                fd.try_clone()
                    .map_err(host("duplicate the guest memory's descriptor"))?,
            ),
        };
        let kernel = HostKernel::new(
            config.uffd,
            regions,
            config.backing,
            config.tracking,
            pagemap.clone(),
        )
        .map_err(host("make the reader's eventfd"))?;
        kernel
            .clear_shared()
            .map_err(host("empty the guest's memory"))?;
        let failure = FailureSignal::new().map_err(host("make the failure signal"))?;
        let counters =
            Counters::new().map_err(|_| PagerError::Config("latency histogram bounds"))?;
        let parts = (machine, counters, failure);
        let (around_pages, source): (_, Arc<dyn PageSource>) = if base_pages == 1 {
            let around_pages = config.fault_around_pages.clamp(1, READ_PAGES_MAX);
            (around_pages, config.source)
        } else {
            // A huge page is a window by itself.
            (1, Arc::new(HugeSource(config.source)))
        };
        let service = Arc::new(Service::new(
            Box::new(kernel),
            source,
            config.tracking,
            around_pages,
            parts,
        ));
        let pager = Self {
            service,
            threads: Mutex::new(Vec::new()),
            regions: config.regions,
            span_pages: span * base_pages,
            base_pages,
            memfd,
            pagemap,
            tracking: config.tracking,
        };
        pager.spawn("reader", threads::reader)?;
        for _ in 0..config.workers {
            pager.spawn("worker", threads::worker)?;
        }
        pager.prefetch_first(&config.prefetch, config.read_ahead)?;
        Ok(pager)
    }

    fn spawn(
        &self,
        name: &'static str,
        body: impl FnOnce(&Service) + Send + 'static,
    ) -> Result<(), PagerError> {
        let thread = threads::spawn(&self.service, name, body).map_err(host("start a thread"))?;
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        // Prefetchers come and go; what has ended needs no joining.
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
        Ok(())
    }

    /// Brings these pages in, in this order, behind what is queued already. Returns at once.
    /// Pages outside the guest, and runs beyond a bound of 32,768, are left to be faulted.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn prefetch(&self, runs: &[PageRun]) -> Result<(), PagerError> {
        self.prefetch_first(runs, None)
    }

    fn prefetch_first(
        &self,
        runs: &[PageRun],
        mut ahead: Option<ReadAhead>,
    ) -> Result<(), PagerError> {
        let guest = PageRun::new(0, self.span_pages);
        let start = {
            let mut state = self.service.lock();
            let room = PREFETCH_RUNS_MAX.saturating_sub(state.prefetch.len());
            state.prefetch.extend(
                runs.iter()
                    .filter_map(|run| run.clipped_to(guest))
                    .map(|run| run.covered_by(self.base_pages))
                    .take(room),
            );
            let work = ahead.is_some() || !state.prefetch.is_empty();
            let start = work && !state.prefetcher_runs && !state.stopping;
            state.prefetcher_runs |= start;
            start
        };
        if let Some(reader) = ahead.as_mut().and_then(ReadAhead::take_reader) {
            let threads = self.threads.lock();
            threads.unwrap_or_else(PoisonError::into_inner).push(reader);
        }
        let prefetch = move |service: &Service| threads::prefetcher(service, ahead.as_ref());
        if start && let Err(error) = self.spawn("prefetch", prefetch) {
            self.service.lock().prefetcher_runs = false;
            return Err(error);
        }
        Ok(())
    }

    /// Whether everything that was to be prefetched has been.
    #[must_use]
    pub fn prefetch_done(&self) -> bool {
        !self.service.lock().prefetcher_runs
    }

    /// Comes to rest, after the vCPUs have been stopped: every queued event is read, every discard
    /// applied and carried out by the kernel, every fault answered. What is left to prefetch is
    /// dropped. The pager goes on serving afterwards, and neighbours of the last faults may still come
    /// in: content of the source, in pages that are not dirty.
    ///
    /// # Errors
    /// [`PagerError::SettleTimeout`] says what is still moving; [`PagerError::Failed`] and
    /// [`PagerError::VmmGone`] that there is nothing left to settle.
    pub fn settle(&self, timeout: Duration) -> Result<(), PagerError> {
        let started = Instant::now();
        loop {
            let (faults, removed) = self.service.settle_once()?;
            let removed = removed.in_base_pages(self.base_pages);
            let discarding_pages = match faults {
                0 => self.still_discarding(&removed)?,
                _ => 0,
            };
            if faults == 0 && discarding_pages == 0 {
                return Ok(());
            }
            let waited = started.elapsed();
            if waited >= timeout {
                return Err(PagerError::SettleTimeout {
                    waited,
                    faults,
                    discarding_pages,
                });
            }
            let mut state = self.service.lock();
            state.settlers += 1;
            let rested = self.service.rest.wait_timeout(state, SETTLE_POLL);
            let (mut state, _) = rested.unwrap_or_else(PoisonError::into_inner);
            state.settlers -= 1;
        }
    }

    /// Pages whose discard has been announced while the kernel still has them: on anonymous
    /// memory the discarding thread drops them itself, some time after its event has been read.
    fn still_discarding(&self, removed: &PageSet) -> Result<u64, PagerError> {
        let (None, Some(pagemap)) = (&self.memfd, &self.pagemap) else {
            return Ok(0);
        };
        let mut pages = 0;
        for region in &self.regions {
            for (start, end) in runs_in(removed, region) {
                let mut count = |from: u64, to: u64| pages += (to - from) / PAGE_SIZE_U64;
                pagemap
                    .there(start, end, &mut count)
                    .map_err(host("read the VMM's pagemap"))?;
            }
        }
        Ok(pages)
    }

    /// What has been written and what has been given back since the resume. After
    /// [`Pager::settle`], with the vCPUs stopped.
    ///
    /// # Errors
    /// Writes are not tracked, or the VMM's page tables cannot be read.
    pub fn dirty(&self) -> Result<DirtyPages, PagerError> {
        if !self.tracking.protects() {
            return Err(PagerError::NotTracked);
        }
        // Held throughout: what is installed between the look at the page table and the one at the
        // memory's file would be taken for written.
        let mut state = self.service.lock();
        let known = state.machine.known().in_base_pages(self.base_pages);
        let (mut scanned, unmapped) = self.scan()?;
        let mut in_doubt = known.written.clone();
        in_doubt.unite(&unmapped);
        let there = self.there_among(&in_doubt)?;
        let zero = self.zero_pages()?;
        self.check_memory_is_there()?;
        // Only pages of the smallest size are left open.
        state.machine.looked(&zero);
        drop(state);
        let mut unmapped_there = unmapped;
        unmapped_there.intersect(&there);
        scanned.unite(&unmapped_there);
        let held = Held {
            scanned,
            there,
            zero,
        };
        Ok(DirtyPages::resolve(known, &held))
    }

    /// What the kernel saw being written: pages that it has mapped, and (shared memory only) pages
    /// without a trace of protection that it has not mapped. Those of the latter that are in the
    /// memfd were written and then reclaimed or swapped out.
    fn scan(&self) -> Result<(PageSet, PageSet), PagerError> {
        let mut written = PageSet::with_capacity_pages(self.span_pages);
        let mut unmapped = PageSet::with_capacity_pages(self.span_pages);
        let Some(pagemap) = self
            .pagemap
            .as_ref()
            .filter(|_| self.tracking == WriteTracking::Async)
        else {
            return Ok((written, unmapped));
        };
        let scan_step = "scan the VMM's page table (PAGEMAP_SCAN)";
        for region in &self.regions {
            let (start, end) = (region.host_addr, region.host_end());
            let mut add = |from, to| written.insert_run(guest_run(region, from, to));
            pagemap
                .written_there(start, end, &mut add)
                .map_err(host(scan_step))?;
            if self.memfd.is_some() {
                let mut add = |from, to| unmapped.insert_run(guest_run(region, from, to));
                pagemap
                    .unprotected(start, end, &mut add)
                    .map_err(host(scan_step))?;
            }
        }
        unmapped.subtract(&written);
        Ok((written, unmapped))
    }

    /// A VMM that has died has no page table, and PAGEMAP_SCAN finds nothing written in it. So what
    /// was read counts only if the table is still there afterwards.
    fn check_memory_is_there(&self) -> Result<(), PagerError> {
        let (Some(pagemap), Some(region)) = (&self.pagemap, self.regions.first()) else {
            return Ok(());
        };
        match pagemap.protected(region.host_addr) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                Err(PagerError::VmmGone)
            }
            Err(error) => Err(host("read the VMM's pagemap")(error)),
        }
    }

    /// Pages that are the kernel's zero page. Empty where it cannot tell, and where no page is left
    /// open to writes as that.
    fn zero_pages(&self) -> Result<PageSet, PagerError> {
        let mut zero = PageSet::with_capacity_pages(self.span_pages);
        let open_to_writes = self.tracking == WriteTracking::Sync && self.memfd.is_none();
        let Some(pagemap) = self.pagemap.as_ref().filter(|_| open_to_writes) else {
            return Ok(zero);
        };
        for region in &self.regions {
            let mut add = |from, to| zero.insert_run(guest_run(region, from, to));
            pagemap
                .zero_pages(region.host_addr, region.host_end(), &mut add)
                .map_err(host("scan the VMM's page table (PAGEMAP_SCAN)"))?;
        }
        Ok(zero)
    }

    /// Those of some pages that the kernel holds, in memory or swapped out.
    fn there_among(&self, pages: &PageSet) -> Result<PageSet, PagerError> {
        let mut there = PageSet::with_capacity_pages(self.span_pages);
        for region in &self.regions {
            for (start, end) in runs_in(pages, region) {
                if let Some(memfd) = &self.memfd {
                    let among = guest_run(region, start, end);
                    memfd_runs(memfd.as_fd(), among, &mut |run| there.insert_run(run))
                        .map_err(host("find the guest memory's pages"))?;
                } else if let Some(pagemap) = &self.pagemap {
                    let mut add = |from, to| there.insert_run(guest_run(region, from, to));
                    pagemap
                        .there(start, end, &mut add)
                        .map_err(host("read the VMM's pagemap"))?;
                }
            }
        }
        Ok(there)
    }

    /// The pages that the next resume of this memory should prefetch, in this order, within
    /// [`WORKING_SET_PAGES_MAX`](crate::WORKING_SET_PAGES_MAX).
    #[must_use]
    pub fn working_set(&self) -> Vec<PageRun> {
        let (used, brought_in, arrivals) = self.service.lock().machine.used_and_brought_in();
        let base = |set: PageSet| set.in_base_pages(self.base_pages);
        let arrivals = arrivals.in_base_pages(self.base_pages);
        working_set::compact(&base(used), &base(brought_in), &arrivals)
    }

    /// The figures so far.
    #[must_use]
    pub fn stats(&self) -> PagerStats {
        let state = self.service.lock();
        let stats = state.counters.snapshot(state.machine.waiting().0);
        stats.in_base_pages(self.base_pages)
    }

    /// How long the faults so far waited.
    #[must_use]
    pub fn latencies(&self) -> Latencies {
        self.service.lock().counters.latencies.clone()
    }

    /// When a page was installed last.
    #[must_use]
    pub fn last_install(&self) -> Option<Instant> {
        self.service.lock().counters.last_install
    }

    /// The signal that the pager had to give up on the guest, whose VMM must then be killed.
    #[must_use]
    pub fn failure(&self) -> FailureSignal {
        self.service.failure.clone()
    }

    /// Stops serving and lets go of the userfaultfd. The VMM must be dead, or about to be.
    ///
    /// # Errors
    /// A thread hangs in the page source; it is left behind.
    pub fn shutdown(self) -> Result<(), PagerError> {
        self.stop()
    }

    fn stop(&self) -> Result<(), PagerError> {
        self.service.tell_to_stop();
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        let started = Instant::now();
        loop {
            threads.retain(|thread| !thread.is_finished());
            if threads.is_empty() {
                return Ok(());
            }
            let waited = started.elapsed();
            if waited >= SHUTDOWN_WAIT {
                let threads = std::mem::take(&mut *threads).len();
                return Err(PagerError::ShutdownTimeout { threads, waited });
            }
            std::thread::sleep(SHUTDOWN_POLL);
        }
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::error!(%error, "a pager was dropped and could not stop");
        }
    }
}

fn check(config: &PagerConfig, regions: &Regions) -> Result<(), PagerError> {
    let huge = regions.page_bytes() > PAGE_SIZE_U64;
    if huge && !matches!(config.backing, Backing::Anonymous) {
        return Err(PagerError::Config(
            "a shared memory file of huge pages cannot be served; anonymous huge pages can",
        ));
    }
    if regions.span_pages() > SPAN_PAGES_MAX * PAGE_SIZE_U64 / regions.page_bytes() {
        return Err(PagerError::Config(
            "the guest's memory spans more than 1 TiB",
        ));
    }
    if huge && config.read_ahead.is_some() {
        return Err(PagerError::Config(
            "what is read ahead is in base pages; huge pages are prefetched",
        ));
    }
    if config.workers == 0 || config.workers > WORKERS_MAX {
        return Err(PagerError::Config("between 1 and 16 workers"));
    }
    let anonymous = matches!(config.backing, Backing::Anonymous);
    let needs_pagemap = match config.tracking {
        WriteTracking::Async => true,
        WriteTracking::Sync => anonymous,
        WriteTracking::Off => false,
    };
    if needs_pagemap && config.pagemap_pid.is_none() {
        return Err(PagerError::Config(
            "this way of tracking writes needs the VMM's pagemap",
        ));
    }
    Ok(())
}

/// The guest pages of an address range inside a region.
fn guest_run(region: &Region, start: u64, end: u64) -> PageRun {
    let byte = start - region.host_addr + region.guest_offset_bytes;
    PageRun::new(byte / PAGE_SIZE_U64, (end - start) / PAGE_SIZE_U64)
}

/// The address ranges that a set's pages have in a region.
fn runs_in<'a>(set: &'a PageSet, region: &'a Region) -> impl Iterator<Item = (u64, u64)> + 'a {
    let pages = guest_run(region, region.host_addr, region.host_end());
    set.runs()
        .filter_map(move |run| run.clipped_to(pages))
        .map(move |run| {
            let start =
                region.host_addr + run.first_page * PAGE_SIZE_U64 - region.guest_offset_bytes;
            (start, start + run.pages * PAGE_SIZE_U64)
        })
}
