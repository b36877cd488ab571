//! Which kernels must not be scanned.

/// Why a guest must not be scanned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Nobody knows how the kernel was built.
    #[error("the guest kernel's configuration is unknown")]
    UnknownConfig,
}

/// Why a guest whose kernel was built with `config` and booted with `cmdline` must not be scanned;
/// `None` if it may be.
#[must_use]
pub fn refusal(config: Option<&str>, _cmdline: &str) -> Option<Refusal> {
    config.is_none().then_some(Refusal::UnknownConfig)
}
