//! A sandbox's life: boot, resume, the pause pipeline, and the flags that steer it.
//!
//! This is where the parts meet. [`boot`](boot::boot) and [`resume`](resume::resume) give a
//! [`Sandbox`]; [`pause`](pause::pause) turns it into a build. The VMM knows no builds, the pager no
//! VMM, the build format neither; only this crate knows all of them.
//!
//! What it does not do: speak to a person (the `torpor` crate does), or keep sandboxes of other
//! processes.

mod answer;
pub mod assets;
pub mod boot;
mod capture;
pub mod disk;
pub mod error;
mod fill;
pub mod flags;
pub mod host;
mod incoming;
pub mod initramfs;
pub mod inspect;
pub mod metrics;
pub mod pause;
mod physical;
pub mod progress;
pub mod resume;
pub mod rootfs;
pub mod run_times;
mod sandbox;
pub mod scan;
mod spec;
pub mod vmm;

pub use fill::ImageSource;
pub use sandbox::Sandbox;
pub use spec::GuestSpec;
