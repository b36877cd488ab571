//! What torpor asks of a Firecracker over a machine's life: boot, stop and go on, device state, load.
//! The API is a stand-in that answers as the real one does, and does everything wrong that one can,
//! at every request; the process that it stands for is a real one, which is started, and can die.

#![allow(missing_docs, reason = "tests")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::exit,
    reason = "a helper of a test that fails ends the test; the stand-in's process dies aloud"
)]

#[path = "../firecracker_peer/mod.rs"]
mod firecracker_peer;
mod machine;
mod stand_in;

use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::task::JoinSet;
use torpor_vmm::firecracker::{self, InstalledBalloon, check_network, prepare_resume};
use torpor_vmm::{Result, Vmm, VmmError};

use stand_in::{Fault, HandOver, LAST_WORDS, StandIn};

/// Each request has three seconds here.
const SOON: Duration = Duration::from_secs(25);
/// How many machines are made at once.
const AT_ONCE: usize = 8;

async fn boot(stand_in: &StandIn) -> Result<(Box<dyn Vmm>, InstalledBalloon)> {
    let (binary, machine) = (stand_in.binary(), stand_in.machine());
    let (source, log) = (stand_in.boot_source(), stand_in.log());
    firecracker::boot(&binary, &machine, &source, stand_in.dir(), &log).await
}

async fn resume(stand_in: &StandIn) -> Result<Box<dyn Vmm>> {
    let (binary, machine) = (stand_in.binary(), stand_in.machine());
    let mut incoming = prepare_resume(&binary, &machine, stand_in.dir(), &stand_in.log()).await?;
    let state = stand_in.state().saved_bytes();
    let handshake = incoming.hand_over(&state).await?;
    assert_eq!(handshake.mappings.len(), 1);
    assert_eq!(handshake.mappings[0].host_addr, stand_in.state().host_addr);
    incoming.finish().await
}

/// The requests of a boot, as the real one's documentation has them.
fn requests_of_a_boot() -> Vec<(String, Value)> {
    let command_line = "console=ttyS0 panic=-1 reboot=k i8042.noaux i8042.nomux i8042.dumbkbd \
                        tsc=nowatchdog loglevel=5 page_reporting.page_reporting_order=0 init_on_alloc=0 torpor.test=stand-in";
    let drive = |id: &str, path: &str, read_only: bool| {
        json!({ "drive_id": id, "path_on_host": path, "is_root_device": false,
            "is_read_only": read_only, "cache_type": "Unsafe" })
    };
    let requests = [
        ("GET /version", Value::Null),
        (
            "PUT /machine-config",
            json!({ "vcpu_count": 2, "mem_size_mib": 64 }),
        ),
        (
            "PUT /boot-source",
            json!({ "kernel_image_path": "kernel", "initrd_path": "initramfs",
                "boot_args": command_line }),
        ),
        ("PUT /drives/base", drive("base", "base.img", true)),
        ("PUT /drives/layer", drive("layer", "layer.img", false)),
        (
            "PUT /vsock",
            json!({ "guest_cid": 3, "uds_path": "vsock.sock" }),
        ),
        ("PUT /entropy", json!({})),
        (
            "PUT /balloon",
            json!({ "amount_mib": 0, "deflate_on_oom": true, "free_page_hinting": true,
                "free_page_reporting": true }),
        ),
        ("PUT /actions", json!({ "action_type": "InstanceStart" })),
    ];
    requests
        .into_iter()
        .map(|(request, body)| (request.to_owned(), body))
        .collect()
}

#[test]
#[ignore = "no test by itself: a stand-in starts it as its process"]
fn stand_in() {
    stand_in::run_process();
}

#[tokio::test]
async fn a_boot_asks_for_each_part_of_the_machine_and_then_starts_it() {
    let stand_in = StandIn::new();
    let (vm, balloon) = boot(&stand_in).await.unwrap();
    assert_eq!(stand_in.peer.seen(), requests_of_a_boot());
    assert!(balloon.hinting && balloon.reporting);
    let memory = vm.memory().unwrap();
    assert_eq!(memory.pid, stand_in.state().pid);
    assert_eq!(memory.mappings[0].host_addr, stand_in.state().host_addr);
    assert!(stand_in.agent_is_tried_for().await);
    drop(vm);
    stand_in.is_left_behind_by_nobody().await;
}

#[tokio::test]
async fn a_firecracker_that_opens_no_api_is_an_error_with_a_next_step() {
    let stand_in = StandIn::new();
    std::fs::remove_file(stand_in.dir().join("api.sock")).unwrap();
    let error = boot(&stand_in).await.err().unwrap().to_string();
    assert!(error.contains("did not open its API within"), "{error}");
    assert!(
        error.contains("overloaded") && !error.contains("jail"),
        "{error}"
    );
    // It was there, and said its number, which nobody read.
    stand_in.state().wait_for_process();
    stand_in.is_left_behind_by_nobody().await;
}

#[tokio::test]
async fn a_network_card_is_asked_for_between_the_other_devices_and_the_balloon() {
    if let Err(why) = check_network() {
        eprintln!("not run: {why}");
        return;
    }
    let stand_in = StandIn::new();
    let machine = torpor_vmm::MachineConfig {
        network: true,
        ..stand_in.machine()
    };
    let (binary, source, log) = (stand_in.binary(), stand_in.boot_source(), stand_in.log());
    let booted = firecracker::boot(&binary, &machine, &source, stand_in.dir(), &log).await;
    drop(booted.unwrap());
    let mut expected = requests_of_a_boot();
    let card = json!({ "iface_id": "card", "host_dev_name": "card",
        "guest_mac": "52:54:00:74:6f:72" });
    expected.insert(7, ("PUT /network-interfaces/card".to_owned(), card));
    assert_eq!(stand_in.peer.seen(), expected);
    stand_in.is_left_behind_by_nobody().await;
}

/// Runs a case for each request that can go wrong, in each way; some at once.
async fn at_each<F: Future<Output = ()> + Send + 'static>(
    requests: usize,
    case: impl Fn(usize, Fault) -> F,
) {
    let ways = |number| Fault::ALL.map(|fault| (number, fault));
    let cases: Vec<_> = (0..requests).flat_map(ways).collect();
    for some in cases.chunks(AT_ONCE) {
        let mut running = JoinSet::new();
        for (number, fault) in some {
            running.spawn(case(*number, *fault));
        }
        running.join_all().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_boot_that_goes_wrong_at_any_request_ends_there_and_leaves_nothing_behind() {
    let requests = requests_of_a_boot();
    let names: Vec<String> = requests.into_iter().map(|(name, _)| name).collect();
    at_each(names.len(), |number, fault| {
        let names = names.clone();
        async move {
            let stand_in = StandIn::with(Some((number, fault)), HandOver::Well);
            let began = Instant::now();
            let booted = boot(&stand_in).await;
            assert!(began.elapsed() < SOON, "{fault:?} at {number}");
            if fault == Fault::Late {
                booted.unwrap();
                assert_eq!(stand_in.peer.paths(), names);
            } else {
                let error = booted.unwrap_err();
                let text = error.to_string();
                assert!(
                    text.contains(fault.words()),
                    "{fault:?} at {number}: {text}"
                );
                match error {
                    VmmError::Start { .. } => assert_eq!((number, fault), (0, Fault::Die)),
                    VmmError::Died { .. } => assert_eq!(fault, Fault::Die, "at {number}"),
                    error => {
                        assert!(matches!(error, VmmError::Api { .. }), "{text}");
                        assert!(text.contains(&names[number]), "{fault:?}: {text}");
                    }
                }
                assert_eq!(stand_in.peer.paths(), names[..=number]);
            }
            stand_in.is_left_behind_by_nobody().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_machine_is_booted_without_what_its_balloon_does_not_know() {
    const UNKNOWN: &str = "unknown field `free_page_reporting`, expected one of `amount_mib`, \
                           `free_page_hinting`";
    let stand_in = StandIn::with(Some((7, Fault::Refuse(UNKNOWN))), HandOver::Well);
    let (vm, balloon) = boot(&stand_in).await.unwrap();
    assert!(balloon.hinting && !balloon.reporting);
    let asked = stand_in.asked_after(7);
    assert_eq!(asked, ["PUT /balloon", "PUT /balloon", "PUT /actions"]);
    drop(vm);
    stand_in.is_left_behind_by_nobody().await;
}

#[tokio::test]
async fn a_resume_loads_the_state_and_hands_the_page_faults_over_before_it_is_loaded() {
    let stand_in = StandIn::new();
    let vm = resume(&stand_in).await.unwrap();
    let load = json!({ "snapshot_path": "vmstate", "resume_vm": false,
        "mem_backend": { "backend_path": "pager.sock", "backend_type": "Uffd" } });
    let expected = [
        ("GET /version".to_owned(), Value::Null),
        ("PUT /snapshot/load".to_owned(), load),
    ];
    assert_eq!(stand_in.peer.seen(), expected);
    assert!(!fs::exists(stand_in.dir().join("vmstate")).unwrap());
    assert_eq!(
        vm.memory().unwrap().mappings[0].host_addr,
        stand_in.state().host_addr
    );

    // It stands still until it is told otherwise.
    vm.resume_vcpus().await.unwrap();
    assert_eq!(stand_in.asked_after(2), ["GET /", "PATCH /vm"]);
    assert_eq!(stand_in.peer.seen()[3].1, json!({ "state": "Resumed" }));
    assert!(stand_in.agent_is_tried_for().await);
    drop(vm);
    stand_in.is_left_behind_by_nobody().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resume_that_goes_wrong_at_any_request_ends_there_and_leaves_nothing_behind() {
    const NAMES: [&str; 2] = ["GET /version", "PUT /snapshot/load"];
    at_each(NAMES.len(), |number, fault| async move {
        let stand_in = StandIn::with(Some((number, fault)), HandOver::Well);
        let began = Instant::now();
        let resumed = resume(&stand_in).await;
        assert!(began.elapsed() < SOON, "{fault:?} at {number}");
        if fault == Fault::Late {
            drop(resumed.unwrap());
        } else {
            let error = resumed.unwrap_err();
            let text = error.to_string();
            let never_began = number == 1 && matches!(fault, Fault::Lost | Fault::Dripping);
            match (&error, fault) {
                (VmmError::Handshake { .. }, _) if never_began => {
                    assert!(text.contains("nothing came within"), "{text}");
                }
                (VmmError::Start { .. } | VmmError::Died { .. }, Fault::Die) => {
                    assert!(text.contains(LAST_WORDS), "{text}");
                }
                (VmmError::State { what, reason }, Fault::Refuse(words)) => {
                    assert_eq!((*what, reason.as_str()), ("load", words));
                }
                (VmmError::State { reason, .. }, Fault::RefuseOddly) => {
                    assert_eq!(reason, "<html>");
                }
                (VmmError::Api { .. }, _) => {
                    assert!(text.contains(NAMES[number]), "{fault:?}: {text}");
                    assert!(text.contains(fault.words()), "{fault:?}: {text}");
                }
                _ => panic!("{fault:?} at {number}: {error:?}"),
            }
            assert_eq!(stand_in.peer.paths(), NAMES[..=number]);
        }
        stand_in.is_left_behind_by_nobody().await;
    })
    .await;
}

#[tokio::test]
async fn a_load_that_does_not_hand_its_page_faults_over_is_an_error_that_says_so() {
    let ways = [
        (HandOver::Not, "it asked nobody for its memory"),
        (HandOver::Garbage, "missing field"),
        (HandOver::WithoutDescriptor, "bytes without a descriptor"),
        (HandOver::CloseAtOnce, "0 bytes without a descriptor"),
    ];
    for (way, words) in ways {
        let stand_in = StandIn::with(None, way);
        let began = Instant::now();
        let text = resume(&stand_in).await.unwrap_err().to_string();
        assert!(text.contains(words), "{way:?}: {text}");
        assert!(began.elapsed() < SOON, "{way:?}");
        stand_in.is_left_behind_by_nobody().await;
    }
}

#[tokio::test]
async fn a_boot_or_a_load_that_nobody_waits_for_any_more_ends_with_what_it_began() {
    for number in 0..9 {
        let stand_in = StandIn::with(Some((number, Fault::Lost)), HandOver::Well);
        let asked = async {
            while stand_in.state().asked() <= number {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::select! {
            // Both may be so when a busy host comes back to it.
            biased;
            () = asked => {}
            booted = boot(&stand_in) => panic!("{booted:?}"),
        }
        stand_in.is_left_behind_by_nobody().await;
    }
    for fault in [Fault::Lost, Fault::Unanswered] {
        let stand_in = StandIn::with(Some((1, fault)), HandOver::Well);
        let asked = async {
            while stand_in.state().asked() < 2 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::select! {
            // Both may be so when a busy host comes back to it.
            biased;
            () = asked => {}
            resumed = resume(&stand_in) => panic!("{resumed:?}"),
        }
        stand_in.is_left_behind_by_nobody().await;
    }
}
