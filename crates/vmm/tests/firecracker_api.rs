//! What torpor says to Firecracker, against a peer that answers as the real one does: in every
//! order, slowly, not at all, and with every refusal.

#![allow(missing_docs, reason = "tests")]
#![allow(
    clippy::unwrap_used,
    reason = "a helper of a test that fails ends the test"
)]

mod firecracker_peer;

use std::sync::Arc;
use std::time::{Duration, Instant};

use firecracker_peer::{Answer, Peer, refusal};
use proptest::prelude::*;
use serde_json::{Value, json};
use torpor_vmm::DrainOutcome;
use torpor_vmm::Version;
use torpor_vmm::firecracker::{ApiError, drain_balloon, install_balloon};

const DEADLINE: Duration = Duration::from_secs(20);
const START: &str = "PATCH /balloon/hinting/start";
const STATUS: &str = "GET /balloon/hinting/status";
const STOP: &str = "PATCH /balloon/hinting/stop";

fn status(host_cmd: u32, guest_cmd: impl Into<Value>) -> Answer {
    Answer::Json(
        200,
        json!({ "host_cmd": host_cmd, "guest_cmd": guest_cmd.into(), "new_in_2_0": true }),
    )
}

/// One that hints.
const NEW: Version = Version::new(1, 16, 0);

async fn drain(peer: &Peer, ceiling: Duration) -> DrainOutcome {
    drain_balloon(&peer.api(), NEW, ceiling, Arc::new(|| 0), None)
        .await
        .outcome
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(work)
}

#[tokio::test]
async fn a_refusal_carries_firecrackers_own_words() {
    let peer = Peer::script([refusal("No such thing.")]);
    let error = peer
        .api()
        .put("/machine-config", &json!({}), DEADLINE)
        .await
        .unwrap_err();
    assert_eq!(error.fault_message(), Some("No such thing."));
    assert_eq!(
        error.to_string(),
        "Firecracker refused PUT /machine-config (400): No such thing."
    );
}

#[tokio::test]
async fn success_with_content_is_not_success_without() {
    let content = || Answer::Json(200, json!({ "state": "Running" }));
    let peer = Peer::script([content(), Answer::Empty(204)]);
    let error = peer.api().put("/actions", &json!({}), DEADLINE).await;
    assert!(
        matches!(error, Err(ApiError::Malformed { .. })),
        "{error:?}"
    );
    let error = peer.api().get::<Value>("/", DEADLINE).await;
    assert!(
        matches!(error, Err(ApiError::Malformed { .. })),
        "{error:?}"
    );
}

#[tokio::test]
async fn an_answer_that_breaks_off_or_never_ends_is_an_error_that_says_so() {
    let peer = Peer::script([
        Answer::CloseInTheMiddle,
        Answer::CloseAtOnce,
        Answer::Endless,
        Answer::Raw("SSH-2.0-OpenSSH\r\n".into()),
        Answer::Json(400, json!("plain words")),
    ]);
    let api = peer.api();
    for _ in 0..2 {
        let error = api.get::<Value>("/", DEADLINE).await.unwrap_err();
        assert!(matches!(error, ApiError::Broken { .. }), "{error}");
    }
    let error = api.get::<Value>("/", DEADLINE).await.unwrap_err();
    assert!(matches!(error, ApiError::TooLong { .. }), "{error}");
    let error = api.get::<Value>("/", DEADLINE).await.unwrap_err();
    assert!(matches!(error, ApiError::Broken { .. }), "{error}");
    let error = api.get::<Value>("/", DEADLINE).await.unwrap_err();
    assert_eq!(error.fault_message(), Some("\"plain words\""));
}

#[tokio::test]
async fn a_request_ends_at_its_deadline_and_the_next_one_is_not_confused_by_it() {
    let late = Answer::After(Duration::from_secs(30), Box::new(Answer::Empty(204)));
    let peer = Peer::script([late, status(7, 7)]);
    let api = peer.api();
    let error = api
        .put("/actions", &json!({}), Duration::from_millis(50))
        .await
        .unwrap_err();
    assert!(matches!(error, ApiError::Timeout { .. }), "{error}");
    let answer: Value = api.get("/balloon/hinting/status", DEADLINE).await.unwrap();
    assert_eq!(answer["host_cmd"], 7);
}

#[tokio::test]
async fn nobody_at_the_socket_is_an_error_that_names_the_request() {
    let peer = Peer::script([]);
    let api = peer.api();
    drop(peer);
    let error = api.get::<Value>("/version", DEADLINE).await.unwrap_err();
    assert!(matches!(error, ApiError::Connect { .. }), "{error}");
    assert!(error.to_string().contains("GET /version"), "{error}");
}

#[tokio::test]
async fn the_balloon_is_armed_for_hinting_and_reports_only_where_asked() {
    let peer = Peer::script([Answer::Empty(204), Answer::Empty(204), Answer::Empty(204)]);
    let api = peer.api();
    let new = Version::new(1, 16, 0);
    let silent = install_balloon(&api, new, false, DEADLINE).await.unwrap();
    assert!(silent.hinting && !silent.reporting);
    let both = install_balloon(&api, new, true, DEADLINE).await.unwrap();
    assert!(both.hinting && both.reporting);
    let old = install_balloon(&api, Version::new(1, 13, 0), true, DEADLINE).await;
    let old = old.unwrap();
    assert!(!old.hinting && !old.reporting);

    let bodies: Vec<Value> = peer.seen().into_iter().map(|(_, body)| body).collect();
    assert_eq!(bodies[0]["free_page_hinting"], true);
    assert_eq!(bodies[0].get("free_page_reporting"), None);
    assert_eq!(bodies[1]["free_page_reporting"], true);
    assert_eq!(
        bodies[2],
        json!({ "amount_mib": 0, "deflate_on_oom": true })
    );
}

#[tokio::test]
async fn a_field_that_is_refused_by_name_is_left_out_and_any_other_refusal_is_told() {
    // The refusal names what is known, too.
    let unknown = |field: &str, known: &str| {
        refusal(&format!(
            "An error occurred when deserializing the json body of a request: unknown field \
             `{field}`, expected one of `amount_mib`, `deflate_on_oom`, `{known}`"
        ))
    };
    let [reporting, hinting] = ["free_page_reporting", "free_page_hinting"];
    let peer = Peer::script([
        unknown(reporting, hinting),
        Answer::Empty(204),
        unknown(hinting, reporting),
        Answer::Empty(204),
        refusal("Too much."),
    ]);
    let api = peer.api();
    let version = Version::new(1, 16, 0);
    for other in [true, false] {
        let less = install_balloon(&api, version, true, DEADLINE);
        let less = less.await.unwrap();
        assert_eq!((less.hinting, less.reporting), (other, !other));
    }
    let error = install_balloon(&api, version, true, DEADLINE).await;
    assert_eq!(error.unwrap_err().fault_message(), Some("Too much."));
}

#[tokio::test]
async fn a_guest_that_only_began_is_waited_for() {
    let peer = Peer::script([
        Answer::Empty(204),
        status(2, 0),
        status(2, Value::Null),
        status(2, 2),
        status(2, 2),
        status(1, 0),
    ]);
    let outcome = drain(&peer, DEADLINE).await;
    assert_eq!(outcome, DrainOutcome::Done);
    assert_eq!(
        peer.paths(),
        [START, STATUS, STATUS, STATUS, STATUS, STATUS]
    );
    assert_eq!(peer.seen()[0].1, json!({ "acknowledge_on_stop": true }));
}

#[tokio::test]
async fn a_guest_that_is_never_through_is_stopped_at_the_ceiling() {
    let peer = Peer::always([Answer::Empty(204)], status(3, 3));
    let began = Instant::now();
    let outcome = drain(&peer, Duration::from_millis(120)).await;
    assert_eq!(outcome, DrainOutcome::CeilingReached);
    assert!(began.elapsed() < DEADLINE);
    assert_eq!(peer.paths().last().map(String::as_str), Some(STOP));
}

#[tokio::test]
async fn every_refusal_has_an_outcome_of_its_own_and_stops_nothing() {
    let refusals = [
        (
            "The requested operation is not supported before starting the microVM.",
            DrainOutcome::GuestSilent,
        ),
        (
            "Balloon: Device not activated yet.",
            DrainOutcome::GuestSilent,
        ),
        ("Balloon: Device not found", DrainOutcome::NoBalloon),
        (
            "Balloon: Attempting to use hinting when not enabled",
            DrainOutcome::NotArmed,
        ),
        (
            "Unrecognized PATCH request path `hinting`.",
            DrainOutcome::Unsupported,
        ),
        (
            "Invalid request method and/or path: PATCH /balloon/hinting/start.",
            DrainOutcome::Unsupported,
        ),
    ];
    for (words, expected) in refusals {
        let peer = Peer::script([refusal(words)]);
        assert_eq!(drain(&peer, DEADLINE).await, expected, "{words}");
        assert_eq!(peer.paths(), [START], "{words}");
    }
}

#[tokio::test]
async fn a_version_that_cannot_hint_is_asked_nothing_and_its_memory_is_told() {
    let peer = Peer::script([]);
    let old = Version::new(1, 13, 9);
    let report = drain_balloon(&peer.api(), old, DEADLINE, Arc::new(|| 7), None).await;
    assert_eq!(report.outcome, DrainOutcome::Unsupported);
    assert_eq!((report.released_bytes, report.held_bytes), (0, 7));
    assert!(peer.paths().is_empty());
}

#[tokio::test]
async fn a_start_that_went_wrong_in_any_other_way_is_stopped_and_told() {
    for answer in [
        refusal("Internal: out of patience"),
        Answer::CloseInTheMiddle,
        Answer::Json(500, json!({ "fault_message": "no" })),
    ] {
        let peer = Peer::script([answer, Answer::Empty(204)]);
        let outcome = drain(&peer, DEADLINE).await;
        assert!(matches!(outcome, DrainOutcome::Failed(_)), "{outcome:?}");
        assert_eq!(peer.paths(), [START, STOP]);
    }
}

#[tokio::test]
async fn a_ceiling_of_zero_asks_nothing() {
    let peer = Peer::script([]);
    assert_eq!(drain(&peer, Duration::ZERO).await, DrainOutcome::Skipped);
    assert!(peer.paths().is_empty());
}

#[tokio::test]
async fn a_hanging_api_ends_the_drain_all_the_same() {
    let peer = Peer::always(
        [],
        Answer::After(DEADLINE * 10, Box::new(Answer::Empty(204))),
    );
    let outcome = drain(&peer, Duration::from_millis(50)).await;
    assert_eq!(outcome, DrainOutcome::CeilingReached);
}

#[tokio::test]
async fn what_came_back_is_measured_by_memory_held_and_by_discards() {
    let peer = Peer::script([Answer::Empty(204), status(1, 0)]);
    let (held, discarded) = (sequence([900, 500]), sequence([100, 350]));
    let count = || discarded();
    let held = Arc::new(held);
    let report = drain_balloon(&peer.api(), NEW, DEADLINE, held, Some(&count)).await;
    assert_eq!(report.released_bytes, 400);
    assert_eq!(report.held_bytes, 500);
    assert_eq!(report.discarded_bytes, Some(250));
}

fn sequence<const N: usize>(values: [u64; N]) -> impl Fn() -> u64 {
    let at = std::sync::atomic::AtomicUsize::new(0);
    move || {
        values[at
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed)
            .min(N - 1)]
    }
}

/// Anything that a Firecracker, or what is left of one, may answer.
fn any_answer() -> impl Strategy<Value = Answer> {
    prop_oneof![
        4 => Just(Answer::Empty(204)),
        3 => (0_u32..5, prop_oneof![Just(Value::Null), (0_u32..5).prop_map(Value::from)])
            .prop_map(|(host, guest)| status(host, guest)),
        1 => Just(Answer::CloseInTheMiddle),
        1 => Just(Answer::CloseAtOnce),
        1 => Just(Answer::Json(200, json!({ "host_cmd": "one" }))),
        1 => Just(Answer::Json(200, json!({}))),
        1 => Just(refusal("Balloon: Device not activated yet.")),
        1 => Just(refusal("Balloon: Device not found")),
        1 => Just(refusal("hinting when not enabled")),
        1 => Just(refusal("whatever")),
        1 => Just(Answer::After(Duration::from_millis(20), Box::new(Answer::Empty(204)))),
    ]
}

proptest! {
    #[test]
    fn whatever_is_answered_a_drain_ends_and_says_done_only_when_it_is(
        answers in proptest::collection::vec(any_answer(), 0..12),
        in_haste in any::<bool>(),
    ) {
        let ceiling = if in_haste { Duration::from_millis(60) } else { DEADLINE };
        let (outcome, seen) = block_on(async {
            let peer = Peer::always(answers.clone(), Answer::CloseAtOnce);
            let outcome = drain(&peer, ceiling).await;
            (outcome, peer.paths())
        });
        // The answers as they were given, beside the requests.
        let given: Vec<_> = seen.iter().zip(answers.iter()).collect();
        let started = given.first().is_some_and(|(_, answer)| answer.is_no_content());
        let done_seen = given
            .iter()
            .any(|(path, answer)| *path == STATUS && answer.host_cmd() == Some(1));
        // The ceiling may be reached between an answer's being given and its being read.
        if !in_haste || outcome != DrainOutcome::CeilingReached {
            prop_assert_eq!(outcome == DrainOutcome::Done, started && done_seen);
        }
        prop_assert_eq!(seen.first().map(String::as_str), Some(START));
        prop_assert_eq!(seen.iter().filter(|path| *path == START).count(), 1);
        let nothing_began = matches!(
            outcome,
            DrainOutcome::GuestSilent
                | DrainOutcome::NoBalloon
                | DrainOutcome::NotArmed
                | DrainOutcome::Unsupported
        );
        let stopped = seen.last().map(String::as_str) == Some(STOP);
        prop_assert_eq!(stopped, outcome != DrainOutcome::Done && !nothing_began);
    }
}
