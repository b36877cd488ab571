//! A guest whose state is taken again and again while its Firecracker goes on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use torpor_pager::{PageSet, Pager};
use torpor_vmm::{ChangeTracker, DrainOutcome};

use crate::lab::{Image, Lab, SETTLE_DEADLINE, binary, capture, drain, drained, pages_of, reclaim};
use crate::support::Guest;

/// Three times: different work each time, then a checkpoint that takes only what changed.
const ROUNDS: usize = 3;

/// A guest that goes on, and its image as of the last checkpoint.
struct Going {
    guest: Guest,
    image: Image,
    tracker: ChangeTracker,
    /// What a whole drain of it comes to.
    drained: DrainOutcome,
}

impl Going {
    /// What the guest does between two checkpoints; the last time next to nothing.
    async fn work(&mut self, round: usize, pager: Option<&Pager>) {
        let guest = &mut self.guest;
        guest.vm.resume_vcpus().await.unwrap();
        guest.count().await;
        match round {
            0 => {
                guest.ask("keep 4").await;
            }
            // What was used once is given back, and some of it read again.
            1 => {
                guest.ask("churn 24").await;
                reclaim(guest).await;
                let report = drain(guest, pager, Duration::from_secs(120)).await;
                assert_eq!(report.outcome, self.drained);
                guest.ask("churn 8").await;
            }
            _ => {}
        }
        guest.vm.stop_vcpus().await.unwrap();
        guest.vm.save_state().await.unwrap();
    }

    /// Takes what changed since the checkpoint before; returns how many pages were read.
    fn checkpoint(&mut self, served: Option<(&Pager, &mut PageSet)>) -> usize {
        let began = Instant::now();
        let reader = self.guest.vm.memory().unwrap().reader().unwrap();
        let changes = self.tracker.changes().unwrap();
        let mut touched = pages_of(&changes.touched);
        match served {
            None => self.image.forget(pages_of(&changes.gone)),
            // Who serves the page faults knows what was only brought in, and what was given back.
            Some((pager, removed_before)) => {
                pager.settle(SETTLE_DEADLINE).unwrap();
                let dirty = pager.dirty().unwrap();
                touched.retain(|page| dirty.written.contains(*page as u64));
                let removed = dirty.removed.runs();
                let removed = removed.flat_map(|run| run.first_page..run.end_page());
                let newly = removed.filter(|page| !removed_before.contains(*page));
                self.image.forget(newly.map(|page| page as usize));
                *removed_before = dirty.removed;
            }
        }
        let looked = began.elapsed();
        let taken = touched.len();
        self.image.take(&reader, touched);
        let read = began.elapsed();
        self.tracker.mark().unwrap();
        println!(
            "checkpoint: {taken} pages, looked {looked:?}, read {read:?}, marked {:?}",
            began.elapsed()
        );
        taken
    }

    /// Compares every byte of the guest's memory with the image; `absent` says what absent pages hold.
    /// Returns how many pages hold something.
    fn compare(&self, absent: Image) -> usize {
        let reader = self.guest.vm.memory().unwrap().reader().unwrap();
        let mut whole = absent;
        whole.take(&reader, pages_of(&reader.present().unwrap()));
        let both = whole.0.iter().zip(&self.image.0);
        let differ = (0..).zip(both).filter(|(_, (now, taken))| now != taken);
        let differ: Vec<usize> = differ.map(|(page, _)| page).collect();
        let some = &differ[..differ.len().min(9)];
        assert!(differ.is_empty(), "{} pages differ: {some:?}", differ.len());
        whole.0.iter().flatten().count()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn checkpoints_of_a_booted_guest_take_what_changed_and_are_the_whole_memory() {
    let Some(binary) = binary() else { return };
    let lab = Lab::new(binary);
    let (mut guest, _) = lab.boot(false, "").await;
    guest.ask("keep 4").await;
    guest.vm.stop_vcpus().await.unwrap();
    guest.vm.save_state().await.unwrap();
    let image = capture(&*guest.vm, None);
    let Some(tracker) = ChangeTracker::start(&guest.vm.memory().unwrap()).unwrap() else {
        println!("not run: this host's kernel keeps no soft-dirty bits");
        return;
    };
    let mut going = Going {
        guest,
        image,
        tracker,
        drained: drained(&lab.binary),
    };
    let mut taken = Vec::new();
    for round in 0..ROUNDS {
        going.work(round, None).await;
        taken.push(going.checkpoint(None));
        let stored = going.compare(Image(vec![None; going.image.0.len()]));
        println!(
            "round {round}: {} of {stored} pages that hold something",
            taken[round]
        );
    }
    // The last time it was idle: less, though a huge page that was written into counts whole.
    assert!(taken[0] >= 1024 && taken[2] < taken[1], "{taken:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn checkpoints_of_a_resumed_guest_take_what_changed_and_are_the_whole_memory() {
    let Some(binary) = binary() else { return };
    let lab = Lab::new(binary);
    let (mut guest, _) = lab.boot(false, "").await;
    let kept = guest.ask("keep 4").await;
    guest.vm.stop_vcpus().await.unwrap();
    let state = guest.vm.save_state().await.unwrap();
    let parent = Arc::new(capture(&*guest.vm, None));
    guest.vm.kill().await.unwrap();

    let (next, mut guest, pager) = lab.resume(&state, &parent).await;
    assert_eq!(guest.ask("kept").await, kept);
    guest.vm.stop_vcpus().await.unwrap();
    guest.vm.save_state().await.unwrap();
    // The first is what was written since the resume, as at any pause.
    let image = capture(&*guest.vm, Some((&pager, &parent)));
    let mut removed = pager.dirty().unwrap().removed;
    let Some(tracker) = ChangeTracker::start(&guest.vm.memory().unwrap()).unwrap() else {
        println!("not run: this host's kernel keeps no soft-dirty bits");
        return;
    };
    let mut going = Going {
        guest,
        image,
        tracker,
        drained: drained(&lab.binary),
    };
    let mut taken = Vec::new();
    for round in 0..ROUNDS {
        going.work(round, Some(&pager)).await;
        taken.push(going.checkpoint(Some((&pager, &mut removed))));
        println!(
            "round {round}: {} pages, {} written since the resume",
            taken[round],
            pager.dirty().unwrap().written.len()
        );
    }
    // What is absent is as it was before the resume, unless it was given back.
    let mut absent = Image::clone(&parent);
    let given_back = removed
        .runs()
        .flat_map(|run| run.first_page..run.end_page());
    absent.forget(given_back.map(|page| page as usize));
    going.compare(absent);
    // What was brought in is not taken, nor what was written before the last checkpoint.
    assert!(taken[0] >= 1024 && taken[2] < 1024, "{taken:?}");
    going.guest.vm.kill().await.unwrap();
    drop((pager, next));
}
