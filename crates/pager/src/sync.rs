//! The locks of the threads: std's, or, for the test in `interleavings`, ones whose interleavings
//! shuttle chooses. Nothing else differs but a pause, which there is a step to let others run.

#[cfg(not(feature = "shuttle"))]
pub(crate) use std::{
    sync::{Condvar, Mutex, MutexGuard, atomic::AtomicUsize},
    thread::yield_now,
};

#[cfg(feature = "shuttle")]
pub(crate) use shuttle::{
    sync::{Condvar, Mutex, MutexGuard, atomic::AtomicUsize},
    thread::yield_now,
};
