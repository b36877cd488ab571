//! The whole pipeline with real guests under a real Firecracker: boot, pause, resume, generations,
//! clones, failures, and every build compared byte by byte with the guest that it was made of.
//!
//! Needs a Firecracker (`TORPOR_FIRECRACKER`) and KVM: `make test-firecracker` gives both, on a host
//! without KVM by emulating one. Without them nothing is run here, which each test says. What is
//! printed are figures of one run: ratios between its arms mean something, its times do not.

#![allow(missing_docs, reason = "tests")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    reason = "a helper that fails ends the test, and figures are shown"
)]

#[path = "../common/mod.rs"]
mod common;
mod lab;
mod life;
mod stored;
