//! What the host and the agent in the guest (envd) agree on.
//!
//! - [`proto`]: the `process.Process` service as E2B's SDKs speak it, generated from `proto/`.
//! - [`rest`]: the JSON bodies of envd's plain HTTP routes.
//! - [`link`], [`mux`], [`port`]: the channel that carries both, from the bottom up. The link turns
//!   a serial byte pipe into sessions, the mux turns a session into streams, and each stream opens
//!   with the guest port it wants.
//!
//! ```text
//! HTTP (hyper)          one request per stream
//! port header           port.rs   "port 49983, please" → ok / why not
//! yamux                 mux.rs    many streams, flow control
//! link                  link/     COBS packets that carry the session's id
//! virtio-serial port ↔ socket     bytes, in order, that may stop in the middle of anything
//! ```
//!
//! This crate starts no process and touches no device: it knows no VMM and no guest, and is tested
//! over plain sockets.

pub mod link;
pub mod mux;
pub mod port;
pub mod rest;

/// The generated messages, service trait and client of `process.Process`.
#[allow(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    clippy::too_many_lines,
    reason = "generated code"
)]
pub mod proto {
    connectrpc::include_generated!();
}

/// Name of the virtio-serial port on which envd is reached. Without udev there is no
/// `/dev/virtio-ports/<name>`: the guest finds it by `/sys/class/virtio-ports/*/name`.
pub const AGENT_PORT_NAME: &str = "torpor.agent";

/// The vsock port of the channel where the VMM has no virtio-serial (Firecracker). Whoever is accepted
/// there is greeted with one zero byte.
pub const AGENT_VSOCK_PORT: u32 = 1024;

/// Guest port that names envd itself. Nobody listens on it over TCP: envd answers in process.
pub const ENVD_PORT: u16 = 49983;

/// Where the guest mounts its writable ext4, beside the overlay that is made of it. `fstrim` must
/// name this mount: overlayfs refuses to be trimmed.
pub const LAYER_MOUNT: &str = "/run/torpor/layer";

/// cgroup of the user's processes: what `/freeze` stops.
pub const USER_CGROUP: &str = "/sys/fs/cgroup/user";

/// cgroup of the host's own errands in the guest (the reclaim shell): never frozen.
pub const SYSTEM_CGROUP: &str = "/sys/fs/cgroup/system";

/// Request header of `Process.Start` that says which cgroup the process starts in.
pub const CGROUP_HEADER: &str = "torpor-cgroup";

/// Value of [`CGROUP_HEADER`] for [`SYSTEM_CGROUP`]. Absent means [`USER_CGROUP`].
pub const CGROUP_SYSTEM: &str = "system";

/// How often the client of a process stream wants a sign of life while nothing is printed, seconds.
pub const KEEPALIVE_HEADER: &str = "keepalive-ping-interval";
