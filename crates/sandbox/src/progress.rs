//! What a long operation tells whoever watches it: the command line draws bars from it, the
//! benches ignore it.

use std::sync::Arc;

/// One thing that happened in a long operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProgressEvent {
    /// A step begins.
    Started {
        /// What is done, for a person: "boot the guest".
        step: &'static str,
    },
    /// The step that began last has ended.
    Finished,
}

/// Who watches.
#[derive(Clone, Default)]
pub struct Progress(Option<Arc<dyn Fn(ProgressEvent) + Send + Sync>>);

impl std::fmt::Debug for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Progress").field(&self.0.is_some()).finish()
    }
}

impl Progress {
    /// Nobody watches.
    #[must_use]
    pub fn silent() -> Self {
        Self::default()
    }

    /// `watch` is called from whatever thread the operation runs on and must not block.
    pub fn to(watch: impl Fn(ProgressEvent) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(watch)))
    }

    /// Begins a step; it ends when the returned guard is dropped, on whatever way out.
    pub fn step(&self, step: &'static str) -> StepGuard<'_> {
        self.tell(ProgressEvent::Started { step });
        StepGuard(self)
    }

    fn tell(&self, event: ProgressEvent) {
        if let Some(watch) = &self.0 {
            watch(event);
        }
    }
}

/// Ends its step when dropped.
#[derive(Debug)]
#[must_use]
pub struct StepGuard<'a>(&'a Progress);

impl Drop for StepGuard<'_> {
    fn drop(&mut self) {
        self.0.tell(ProgressEvent::Finished);
    }
}
