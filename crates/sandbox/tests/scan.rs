//! The free-page scan on real guests: against the guest's own page flags, and where it must not be
//! used.

#![allow(missing_docs, reason = "a test program has no interface")]
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "the tests' helpers: what goes wrong in them fails the test, what they measured is told"
)]

mod common;

use std::cell::Cell;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use common::*;
use torpor_build::{Build, BuildId, Digest, Entry, PAGE_SIZE};
use torpor_guest::{Command, Process, Selector};
use torpor_sandbox::Sandbox;
use torpor_sandbox::boot::{BootRequest, boot};
use torpor_sandbox::flags::PauseFlags;
use torpor_sandbox::host::Host;
use torpor_sandbox::pause::Paused;
use torpor_sandbox::resume::{ResumeOptions, resume};
use torpor_workload::{FreePages, Watching};

const SETTLE_MAX: Duration = Duration::from_secs(10);
/// An emulated guest with 6 GiB reads two million flags.
const ANSWER_MAX: Duration = Duration::from_secs(120);
/// Who does not answer for so long will not.
const SILENCE: Duration = Duration::from_secs(5);
const GUEST_PROGRAM: &str = "/usr/local/bin/torpor-workload";
const TAG: &str = "free-pages";
/// Looks, 50 ms apart, that must see the same before nothing comes in any more.
const STILL_LOOKS: u32 = 40;
/// For what a message to the host leaves behind in the guest; it is looking at its pages meanwhile.
const AFTER_A_MESSAGE: Duration = Duration::from_millis(500);
/// Pages that all looks saw free and the stop between them did not: the guest is quiet, but it answers
/// us. (For the other direction there is no slack: such a page would be lost.)
const RESTLESS_PAGES_MAX: u64 = 64;
/// What per-CPU lists may hold of pages that `MemFree` counts or does not count: their batches, and
/// the counters' own slack.
const PER_CPU_PAGES_MAX: u64 = 1024;

/// The guests of a kernel: processors and memory. The last one has memory above the 4 GiB hole.
const GUESTS: [(u32, u64); 4] = [(1, 256 << 20), (4, 512 << 20), (1, 1 << 30), (4, 6 << 30)];

#[tokio::test(flavor = "multi_thread")]
async fn the_scan_finds_exactly_the_pages_that_the_guest_calls_free() {
    let host = host().await;
    for kernel in kernels() {
        for (vcpus, memory_bytes) in GUESTS {
            let request = BootRequest {
                kernel: kernel.clone(),
                vcpus,
                memory_bytes,
                ..boot_request("scan")
            };
            let what = format!("Linux {kernel}, {vcpus} vCPUs, {} MiB", memory_bytes >> 20);
            let sandbox = boot(&host, request).await.unwrap();
            agrees_with_its_guest(&host, &sandbox, &what).await;
            sandbox.end().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_scan_is_exact_for_a_kernel_that_lies_anywhere_and_has_five_level_tables() {
    let host = host().await;
    for series in kernels() {
        let packed = packed_kernel(&series);
        let mut places = Vec::new();
        // It may have drawn the place that it was linked to, but not every time.
        while places.len() < BOOTS_MAX && places.iter().all(|place| place == LINKED_TO) {
            let request = BootRequest {
                kernel: packed.path().to_str().unwrap().to_owned(),
                vcpus: 2,
                ..boot_request("scan")
            };
            let sandbox = boot(&host, request).await.unwrap();
            let text = sh(&sandbox, "grep ' _text$' /proc/kallsyms").await;
            sh(&sandbox, "grep -qw la57 /proc/cpuinfo").await;
            agrees_with_its_guest(&host, &sandbox, &format!("Linux {series}, {text}")).await;
            sandbox.end().await;
            places.push(text.split(' ').next().unwrap().to_owned());
        }
        assert!(
            places.iter().any(|place| place != LINKED_TO),
            "Linux {series} was not moved: {places:?}"
        );
    }
}

/// Where `_text` lies in a kernel that stays where it was linked to.
const LINKED_TO: &str = "ffffffff81000000";
const BOOTS_MAX: usize = 3;

/// The kernel as its package has it: its decompressor places it at random and, on a processor that
/// has them, turns five-level tables on. (What torpor boots is unpacked, and stays where it was
/// linked to.)
fn packed_kernel(series: &str) -> tempfile::TempDir {
    use std::os::unix::fs::symlink;
    let from = torpor_sandbox::assets::default_dir()
        .unwrap()
        .join("kernels")
        .join(series);
    let dir = tempfile::tempdir().unwrap();
    symlink(from.join("bzImage"), dir.path().join("vmlinux")).unwrap();
    for name in ["config", "release", "modules", "modules.order"] {
        symlink(from.join(name), dir.path().join(name)).unwrap();
    }
    dir
}

#[tokio::test(flavor = "multi_thread")]
async fn the_scan_of_a_lazily_resumed_guest_is_exact_and_brings_nothing_in() {
    let host = host().await;
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    for kernel in kernels() {
        let request = BootRequest {
            kernel: kernel.clone(),
            ..boot_request("scan")
        };
        let sandbox = boot(&host, request).await.unwrap();
        upload(&sandbox, &workload(), GUEST_PROGRAM).await;
        let paused = pause_into_new(sandbox, &host, PauseFlags::default()).await;
        cleanup.1.push(paused.build.id());
        let options = ResumeOptions {
            no_prefetch: true,
            ..ResumeOptions::default()
        };
        let (sandbox, _) = resume(&host, &paused.build.id(), &options).await.unwrap();

        sandbox.vmm().stop_vcpus().await.unwrap();
        let memory = File::from(sandbox.vmm().memory().unwrap().into_memfd().unwrap());
        let before = standing_still(&sandbox, &memory);
        let found = sandbox.find_free_pages(host.storage(), SETTLE_MAX).await;
        assert_eq!(found.unwrap().0.why_not(), None);
        assert_eq!(before, brought_in(&sandbox, &memory));
        let present_pages = before.0;
        let all_pages = GUEST_MEMORY_BYTES / PAGE_SIZE as u64;
        println!("Linux {kernel}: scanned with {present_pages} of {all_pages} pages present");
        assert!(present_pages * 10 < all_pages, "it is to be nearly empty");
        sandbox.vmm().resume_vcpus().await.unwrap();

        agrees_with_its_guest(&host, &sandbox, &format!("Linux {kernel}, resumed")).await;
        sandbox.end().await;
    }
}

/// Pages present, and pages that the pager copied in.
fn brought_in(sandbox: &Sandbox, memory: &File) -> (u64, u64) {
    let copied = sandbox.pager_stats().unwrap().pages_copied;
    (present_pages(memory), copied)
}

/// Waits until nothing comes in any more: a fault that was answered before the stop still brings its
/// neighbours in after it.
fn standing_still(sandbox: &Sandbox, memory: &File) -> (u64, u64) {
    let seen = Cell::new((brought_in(sandbox, memory), 0));
    wait_until("nothing comes in", || {
        let now = brought_in(sandbox, memory);
        let (before, looks) = seen.get();
        seen.set((now, if now == before { looks + 1 } else { 0 }));
        seen.get().1 == STILL_LOOKS
    });
    seen.get().0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_that_zeroes_what_it_frees_is_scanned() {
    let host = host().await;
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    for kernel in kernels() {
        let request = BootRequest {
            kernel: kernel.clone(),
            kernel_args: "init_on_free=1".to_owned(),
            ..boot_request("scan")
        };
        let sandbox = boot(&host, request).await.unwrap();
        sh(&sandbox, "dmesg | grep -q 'heap free:on'").await;
        let paused = pause_into_new(sandbox, &host, PauseFlags::default()).await;
        cleanup.1.push(paused.build.id());
        let scan = paused.report.scan.unwrap();
        assert_eq!(scan.why_not(), None);
        assert_eq!(
            paused.report.memory.pages.free,
            scan.free_pages + scan.balloon_pages
        );
        let (sandbox, _) = resume_build(&host, &paused.build.id()).await;
        // It takes what it believes to be zero already, and does not clear it again.
        let mut taker = Taker::start(&sandbox, "taker").await;
        assert_eq!(taker.take(&sandbox).await, 0, "Linux {kernel}");
        kernel_is_content(&sandbox, &format!("Linux {kernel}, init_on_free=1")).await;
        // The same look sees what was not zero.
        let mut taker = Taker::start(&sandbox, "second-taker").await;
        soil_free_pages(&host, &sandbox).await;
        let soiled = taker.take(&sandbox).await;
        println!(
            "Linux {kernel}: of 64 MiB {soiled} had garbage, when free pages were overwritten"
        );
        assert!(soiled > 0, "Linux {kernel}: the look cannot fail");
        sandbox.end().await;
    }
}

/// A process in the guest that takes 64 MiB and tells how many of them were not zero.
///
/// Of private memory and in small pages: those of shared memory and huge ones the kernel clears even
/// if it believes them to be zero. That it reads each page before it says `0`, and gets the one zero
/// page for it, makes its page tables: nothing but the pages themselves is taken when it is asked.
struct Taker {
    process: Process,
    selector: Selector,
}

const TAKER: &str = r#"
import mmap, sys
MIB = 1 << 20
m = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
m.madvise(mmap.MADV_NOHUGEPAGE)
assert not any(m[::4096])
want = (b"\1" + bytes(4095)) * 256
print(0, flush=True)
sys.stdin.readline()
m[::4096] = b"\1" * (64 * 256)
print(sum(m[i * MIB:(i + 1) * MIB] != want for i in range(64)), flush=True)
sys.stdin.readline()
"#;

impl Taker {
    async fn start(sandbox: &Sandbox, tag: &str) -> Self {
        let command = Command::new("python3")
            .arg("-c")
            .arg(TAKER)
            .stdin()
            .tag(tag);
        let mut process = sandbox.envd().start(&command, None).await.unwrap();
        let ready: u64 = line(&mut process, ANSWER_MAX).await;
        assert_eq!(ready, 0);
        let selector = Selector::Tag(tag.to_owned());
        Self { process, selector }
    }

    async fn take(&mut self, sandbox: &Sandbox) -> u64 {
        let envd = sandbox.envd();
        envd.send_input(&self.selector, b"take\n").await.unwrap();
        let soiled = line(&mut self.process, ANSWER_MAX).await;
        envd.close_stdin(&self.selector).await.unwrap();
        soiled
    }
}

/// Writes a word into each free page: not into its first one, where a page table would be used first.
async fn soil_free_pages(host: &Host, sandbox: &Sandbox) {
    sandbox.vmm().stop_vcpus().await.unwrap();
    let found = sandbox.find_free_pages(host.storage(), SETTLE_MAX).await;
    let (report, free) = found.unwrap();
    assert_eq!(report.why_not(), None);
    let memory = File::from(sandbox.vmm().memory().unwrap().into_memfd().unwrap());
    let page = PAGE_SIZE as u64;
    for number in free
        .iter()
        .flat_map(|run| run.first_page..run.first_page + run.pages)
    {
        // Even: no entry of a page table that counts as present.
        let at = number * page + page / 2;
        memory.write_all_at(&[0xAA; 8], at).unwrap();
    }
    sandbox.vmm().resume_vcpus().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_that_checks_its_free_pages_is_not_scanned() {
    let host = host().await;
    for (args, reason) in [
        ("page_poison=1", "page_poison"),
        ("debug_pagealloc=on", "debug_pagealloc"),
    ] {
        let request = BootRequest {
            kernel_args: args.to_owned(),
            ..boot_request("scan")
        };
        let sandbox = boot(&host, request).await.unwrap();
        let paused = pause_into_new(sandbox, &host, PauseFlags::default()).await;
        let _cleanup = Cleanup(host.storage(), vec![paused.build.id()]);
        not_scanned(&paused, None, reason);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_of_a_doctored_or_unknown_configuration_is_not_scanned() {
    let host = host().await;
    let template = template(&host).await;
    let copy = CopiedStorage::of(&host, &[template]).await;
    let kernel = host.storage().open_build(&template).unwrap();
    let kernel = kernel.manifest().info.kernel.unwrap();
    let config = copy.host.storage().kernel_config_path(&kernel).unwrap();
    let text = std::fs::read_to_string(&config).unwrap();
    // Each is imported as its kernel's configuration would be: under its own digest.
    let doctored = [
        (Some("CONFIG_KASAN=y"), "KASAN"),
        (
            Some("CONFIG_DEBUG_PAGEALLOC_ENABLE_DEFAULT=y"),
            "debug_pagealloc",
        ),
        (None, "unknown"),
    ];
    let mut present = config.clone();
    for (line, reason) in doctored {
        std::fs::remove_file(&present).unwrap();
        if let Some(line) = line {
            let text = format!("{text}\n{line}\n");
            present = config.with_file_name(format!("config-{}", Digest::of(text.as_bytes())));
            std::fs::write(&present, text).unwrap();
        }
        is_not_scanned(&copy.host, &template, reason).await;
    }
    // One that is not what its name tells: cut short, it might lack the line that forbids the scan.
    std::fs::write(&config, &text[..text.len() / 2]).unwrap();
    is_not_scanned(&copy.host, &template, "unknown").await;
}

async fn is_not_scanned(host: &Host, template: &BuildId, reason: &str) {
    let (sandbox, _) = resume_build(host, template).await;
    let paused = pause_into_new(sandbox, host, PauseFlags::default()).await;
    let parent = host.storage().open_build(template).unwrap();
    not_scanned(&paused, Some(&parent), reason);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_rewrites_its_note_is_paused_without_a_scan_and_goes_on() {
    let host = host().await;
    let template = template(&host).await;
    let (sandbox, _) = resume_build(&host, &template).await;
    let told = sh(&sandbox, "cat /sys/kernel/vmcoreinfo").await;
    // Its address and length, and not a byte of what else lies there.
    let (addr, len) = told.split_once(' ').unwrap();
    let hex = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
    let (addr, note) = (hex(addr), vec![b'?'; hex(len).try_into().unwrap()]);
    sandbox.vmm().stop_vcpus().await.unwrap();
    let memory = File::from(sandbox.vmm().memory().unwrap().into_memfd().unwrap());
    memory.write_all_at(&note, addr).unwrap();
    sandbox.vmm().resume_vcpus().await.unwrap();
    let paused = pause_into_new(sandbox, &host, PauseFlags::default()).await;
    let _cleanup = Cleanup(host.storage(), vec![paused.build.id()]);
    let parent = host.storage().open_build(&template).unwrap();
    not_scanned(&paused, Some(&parent), "note");
    let (sandbox, _) = resume_build(&host, &paused.build.id()).await;
    assert_eq!(sh(&sandbox, "echo still here").await, "still here");
    sandbox.end().await;
}

/// What the agent of a guest says that has booted another kernel by itself (kexec).
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_speaks_of_another_boot_than_at_its_start_is_not_scanned() {
    let host = host().await;
    let template = template(&host).await;
    let (sandbox, _) = resume_build(&host, &template).await;
    let hidden = "echo another > /root/boot_id && \
                  mount --bind /root/boot_id /proc/sys/kernel/random/boot_id";
    sh(&sandbox, hidden).await;
    let paused = pause_into_new(sandbox, &host, PauseFlags::default()).await;
    let _cleanup = Cleanup(host.storage(), vec![paused.build.id()]);
    let parent = host.storage().open_build(&template).unwrap();
    not_scanned(&paused, Some(&parent), "another kernel");
}

/// Its only processor belongs to somebody else: another kernel could run there as well.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_agent_answers_nothing_is_paused_and_not_scanned() {
    let host = host().await;
    let template = template(&host).await;
    let (sandbox, _) = resume_build(&host, &template).await;
    // Neither of the kernel's two provisions against this, the newer one where there is one.
    let hog = "echo -1 > /proc/sys/kernel/sched_rt_runtime_us && \
               mount -t debugfs none /sys/kernel/debug && cd /sys/kernel/debug/sched && \
               for left in fair_server/*/runtime; do test ! -e $left || echo 0 > $left; done && \
               setsid chrt -f 99 sh -c 'sleep 1; while :; do :; done' > /dev/null 2>&1 &";
    sh(&sandbox, hog).await;
    let envd = sandbox.envd().with_deadline(SILENCE);
    let falls_silent = async { while envd.metrics().await.is_ok() {} };
    tokio::time::timeout(ANSWER_MAX, falls_silent)
        .await
        .unwrap();
    let paused = pause_into_new(sandbox, &host, PauseFlags::default()).await;
    let _cleanup = Cleanup(host.storage(), vec![paused.build.id()]);
    let parent = host.storage().open_build(&template).unwrap();
    not_scanned(&paused, Some(&parent), "does not answer");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_asks_its_flags_whether_to_scan_and_to_refer() {
    let host = host().await;
    let template = template(&host).await;
    let flags = PauseFlags {
        free_page_scan: false,
        disk_references: false,
        ..PauseFlags::default()
    };
    let (sandbox, _) = resume_build(&host, &template).await;
    sh(&sandbox, READ_FILES).await;
    let without = pause_into_new(sandbox, &host, flags).await;
    let (sandbox, _) = resume_build(&host, &template).await;
    sh(&sandbox, READ_FILES).await;
    let with = pause_into_new(sandbox, &host, PauseFlags::default()).await;
    let _cleanup = Cleanup(host.storage(), vec![without.build.id(), with.build.id()]);
    assert_eq!(without.report.scan, None);
    assert_eq!(without.report.memory.base_image_pages, 0);
    let (without, with) = (&without.report.memory, &with.report.memory);
    assert!(with.base_image_pages > 1000, "{}", with.base_image_pages);
    assert!(
        with.stored_pages * 2 < without.stored_pages,
        "{with:?} {without:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_cache_that_is_stored_as_references_is_warm_and_right_after_the_resume() {
    let host = host().await;
    let template = template(&host).await;
    let (sandbox, _) = resume_build(&host, &template).await;
    let sum = format!("{READ_FILES} | sha256sum");
    let before = sh(&sandbox, &sum).await;
    let paused = pause_into_new(sandbox, &host, PauseFlags::default()).await;
    let _cleanup = Cleanup(host.storage(), vec![paused.build.id()]);
    assert!(paused.report.memory.base_image_pages > 1000);
    let (sandbox, _) = resume_build(&host, &paused.build.id()).await;
    let read_sectors = "awk '$3 == \"vda\" {print $6}' /proc/diskstats";
    let disk_before = sh(&sandbox, read_sectors).await;
    assert_eq!(
        sh(&sandbox, &sum).await,
        before,
        "out of the restored page cache"
    );
    let disk_after = sh(&sandbox, read_sectors).await;
    let read: u64 = disk_after.parse::<u64>().unwrap() - disk_before.parse::<u64>().unwrap();
    assert!(
        read < 2048,
        "{read} sectors were read again: the cache is not warm"
    );
    sh(&sandbox, "echo 3 > /proc/sys/vm/drop_caches").await;
    assert_eq!(sh(&sandbox, &sum).await, before, "from the disk");
    sandbox.end().await;
}

/// Reads some 20 MiB of the base image's files.
const READ_FILES: &str = "find /usr/lib/python3* -name '*.py' -type f | sort | xargs cat";

/// No page has become free by a scan: those that are, were free in the parent already and are as
/// they were.
fn not_scanned(paused: &Paused, parent: Option<&Build>, reason: &str) {
    let scan = paused.report.scan.as_ref().unwrap();
    let why = scan.why_not().unwrap();
    assert!(why.contains(reason), "{why}");
    let now_free = free_marks(&paused.build);
    let was_free = parent.map_or_else(|| vec![false; now_free.len()], free_marks);
    let became_free = now_free
        .iter()
        .zip(&was_free)
        .filter(|(now, was)| **now && !**was);
    assert_eq!(became_free.count(), 0, "{reason}");
}

fn free_marks(build: &Build) -> Vec<bool> {
    let memory = build.memory().unwrap();
    let free = memory.index().runs().filter(|run| run.what == Entry::Free);
    let pages = memory.index().len_pages();
    marks(pages, free.map(|run| (run.first_page, run.pages)))
}

/// The guest looks at its own flags over and over, and our scan falls between: of each page that all
/// looks agree on, the scan must say the same.
async fn agrees_with_its_guest(host: &Host, sandbox: &Sandbox, what: &str) {
    upload(sandbox, &workload(), GUEST_PROGRAM).await;
    sh(sandbox, UNBIND_BALLOON).await;
    sh(sandbox, "echo 1 > /proc/sys/vm/compact_memory; sleep 1").await;
    let command = Command::new(GUEST_PROGRAM)
        .arg("free-pages")
        .stdin()
        .tag(TAG);
    let mut process = sandbox.envd().start(&command, None).await.unwrap();
    let watching: Watching = line(&mut process, ANSWER_MAX).await;
    assert!(watching.pages >= sandbox.spec().memory_pages(), "{what}");
    tokio::time::sleep(AFTER_A_MESSAGE).await;
    sandbox.vmm().stop_vcpus().await.unwrap();
    let (report, free) = sandbox
        .find_free_pages(host.storage(), SETTLE_MAX)
        .await
        .unwrap();
    sandbox.vmm().resume_vcpus().await.unwrap();
    let selector = Selector::Tag(TAG.to_owned());
    let envd = sandbox.envd();
    envd.send_input(&selector, b"\n").await.unwrap();
    let guest: FreePages = line(&mut process, ANSWER_MAX).await;
    assert_eq!(report.why_not(), None, "{what}");

    let pages = sandbox.spec().memory_pages();
    let by_scan = marks(pages, free.iter().map(|run| (run.first_page, run.pages)));
    let (by_guest, changed) = (place(sandbox, &guest.free), place(sandbox, &guest.changed));
    // Used in every look and free by the scan; and the harmless other way.
    let (mut lost, mut missed) = (0_u64, 0_u64);
    let (mut compared, mut free_pages) = (0_u64, 0_u64);
    for (page, scanned) in by_scan.iter().enumerate() {
        if !changed[page] {
            compared += 1;
            lost += u64::from(*scanned && !by_guest[page]);
            missed += u64::from(!*scanned && by_guest[page]);
        }
        free_pages += u64::from(*scanned);
    }
    let mem_free = guest.mem_free_kib / 4;
    let looks = guest.looks;
    println!(
        "{what}: {compared} of {pages} pages compared in {looks} looks, {lost} used ones free by the scan, {missed} free \
         ones used by it; {free_pages} free, MemFree {mem_free} pages"
    );
    assert!(
        compared * 100 > pages * 98,
        "{what}: the guest is not quiet: {compared} of {pages}"
    );
    assert_eq!(lost, 0, "{what}: pages in use that the scan calls free");
    assert!(missed <= RESTLESS_PAGES_MAX, "{what}: {missed} missed");
    let per_cpu = PER_CPU_PAGES_MAX * u64::from(sandbox.spec().vcpus);
    assert!(
        free_pages.abs_diff(mem_free) <= per_cpu,
        "{what}: {free_pages} free, MemFree {mem_free}"
    );
}

/// The guest's page frame numbers, as pages of its memory file.
fn place(sandbox: &Sandbox, runs: &[(u64, u64)]) -> Vec<bool> {
    let ram = sandbox.vmm().ram();
    let runs = runs.iter().flat_map(|&(first, pages)| {
        ram.iter().filter_map(move |segment| {
            let (from, until) = (
                segment.guest_addr / 4096,
                segment.guest_addr / 4096 + segment.len_bytes / 4096,
            );
            let (first, end) = (first.max(from), (first + pages).min(until));
            let offset = segment.guest_offset_bytes / 4096;
            (first < end).then(|| (offset + first - from, end - first))
        })
    });
    marks(sandbox.spec().memory_pages(), runs)
}

fn marks(pages: u64, runs: impl Iterator<Item = (u64, u64)>) -> Vec<bool> {
    let mut marks = vec![false; pages.try_into().unwrap()];
    for (first, pages) in runs {
        let first = usize::try_from(first).unwrap();
        marks[first..first + usize::try_from(pages).unwrap()].fill(true);
    }
    marks
}
