//! `torpor pager` serving processes that do what Firecracker does when it loads a snapshot: map
//! anonymous memory, make a userfaultfd that tells of discards, register, connect, and send the
//! regions and the descriptor in one message.
//!
//! Such a process is this test binary again, told by an environment variable to play the VMM: it
//! obeys commands on its stdin.
#![allow(
    missing_docs,
    clippy::cast_possible_truncation,
    clippy::multiple_unsafe_ops_per_block,
    clippy::panic,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "tests are documented by their names and fail by panicking, helpers included"
)]

mod hanging;
mod peers;
#[path = "../support/mod.rs"]
mod support;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::Command;

use rustix::process::{Resource, Signal};
use torpor_build::{BuildId, BuildInfo, ImageKind, PageContent, Storage};

use crate::peers::{PAGE, PAGES, Served, Vmm, send, until};

fn sum(pages: std::ops::Range<u64>) -> String {
    let word = |page: &u64| !(100..200).contains(page);
    pages.filter(word).sum::<u64>().to_string()
}

#[test]
fn several_vmms_at_once_get_their_memory_and_are_reported() {
    let mut served = Served::on_memory_file(PAGES, &["--connections", "3"]);
    let mut vmms = [served.vmm(), served.vmm(), served.vmm()];
    for vmm in &mut vmms {
        assert_eq!(vmm.ask("read 1500"), "1500");
        assert_eq!(vmm.ask("read 150"), "0");
    }
    for vmm in &mut vmms {
        assert_eq!(vmm.ask("discard 1490 20"), "discarded");
        assert_eq!(vmm.ask("read 1500"), "0");
        assert_eq!(vmm.ask("read 1510"), "1510");
        assert_eq!(vmm.ask("sum 0 1024"), sum(0..1024));
    }
    let pids = vmms.each_ref().map(|vmm| u64::from(vmm.child.id()));
    drop(vmms);
    assert_eq!(served.end(), 0);
    assert!(!served.socket().exists());
    let report = served.report().unwrap();
    let wanted = [
        "faults",
        "pages_copied",
        "pages_zeroed",
        "pages_prefetched",
        "removes",
        "pages_removed",
        "eagain",
        "p50_us",
        "p99_us",
        "max_us",
        "bytes_per_s",
    ];
    for field in wanted {
        assert!(report[field].is_u64(), "{field}: {report}");
        for vmm in report["vmms"].as_array().unwrap() {
            assert!(vmm[field].is_u64(), "{field}: {vmm}");
        }
    }
    assert_eq!(
        (
            report["vmms_served"].as_u64(),
            report["vmms_failed"].as_u64()
        ),
        (Some(3), Some(0))
    );
    assert_eq!(
        (report["removes"].as_u64(), report["pages_removed"].as_u64()),
        (Some(3), Some(60))
    );
    assert!(report["pages_copied"].as_u64() >= Some(3 * 900));
    assert!(report["pages_zeroed"].as_u64() >= Some(3 * 100));
    assert!(report["bytes_per_s"].as_u64() > Some(0));
    let told = report["vmms"].as_array().unwrap();
    assert!(
        told.iter()
            .all(|vmm| pids.contains(&vmm["pid"].as_u64().unwrap()))
    );
}

/// Needs huge pages of the host; says so in a line where there are none.
#[test]
fn a_vmm_of_huge_pages_is_served() {
    let mut served = Served::on_memory_file(PAGES, &["--connections", "1"]);
    let Some(mut vmm) = Vmm::start_huge(&served.socket()) else {
        eprintln!("not run: this host has not enough huge pages (sysctl vm.nr_hugepages=64)");
        return;
    };
    let sum = |pages: std::ops::Range<usize>| pages.sum::<usize>().to_string();
    assert_eq!(vmm.ask("read 700"), "700");
    assert_eq!(vmm.ask("read 150"), "0");
    assert_eq!(vmm.ask("sum 200 2048"), sum(200..2048));
    assert_eq!(vmm.ask("discard 512 1024"), "discarded");
    assert_eq!(vmm.ask("sum 512 1536"), "0");
    assert_eq!(vmm.ask("sum 1536 2048"), sum(1536..2048));
    drop(vmm);
    assert_eq!(served.end(), 0);
    let report = served.report().unwrap();
    let figure = |name: &str| report[name].as_u64().unwrap();
    assert_eq!(figure("pages_copied"), 2048);
    // One for each region that it lies in.
    assert_eq!((figure("removes"), figure("pages_removed")), (2, 1024));
    assert_eq!(figure("pages_zeroed"), 1024);
    assert_eq!(figure("faults"), 6);
}

#[test]
fn a_build_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let storage = Storage::open(&dir.path().join("storage")).unwrap();
    let id = BuildId::random();
    let staged = storage.begin_build(id).unwrap();
    for kind in [ImageKind::Memory, ImageKind::Disk] {
        let mut writer = staged.image_writer(kind, PAGES as u64, None).unwrap();
        let stored: Vec<u8> = (0..1000_u64)
            .flat_map(|page| [page.to_le_bytes(); PAGE / 8].concat())
            .collect();
        writer.push(0, 1000, PageContent::Data(&stored)).unwrap();
        let rest = PAGES as u64 - 1000;
        writer.push(1000, rest, PageContent::Removed).unwrap();
        writer.finish().unwrap();
    }
    staged.write_vmstate(b"device state").unwrap();
    drop(staged.commit(BuildInfo::default()).unwrap());
    drop(storage);
    let mut served = Served::start_in(dir, &["--build", &id.to_string()], &["--connections", "1"]);
    let mut vmm = served.vmm();
    assert_eq!(vmm.ask("sum 0 1000"), (0..1000).sum::<u64>().to_string());
    assert_eq!(vmm.ask("sum 1000 2048"), "0");
    drop(vmm);
    assert_eq!(served.end(), 0);
}

#[test]
fn a_vmm_whose_memory_cannot_be_read_is_killed_and_the_report_says_why() {
    let mut served = Served::on_memory_file(PAGES, &["--connections", "1"]);
    let mut vmm = served.vmm();
    assert_eq!(vmm.ask("read 3"), "3");
    let memory = File::options()
        .write(true)
        .open(served.dir.path().join("memory"));
    memory.unwrap().set_len(PAGE as u64).unwrap();
    vmm.send("read 1200");
    assert!(vmm.is_killed());
    assert_eq!(served.end(), 0);
    let report = served.report().unwrap();
    assert_eq!(report["vmms_failed"], 1);
    let error = report["vmms"][0]["error"].as_str().unwrap();
    assert!(
        error.contains("guest page 1200 could not be read"),
        "{error}"
    );
}

#[test]
fn a_peer_that_speaks_wrongly_is_refused_and_the_others_are_served() {
    let served = Served::on_memory_file(PAGES, &["--connections", "6"]);
    let null = File::open("/dev/null").unwrap();
    let region = "[{\"base_host_virt_addr\":4096,\"size\":4096,\"offset\":0}]";
    let wrong = [
        ("no json at all", vec![], "not a list"),
        ("[]", vec![null.as_fd()], "0 memory regions"),
        (region, vec![], "0 descriptors"),
        (region, vec![null.as_fd()], "no userfaultfd"),
        (region, vec![null.as_fd(), null.as_fd()], "2 descriptors"),
    ];
    for (refused, (message, fds, reason)) in (1..).zip(wrong) {
        let stream = UnixStream::connect(served.socket()).unwrap();
        send(&stream, message, &fds);
        // Refused is: the connection ends.
        let got = std::io::Read::read(&mut &stream, &mut [0]).unwrap();
        assert_eq!(got, 0, "{message}");
        let told = served.refusals(refused).pop().unwrap();
        let error = told["error"].as_str().unwrap();
        assert!(error.contains(reason), "{error}");
        assert_eq!(told["pid"], std::process::id());
    }
    let mut vmm = served.vmm();
    assert_eq!(vmm.ask("read 7"), "7");
    drop(vmm);
    let report = until("the report", || {
        served.report().filter(|report| report["vmms_served"] == 1)
    });
    assert_eq!(report["vmms"].as_array().unwrap().len(), 1);
}

#[test]
fn a_guest_larger_than_the_memory_file_is_refused_and_killed() {
    let served = Served::on_memory_file(PAGES / 2, &[]);
    let mut vmm = served.vmm();
    vmm.send("read 2000");
    assert!(vmm.is_killed(), "it would wait for ever");
    let refusal = &served.refusals(1)[0];
    let error = refusal["error"].as_str().unwrap();
    assert!(
        error.contains("larger than") && error.contains("was killed"),
        "{error}"
    );
    assert_eq!(refusal["pid"], vmm.child.id());
}

#[test]
fn a_vmm_whose_regions_cannot_be_served_is_refused_and_killed() {
    let served = Served::on_memory_file(PAGES, &[]);
    let mut vmm = Vmm::start_saying(&served.socket(), PAGES, PAGE, 1 << 30);
    vmm.send("read 7");
    assert!(vmm.is_killed(), "it would wait for ever");
    assert_eq!(served.vmm().ask("read 7"), "7");
    let refusal = &served.refusals(1)[0];
    let error = refusal["error"].as_str().unwrap();
    assert!(
        error.contains("region at") && error.contains("was killed"),
        "{error}"
    );
    assert_eq!(refusal["pid"], vmm.child.id());
}

#[test]
fn an_interrupt_kills_the_vmms_and_still_reports_them() {
    let mut served = Served::on_memory_file(PAGES, &[]);
    let mut vmm = served.vmm();
    assert_eq!(vmm.ask("read 9"), "9");
    assert!(support::signal(served.child.id(), Signal::INT));
    assert!(vmm.is_killed());
    assert_eq!(served.end(), 130);
    let report = served.report().unwrap();
    assert_eq!(report["vmms_failed"], 1);
    assert!(!served.socket().exists());
}

#[test]
fn a_socket_that_exists_is_not_taken_over() {
    let served = Served::on_memory_file(PAGES, &[]);
    let again = Command::new(env!("CARGO_BIN_EXE_torpor"))
        .args(["pager", "--socket", "pager.sock", "--memfile", "memory"])
        .current_dir(served.dir.path())
        .output()
        .unwrap();
    assert_eq!(again.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&again.stderr).contains("another pager may be listening"));
    assert!(served.socket().exists());
}

#[test]
fn connections_beyond_the_descriptors_wait_and_harm_nobody_who_is_served() {
    let served = Served::on_memory_file(PAGES, &[]);
    let mut vmm = served.vmm();
    assert_eq!(vmm.ask("read 7"), "7");
    // Enough for one at a time.
    served.limit(Resource::Nofile, served.open_descriptors() + 9);
    let silent: Vec<_> = (0..20)
        .map(|_| UnixStream::connect(served.socket()).unwrap())
        .collect();
    for page in 1000..1100 {
        assert_eq!(vmm.ask(&format!("read {page}")), page.to_string());
    }
    drop(silent);
    let mut another = served.vmm();
    assert_eq!(another.ask("read 8"), "8");
    assert_eq!(vmm.ask("read 9"), "9");
}

#[test]
fn a_vmm_that_comes_when_descriptors_are_short_is_served_when_there_are_some() {
    let served = Served::on_memory_file(PAGES, &[]);
    let mut first = served.vmm();
    assert_eq!(first.ask("read 7"), "7");
    let open = served.open_descriptors();
    // As many as a connection needs at most, and every number below.
    for few in 0..=8 {
        served.signal(Signal::STOP);
        let mut vmm = served.waiting_vmm();
        served.limit(Resource::Nofile, open + few);
        served.signal(Signal::CONT);
        // Whatever it does about the newcomer, it has done by then.
        for page in 1000..1100 {
            assert_eq!(first.ask(&format!("read {page}")), page.to_string());
        }
        served.limit(Resource::Nofile, open + 100);
        assert_eq!(vmm.ask("read 8"), "8");
    }
}

#[test]
fn a_vmm_for_which_no_thread_can_be_started_is_killed_and_harms_nobody() {
    let served = Served::on_memory_file(PAGES, &[]);
    let mut first = served.vmm();
    assert_eq!(first.ask("read 7"), "7");
    served.signal(Signal::STOP);
    let mut vmm = served.waiting_vmm();
    vmm.send("read 7");
    let statm = std::fs::read_to_string(format!("/proc/{}/statm", served.child.id())).unwrap();
    let pages: u64 = statm.split(' ').next().unwrap().parse().unwrap();
    // Room for a message, and for no thread's stack.
    served.limit(Resource::As, (pages + 32) * PAGE as u64);
    served.signal(Signal::CONT);
    assert!(vmm.is_killed(), "it would wait for ever");
    assert_eq!(first.ask("read 8"), "8");
    let error = served.refusals(1)[0]["error"].to_string();
    assert!(error.contains("thread"), "{error}");
}

#[test]
fn a_vmm_beyond_the_last_connection_is_killed_and_does_not_hang() {
    let mut served = Served::on_memory_file(PAGES, &["--connections", "1"]);
    served.signal(Signal::STOP);
    let mut first = served.waiting_vmm();
    let mut second = served.waiting_vmm();
    second.send("read 7");
    served.signal(Signal::CONT);
    assert_eq!(first.ask("read 7"), "7");
    assert!(second.is_killed(), "it would wait for ever");
    assert_eq!(first.ask("read 8"), "8");
    assert!(UnixStream::connect(served.socket()).is_err());
    drop(first);
    assert_eq!(served.end(), 0);
    assert_eq!(served.refusals(1)[0]["pid"], second.child.id());
}

#[test]
fn a_vmm_that_nobody_has_accepted_yet_is_killed_when_the_pager_is_interrupted() {
    let mut served = Served::on_memory_file(PAGES, &[]);
    served.signal(Signal::STOP);
    let mut vmms = [served.waiting_vmm(), served.waiting_vmm()];
    served.signal(Signal::INT);
    served.signal(Signal::CONT);
    for vmm in &mut vmms {
        assert!(vmm.is_killed());
    }
    assert_eq!(served.end(), 130);
}
