//! A machine that was booted or loaded: stopped, told to go on and stored, in any order and whatever
//! Firecracker answers.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::timeout;
use torpor_vmm::Version;
use torpor_vmm::{DrainOutcome, Vmm, VmmError};

use crate::stand_in::{Fault, HandOver, LAST_WORDS, StandIn};
use crate::{AT_ONCE, SOON, boot, resume};

#[tokio::test]
async fn a_stop_a_state_and_a_resume_are_one_request_each_and_a_look_at_the_state() {
    let stand_in = StandIn::new();
    let (vm, _) = boot(&stand_in).await.unwrap();
    let booted = stand_in.state().asked();
    vm.stop_vcpus().await.unwrap();
    assert_eq!(vm.save_state().await.unwrap(), b"state 1");
    vm.resume_vcpus().await.unwrap();
    vm.resume_vcpus().await.unwrap();
    let expected = [
        "PATCH /vm",
        "GET /",
        "PUT /snapshot/create",
        "GET /",
        "PATCH /vm",
        "GET /",
    ];
    assert_eq!(stand_in.asked_after(booted), expected);
    let seen = stand_in.peer.seen().split_off(booted);
    assert_eq!(seen[0].1, json!({ "state": "Paused" }));
    let create =
        json!({ "snapshot_type": "Full", "snapshot_path": "vmstate", "mem_file_path": "." });
    assert_eq!(seen[2].1, create);
    assert_eq!(seen[4].1, json!({ "state": "Resumed" }));
    assert_eq!(stand_in.state().wrongs, [""; 0]);
}

#[tokio::test]
async fn a_state_is_not_asked_of_a_machine_that_runs() {
    let stand_in = StandIn::new();
    let (vm, _) = boot(&stand_in).await.unwrap();
    let booted = stand_in.state().asked();
    let error = vm.save_state().await.unwrap_err();
    assert!(matches!(error, VmmError::WrongState { .. }), "{error}");
    assert_eq!(stand_in.asked_after(booted), ["GET /"]);
}

#[tokio::test]
async fn a_state_that_is_no_file_of_reasonable_size_is_an_error_and_the_machine_goes_on() {
    let stand_in = StandIn::with(None, HandOver::Well);
    let (vm, _) = boot(&stand_in).await.unwrap();
    vm.stop_vcpus().await.unwrap();
    let path = stand_in.dir().join("vmstate");
    // It said that it was written: it was not, it is a link to what is none of its business, it is
    // larger than any state.
    let large = stand_in.dir().join("large");
    std::fs::File::create(&large)
        .unwrap()
        .set_len(1 << 30)
        .unwrap();
    let ways: [(&str, &dyn Fn()); 3] = [
        ("No such file", &|| {}),
        ("Too many levels", &|| {
            std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        }),
        ("limit of 67108864 bytes", &|| {
            rustix::fs::rename(&large, &path).unwrap()
        }),
    ];
    const WRITTEN: &str = "Cannot perform open on the memory backing file: Is a directory";
    for (words, prepare) in ways {
        prepare();
        stand_in.state().break_next(1, Fault::Refuse(WRITTEN));
        let text = vm.save_state().await.unwrap_err().to_string();
        assert!(text.contains(words), "{text}");
        std::fs::remove_file(&path).ok();
        vm.resume_vcpus().await.unwrap();
        vm.stop_vcpus().await.unwrap();
    }
    assert_eq!(
        vm.save_state().await.unwrap(),
        stand_in.state().saved_bytes()
    );
}

#[tokio::test]
async fn a_machine_that_went_on_without_saying_so_is_reached_and_stopped_as_any_other() {
    let stand_in = StandIn::new();
    let (vm, _) = boot(&stand_in).await.unwrap();
    vm.stop_vcpus().await.unwrap();
    vm.save_state().await.unwrap();
    stand_in.state().break_next(1, Fault::Unanswered);
    let error = vm.resume_vcpus().await.unwrap_err();
    check_error(&error, Fault::Unanswered);
    assert_eq!(stand_in.state().state, "Running");
    stand_in.state().nothing_breaks();
    vm.resume_vcpus().await.unwrap();
    assert!(stand_in.agent_is_tried_for().await);
    // The event that ends its connections is the guest's already: it takes another one.
    vm.stop_vcpus().await.unwrap();
    vm.resume_vcpus().await.unwrap();
    assert_eq!(stand_in.state().wrongs, [""; 0]);
    assert!(stand_in.agent_is_tried_for().await);
}

/// Firecracker serves no device from any request to stop on, refused or not, until one to go on.
#[tokio::test]
async fn a_machine_that_refused_to_stop_serves_its_devices_and_its_agent_again() {
    let releases = [
        ("1.15.1", Version::new(1, 15, 1)),
        ("1.16.1", Version::new(1, 16, 1)),
    ];
    for (release, version) in releases {
        let stand_in = StandIn::of(release, version);
        let (vm, _) = boot(&stand_in).await.unwrap();
        let then = [None, Some(Fault::RefuseOddly), Some(Fault::Unanswered)];
        for (number, fault) in then.into_iter().enumerate() {
            // The next stop, and what follows upon it.
            stand_in.state().break_next(0, Fault::RefuseOddly);
            vm.stop_vcpus().await.unwrap_err();
            stand_in.state().nothing_breaks();
            assert!(stand_in.state().devices_stand);
            if let Some(fault) = fault {
                // As over a late answer of a vCPU: going on, or the second stop before it.
                stand_in.state().break_next(1, fault);
            }
            vm.resume_vcpus().await.unwrap();
            stand_in.state().nothing_breaks();
            assert_eq!(stand_in.state().state, "Running");
            assert!(!stand_in.state().devices_stand, "{release}, {number}");
            assert!(stand_in.agent_is_tried_for().await);
        }
        vm.stop_vcpus().await.unwrap();
        vm.resume_vcpus().await.unwrap();
        assert_eq!(stand_in.state().wrongs, [""; 0], "{release}");
    }
}

#[tokio::test]
async fn a_start_of_hinting_that_would_be_lost_is_not_taken_for_a_run_that_is_done() {
    let stand_in = StandIn::new();
    let (vm, _) = boot(&stand_in).await.unwrap();
    let drain = async || vm.drain(DRAIN_CEILING, None).await.outcome;
    assert_eq!(drain().await, DrainOutcome::Done);
    vm.stop_vcpus().await.unwrap();
    let asked = stand_in.state().asked();
    assert!(matches!(drain().await, DrainOutcome::Failed(_)));
    assert_eq!(stand_in.asked_after(asked), [""; 0]);
    vm.resume_vcpus().await.unwrap();
    assert_eq!(drain().await, DrainOutcome::Done);
    assert_eq!(stand_in.state().runs, 2);
}

/// For a run that the stand-in has done at once, or never.
const DRAIN_CEILING: Duration = Duration::from_secs(3);

#[derive(Debug, Clone, Copy)]
enum Step {
    Stop,
    Resume,
    Save,
    Drain,
}

/// A machine's life: where it comes from, and its steps, each with what goes wrong at one of its
/// requests.
#[derive(Debug, Clone)]
struct Life {
    loaded: bool,
    release: (&'static str, Version),
    steps: Vec<(Step, Option<(usize, Fault)>)>,
}

fn any_life() -> impl Strategy<Value = Life> {
    let step = prop_oneof![
        Just(Step::Stop),
        Just(Step::Resume),
        Just(Step::Save),
        Just(Step::Drain),
    ];
    let fault = (0..4_usize, proptest::sample::select(Fault::ALL.as_slice()));
    let fault = proptest::option::weighted(0.3, fault);
    let releases = [
        ("1.14.0", Version::new(1, 14, 0)),
        ("1.15.1", Version::new(1, 15, 1)),
        ("1.16.0", Version::new(1, 16, 0)),
        ("1.17.0-dev", Version::new(1, 17, 0)),
    ];
    let life = (
        any::<bool>(),
        proptest::sample::select(releases.to_vec()),
        proptest::collection::vec((step, fault), 1..9),
    );
    life.prop_map(|(loaded, release, steps)| Life {
        loaded,
        release,
        steps,
    })
}

/// What must hold of an error over a fault.
fn check_error(error: &VmmError, fault: Fault) {
    let text = error.to_string();
    match (error, fault) {
        (VmmError::Died { .. }, Fault::Die) => assert!(text.contains(LAST_WORDS), "{text}"),
        (VmmError::State { reason, .. }, Fault::Refuse(words)) => assert_eq!(reason, words),
        (VmmError::State { reason, .. }, Fault::RefuseOddly) => assert_eq!(reason, "<html>"),
        (VmmError::State { reason, .. }, Fault::OtherSuccess) => {
            assert!(reason.contains("into a directory"), "{text}");
        }
        (VmmError::Api { .. }, _) => {
            let named = ["GET /", "PATCH /vm", "PUT /snapshot/create"];
            assert!(named.iter().any(|name| text.contains(name)), "{text}");
            assert!(text.contains(fault.words()), "{fault:?}: {text}");
        }
        _ => panic!("{fault:?}: {error:?}"),
    }
}

/// It is done when the guest did it, and one that stands still is not asked.
fn check_drain(outcome: &DrainOutcome, stand_in: &StandIn, stood: &str, runs: u32, asked: usize) {
    let requests = stand_in.asked_after(asked);
    let state = stand_in.state();
    let is_done = *outcome == DrainOutcome::Done;
    assert!(!is_done || state.runs > runs, "a run that was never made");
    assert!(stood == "Running" || requests.is_empty(), "{requests:?}");
    if requests.is_empty() {
        assert!(matches!(outcome, DrainOutcome::Failed(_)), "{outcome:?}");
    } else if state.met.iter().all(|fault| *fault == Fault::Late) {
        assert!(is_done, "{outcome:?}");
    }
}

/// One step, beside what the stand-in knows. False once the machine is dead.
async fn take(step: Step, vm: &dyn Vmm, stand_in: &StandIn) -> bool {
    let (asked, stood, runs) = {
        let state = stand_in.state();
        (state.asked(), state.state, state.runs)
    };
    let began = Instant::now();
    let done = match step {
        Step::Stop => vm.stop_vcpus().await.map(|()| None),
        Step::Resume => vm.resume_vcpus().await.map(|()| None),
        Step::Save => vm.save_state().await.map(Some),
        Step::Drain => {
            let outcome = vm.drain(DRAIN_CEILING, None).await.outcome;
            check_drain(&outcome, stand_in, stood, runs, asked);
            Ok(None)
        }
    };
    assert!(began.elapsed() < SOON, "{step:?}");
    let requests = stand_in.asked_after(asked);
    let state = stand_in.state();
    assert_eq!(state.wrongs, [""; 0], "{step:?}");
    let fault = state
        .met
        .last()
        .copied()
        .filter(|fault| *fault != Fault::Late);
    match (&done, fault) {
        (Ok(state_bytes), _) => match step {
            Step::Stop => assert_eq!(state.state, "Paused"),
            Step::Resume => {
                assert_eq!(state.state, "Running");
                assert!(!state.devices_stand, "its devices stand still");
            }
            Step::Save => {
                assert_eq!(state.state, "Paused");
                assert_eq!(state_bytes.as_ref(), Some(&state.saved_bytes()));
            }
            Step::Drain => {}
        },
        (Err(error), Some(fault)) => check_error(error, fault),
        (Err(VmmError::WrongState { .. }), None) => {
            assert!(matches!(step, Step::Save) && stood == "Running");
            assert_eq!(requests, ["GET /"]);
        }
        (Err(error), None) => panic!("{step:?}: {error}"),
    }
    if let Step::Stop = step {
        assert_eq!(requests, ["PATCH /vm"]);
    }
    state.met.last() != Some(&Fault::Die)
}

async fn live(life: Life) {
    let stand_in = StandIn::of(life.release.0, life.release.1);
    let vm = match life.loaded {
        true => resume(&stand_in).await.unwrap(),
        false => boot(&stand_in).await.unwrap().0,
    };
    let mut lives = true;
    for (step, fault) in life.steps {
        stand_in.state().nothing_breaks();
        if let Some((ahead, fault)) = fault {
            stand_in.state().break_next(ahead, fault);
        }
        lives = take(step, &*vm, &stand_in).await;
        if !lives {
            break;
        }
    }
    stand_in.state().nothing_breaks();
    if lives {
        // Whatever went wrong, it can go on, and its agent is reached.
        vm.resume_vcpus().await.unwrap();
        assert_eq!(stand_in.state().state, "Running");
        assert!(!stand_in.state().devices_stand);
        assert!(stand_in.agent_is_tried_for().await);
        assert_eq!(stand_in.state().wrongs, [""; 0]);
    } else {
        // The stand-in's API outlives its process; a drain does not wait to hear of the end.
        let exit = timeout(SOON, vm.wait_exit()).await.unwrap();
        assert!(exit.stderr_tail.contains(LAST_WORDS), "{exit}");
        let asked = stand_in.state().asked();
        for done in [vm.stop_vcpus().await, vm.resume_vcpus().await] {
            assert!(matches!(done, Err(VmmError::Died { .. })), "{done:?}");
        }
        assert!(vm.save_state().await.is_err() && vm.memory().is_err() && !vm.is_alive());
        assert_eq!(stand_in.state().asked(), asked, "nobody is asked");
    }
    drop(vm);
    stand_in.is_left_behind_by_nobody().await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, max_shrink_iters: 16, ..ProptestConfig::default() })]
    #[test]
    fn whatever_is_answered_a_step_is_done_or_an_error_and_the_machine_can_go_on(
        lives in proptest::collection::vec(any_life(), AT_ONCE),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut running = JoinSet::new();
            for life in lives {
                running.spawn(live(life));
            }
            while let Some(lived) = running.join_next().await {
                if let Err(failed) = lived {
                    std::panic::resume_unwind(failed.into_panic());
                }
            }
        });
    }
}
