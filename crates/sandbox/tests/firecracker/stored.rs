//! What a pause stores is the guest as it was, whichever way it was paused.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use torpor_build::{Digest, ImageReader, PAGE_SIZE, ValidateOptions};
use torpor_sandbox::Sandbox;
use torpor_sandbox::assets::{Assets, DEFAULT_KERNEL};
use torpor_sandbox::flags::PauseFlags;
use torpor_sandbox::inspect::{look_into_build, look_into_sandbox};
use torpor_sandbox::pause::{Paused, checkpoint};
use torpor_vmm::DrainOutcome;

use crate::common::{
    Cleanup, UNBIND_BALLOON, kernel_is_content, pause_request, sh, wait_until, workload,
};
use crate::lab::{
    DRAIN_MS, GUEST_MEMORY_BYTES, boot_guest, can_drain, check, compare, drained, drained_whole,
    host, paused_and_seen, paused_exactly, plain, resume_guest, seen_at_capture, show, template,
    verify, work,
};

/// What the workload of the arms uses and frees.
const FREED_MIB: u64 = 16;
/// What a guest makes anew before each checkpoint, …
const FRESH_BYTES: u64 = 4 << 20;
/// … and what it writes besides, left alone.
const IDLE_BYTES_MAX: u64 = 8 << 20;

/// Devices have the last GiB below the fourth (before 1.13 three quarters of it): what goes beyond it is
/// a region of its own in the VMM, in its handshake, and in everything that goes by addresses.
const TWO_REGIONS_BYTES: u64 = 3584 << 20;

/// A file in the guest's memory, each of whose pages says which one it is, …
const KNOWN_PAGES: u64 = 1024;
/// … and that many of which are written anew, where they are, after a resume.
const REWRITTEN_PAGES: u64 = 512;
/// The least of the kernel that stands in memory as in its file: it patches some of its code.
const KERNEL_PAGES_MIN: usize = 1000;
/// What a drain gives back at least where much was freed: two hints.
const DRAINED_PAGES_MIN: u64 = 2048;

/// Pages are moved to make room for huge ones.
const NO_HUGE_PAGES: &str = "echo never > /sys/kernel/mm/transparent_hugepage/enabled";
fn known_page(mark: char, number: u64) -> Digest {
    Digest::of(format!("{mark}{number:<4094}\n").as_bytes())
}

/// Writes these pages where they are.
async fn write_known(sandbox: &Sandbox, mark: char, pages: u64) {
    let last = pages - 1;
    let line = format!("printf '{mark}%-4094s\\n' $(seq 0 {last}) 1<> /dev/shm/known");
    sh(sandbox, &line).await;
}

/// Writes pages that are to be given up.
async fn write_doomed(sandbox: &Sandbox) {
    let last = KNOWN_PAGES - 1;
    let line = format!("printf 'c%-4094s\\n' $(seq 0 {last}) > /dev/shm/doomed");
    sh(sandbox, &line).await;
}

/// The pages of a file that are not zero.
fn pages_of(path: &Path) -> Vec<Digest> {
    let bytes = std::fs::read(path).unwrap();
    let pages = bytes.chunks_exact(PAGE_SIZE);
    let pages = pages.filter(|page| page.iter().any(|byte| *byte != 0));
    pages.map(Digest::of).collect()
}

/// Where the pages of a build stand that are known.
fn places(image: &ImageReader, known: &HashSet<Digest>) -> HashMap<Digest, Vec<u64>> {
    let mut places: HashMap<Digest, Vec<u64>> = HashMap::new();
    let mut bytes = vec![0; PAGE_SIZE];
    for run in image.index().runs().filter(|run| !run.what.reads_as_zero()) {
        for page in run.first_page..run.first_page + run.pages {
            image.read_pages(page, &mut bytes).unwrap();
            let digest = Digest::of(&bytes);
            if known.contains(&digest) {
                places.entry(digest).or_default().push(page);
            }
        }
    }
    places
}

/// Where the pages of a mark stand, each of which is there.
fn places_of_known(image: &ImageReader, mark: char) -> HashMap<Digest, Vec<u64>> {
    let known = (0..KNOWN_PAGES).map(|number| known_page(mark, number));
    let places = places(image, &known.collect());
    assert_eq!(places.len() as u64, KNOWN_PAGES);
    places
}

/// Two builds of one state in which [`write_known`] has written the same since: what is known of it, be
/// it the guest's own, its program's or its kernel's, is the same at the same places.
fn assert_same_in_use(without: &Paused, with: &Paused) {
    let own: Vec<Digest> = (0..KNOWN_PAGES)
        .map(|number| known_page(if number < REWRITTEN_PAGES { 'b' } else { 'a' }, number))
        .collect();
    let program = pages_of(&workload());
    let kernel = pages_of(&Assets::find(None, DEFAULT_KERNEL).unwrap().kernel);
    let known = own.iter().chain(&program).chain(&kernel).copied().collect();
    let places = [without, with].map(|paused| places(&paused.build.memory().unwrap(), &known));
    // What was copied on its way may be there more than once, and the guest may have freed the copy.
    let same_place = |digest: &&Digest| match places.each_ref().map(|places| places.get(*digest)) {
        [None, _] => false,
        [Some(without), with] => {
            let with = with.unwrap_or_else(|| panic!("lost: {without:?}"));
            let same = without.iter().any(|page| with.contains(page));
            assert!(same, "{without:?} without, {with:?} with");
            true
        }
    };
    let same = |digests: &[Digest]| digests.iter().filter(same_place).count();
    let counts = [&own, &program, &kernel].map(|digests| same(digests));
    println!(
        "the same at the same places: {counts:?} pages of the guest's own, its program, its kernel"
    );
    assert_eq!(counts[0] as u64, KNOWN_PAGES);
    for digest in &own {
        assert_eq!(places[0][digest], places[1][digest]);
        assert_eq!(places[0][digest].len(), 1);
    }
    assert_eq!(counts[1], program.len());
    assert!(counts[2] > KERNEL_PAGES_MIN);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_guest_still_uses_is_the_same_in_a_build_with_a_drain_and_in_one_without() {
    let Some(host) = host().await else { return };
    let template = template(&host).await;
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    let sandbox = resume_guest(&host, &template).await;
    if !can_drain(&sandbox) {
        return;
    }
    // Free memory in large pieces; and from here on nothing moves a page.
    sh(&sandbox, NO_HUGE_PAGES).await;
    work(&sandbox, FREED_MIB).await;
    sh(&sandbox, "echo 1 > /proc/sys/vm/compact_memory").await;
    write_known(&sandbox, 'a', KNOWN_PAGES).await;
    let start = paused_exactly(sandbox, &host, plain()).await.build.id();
    cleanup.1.push(start);

    // Two of one state, which write the same to the same places; one is drained.
    let draining = PauseFlags {
        drain_ceiling_ms: DRAIN_MS,
        ..plain()
    };
    let mut builds = Vec::new();
    for flags in [plain(), draining] {
        let sandbox = resume_guest(&host, &start).await;
        write_known(&sandbox, 'b', REWRITTEN_PAGES).await;
        let paused = paused_exactly(sandbox, &host, flags).await;
        cleanup.1.push(paused.build.id());
        builds.push(paused);
    }
    let [without, with] = builds.as_slice() else {
        unreachable!("two arms");
    };
    let drain = with.report.drain.as_ref().unwrap();
    assert_eq!(drain.outcome, DrainOutcome::Done);
    let removed = |paused: &Paused| paused.report.memory.pages.removed;
    assert!(removed(with) >= removed(without) + DRAINED_PAGES_MIN);

    assert_same_in_use(without, with);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_way_to_pause_makes_a_build_of_the_guest_as_it_was() {
    let Some(host) = host().await else { return };
    let template = template(&host).await;
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    let arms = [
        ("plain", plain()),
        ("drain", drained(plain())),
        (
            "scan",
            PauseFlags {
                disk_references: false,
                ..PauseFlags::default()
            },
        ),
        ("scan and references", PauseFlags::default()),
    ];
    let mut stored = BTreeMap::new();
    let mut drained_by = None;
    for (name, flags) in arms {
        println!("arm {name}");
        let sandbox = resume_guest(&host, &template).await;
        work(&sandbox, FREED_MIB).await;
        let before = check(&sandbox).await;
        let whole_drain = drained_whole(&sandbox);
        let paused = paused_exactly(sandbox, &host, flags).await;
        cleanup.1.push(paused.build.id());
        assert!(paused.build.validate(ValidateOptions::default()).is_whole());
        stored.insert(name, paused.report.memory.raw_bytes);
        if flags.drain_ceiling_ms > 0 {
            let drain = paused.report.drain.as_ref().unwrap();
            assert_eq!(drain.outcome, whole_drain);
            drained_by = Some(drain.outcome.clone());
        }
        if flags.drain_ceiling_ms > 0 && whole_drain == DrainOutcome::Done {
            assert!(paused.report.drain_removes.unwrap() > 0);
            assert!(paused.report.memory.pages.removed > 0);
        }
        if flags.free_page_scan {
            assert_eq!(paused.report.scan.as_ref().unwrap().why_not(), None);
        }
        let sandbox = resume_guest(&host, &paused.build.id()).await;
        verify(&sandbox, &before).await;
        kernel_is_content(&sandbox, name).await;
        sandbox.end().await;
    }
    for (name, bytes) in &stored {
        println!(
            "FIGURE stored, {name}: {:.2} of plain",
            *bytes as f64 / stored["plain"] as f64
        );
    }
    // What the host gets of the freed memory is a matter of blocks; the scan finds all of it.
    let freed = FREED_MIB << 20;
    let drained = drained_by.expect("an arm with a drain");
    assert!(
        drained != DrainOutcome::Done || stored["drain"] + freed / 4 < stored["plain"],
        "{stored:?}"
    );
    assert!(stored["scan"] + freed / 2 < stored["plain"], "{stored:?}");
    assert!(
        stored["scan and references"] <= stored["scan"],
        "{stored:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_and_disk_survive_three_generations_and_a_drain_that_is_cut_short() {
    let Some(host) = host().await else { return };
    let mut last = template(&host).await;
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    let mut before = None;
    // No drain, one that ends by itself, one that has no time at all.
    for (generation, drain_ceiling_ms) in [0, DRAIN_MS, 1].into_iter().enumerate() {
        println!("generation {generation}");
        let sandbox = resume_guest(&host, &last).await;
        match &before {
            None => work(&sandbox, 2).await,
            Some(before) => drop(verify(&sandbox, before).await),
        }
        // Other memory, another disk, and memory that is freed again.
        let line = format!(
            "echo {generation} >> /root/log; head -c 4000000 /dev/urandom > /dev/shm/x; rm /dev/shm/x"
        );
        sh(&sandbox, &line).await;
        before = Some(check(&sandbox).await);
        let flags = PauseFlags {
            reclaim: true,
            drain_ceiling_ms,
            ..PauseFlags::default()
        };
        let whole_drain = drained_whole(&sandbox);
        let paused = paused_exactly(sandbox, &host, flags).await;
        last = paused.build.id();
        cleanup.1.push(last);
        let outcome = paused.report.drain.map(|drain| drain.outcome);
        let expected: &[Option<DrainOutcome>] = match drain_ceiling_ms {
            0 => &[None],
            1 => &[Some(DrainOutcome::CeilingReached), Some(whole_drain)],
            _ => &[Some(whole_drain)],
        };
        assert!(expected.contains(&outcome), "{outcome:?}");
    }
    let sandbox = resume_guest(&host, &last).await;
    verify(&sandbox, &before.unwrap()).await;
    assert_eq!(sh(&sandbox, "cat /root/log").await, "0\n1\n2");
    kernel_is_content(&sandbox, "after three generations").await;

    // A look at it while it runs, and at the build that it came from.
    let (storage, name) = (host.storage().clone(), sandbox.name().clone());
    let running = tokio::task::spawn_blocking(move || look_into_sandbox(&storage, &name));
    let running = running.await.unwrap().unwrap();
    let stored = look_into_build(&host.storage().open_build(&last).unwrap()).unwrap();
    for look in [&running, &stored] {
        let pages: u64 = look.classes.iter().map(|class| class.pages).sum();
        assert_eq!(look.ram_bytes, GUEST_MEMORY_BYTES);
        assert_eq!(pages * PAGE_SIZE as u64, GUEST_MEMORY_BYTES);
    }
    sh(&sandbox, "true").await;
}

/// Those of these pages that are not held. (What is there twice was copied on its way, and the copy freed
/// before.)
fn absent(places: &HashMap<Digest, Vec<u64>>, is_held: impl Fn(u64) -> bool) -> Vec<u64> {
    let pages = places
        .values()
        .filter_map(|places| match places.as_slice() {
            [page] if !is_held(*page) => Some(*page),
            _ => None,
        });
    pages.collect()
}

/// What the parent has there does not show through.
fn are_zero(image: &ImageReader, pages: &[u64]) {
    let mut bytes = vec![0; PAGE_SIZE];
    for page in pages {
        image.read_pages(*page, &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0), "page {page}");
    }
    println!(
        "{} pages of the parent's were given back, and are zero",
        pages.len()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_reports_its_free_pages_is_stored_as_exactly_as_one_that_does_not() {
    let Some(host) = host().await else { return };
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    let sandbox = boot_guest(&host, "fc-reporting", GUEST_MEMORY_BYTES).await;
    let balloon = sandbox.spec().balloon;
    assert_eq!(balloon.reporting, balloon.hinting, "{balloon:?}");
    if !can_drain(&sandbox) {
        return;
    }
    sh(&sandbox, NO_HUGE_PAGES).await;
    work(&sandbox, 64).await;
    write_known(&sandbox, 'a', KNOWN_PAGES).await;
    write_doomed(&sandbox).await;
    let held = || sandbox.vmm().memory().unwrap().held_bytes().unwrap();
    let after_the_work = held();
    wait_until("the freed memory is reported", || {
        held() + (32 << 20) < after_the_work
    });
    println!(
        "reported: {} of {} MiB are still held",
        held() >> 20,
        after_the_work >> 20
    );
    let before = check(&sandbox).await;
    let paused = paused_exactly(sandbox, &host, plain()).await;
    cleanup.1.push(paused.build.id());
    let image = paused.build.memory().unwrap();
    let [_, doomed] = ['a', 'c'].map(|mark| places_of_known(&image, mark));
    let recorded = &paused.build.manifest().info;
    assert_eq!(recorded.balloon, balloon);
    assert_eq!(recorded.vmm.name, "firecracker");

    // Two of that state, which free the same and write the same: one has lost its balloon, the other
    // reports on, and the pager learns of it.
    let start = paused.build.id();
    let mut builds = Vec::new();
    for reports in [false, true] {
        let sandbox = resume_guest(&host, &start).await;
        if !reports {
            sh(&sandbox, UNBIND_BALLOON).await;
        }
        let removed = || sandbox.pager_stats().unwrap().pages_removed;
        let removed_before = removed();
        // What is there is given up, having been brought in.
        let line = "cat /dev/shm/doomed > /dev/null; \
                    head -c 12000000 /dev/urandom > /dev/shm/x; rm /dev/shm/x /dev/shm/doomed";
        sh(&sandbox, line).await;
        if reports {
            wait_until("the freed memory is reported again", || {
                let reader = sandbox.vmm().memory().unwrap().reader().unwrap();
                let held = reader.present().unwrap();
                let is_held = |page| {
                    held.iter()
                        .any(|run| run.contains(&(page * PAGE_SIZE as u64)))
                };
                absent(&doomed, is_held).len() as u64 > KNOWN_PAGES / 2
            });
        }
        write_known(&sandbox, 'b', REWRITTEN_PAGES).await;
        assert_eq!(removed() > removed_before, reports);
        let (paused, seen) = paused_and_seen(sandbox, &host, plain()).await;
        cleanup.1.push(paused.build.id());
        let given_back = absent(&doomed, |page| seen.contains_key(&page));
        are_zero(&paused.build.memory().unwrap(), &given_back);
        assert_eq!(given_back.len() as u64 > KNOWN_PAGES / 2, reports);
        builds.push(paused);
    }
    let [without, with] = builds.as_slice() else {
        unreachable!("two arms");
    };
    assert_same_in_use(without, with);
    let sandbox = resume_guest(&host, &with.build.id()).await;
    verify(&sandbox, &before).await;
    kernel_is_content(&sandbox, "reporting").await;
}

/// Its memory is private to the VMM: what changed since a checkpoint is the host kernel's word.
#[tokio::test(flavor = "multi_thread")]
async fn one_firecracker_is_stored_again_and_again_while_it_goes_on() {
    let Some(host) = host().await else { return };
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    let template = template(&host).await;
    let booted = boot_guest(&host, "fc-checkpoints", TWO_REGIONS_BYTES).await;
    let resumed = resume_guest(&host, &template).await;
    for (name, regions, mut sandbox) in [("booted", 2, booted), ("resumed", 1, resumed)] {
        let pid = sandbox.vmm().pid();
        let regions_of = |sandbox: &Sandbox| sandbox.vmm().memory().unwrap().mappings.len();
        assert_eq!(regions_of(&sandbox), regions);
        let mut sums = Vec::new();
        for round in 0..3 {
            let fill = format!(
                "rm -f /dev/shm/{}; head -c {FRESH_BYTES} /dev/urandom > /dev/shm/{round}; \
                 sha256sum < /dev/shm/{round}",
                round - 2_i32
            );
            sums.push(sh(&sandbox, &fill).await);
            let (seen, progress) = seen_at_capture(&sandbox);
            let whole_drain = drained_whole(&sandbox);
            let flags = if round == 0 {
                drained(PauseFlags::default())
            } else {
                PauseFlags::default()
            };
            let request = pause_request(flags, progress);
            let stored = Box::pin(checkpoint(sandbox, &host, request)).await.unwrap();
            let parent = sums.len() > 1;
            cleanup.1.push(stored.build.id());
            println!("{name}, checkpoint {round}");
            show(&stored.report);
            compare(&stored.build.memory().unwrap(), &seen.lock().unwrap());
            assert!(stored.not_thawed.is_none());
            let outcome = stored
                .report
                .drain
                .as_ref()
                .map(|drain| drain.outcome.clone());
            assert_eq!(outcome, (round == 0).then_some(whole_drain));
            let bytes = stored.report.memory.raw_bytes;
            assert!(bytes >= FRESH_BYTES, "{bytes}");
            assert!(!parent || bytes < FRESH_BYTES + IDLE_BYTES_MAX, "{bytes}");
            sandbox = stored.sandbox;
            assert_eq!(sandbox.vmm().pid(), pid, "the same VM goes on");
        }
        sandbox.end().await;
        let last = cleanup.1.last().copied().unwrap();
        let sandbox = resume_guest(&host, &last).await;
        assert_eq!(regions_of(&sandbox), regions);
        let left = sh(
            &sandbox,
            "cat /dev/shm/1 | sha256sum; sha256sum < /dev/shm/2; ls /dev/shm",
        )
        .await;
        assert_eq!(left, format!("{}\n{}\n1\n2", sums[1], sums[2]));
        kernel_is_content(&sandbox, name).await;
        sandbox.end().await;
    }
}
