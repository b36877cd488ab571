//! Generates the messages, service trait and client of `proto/` into `OUT_DIR`.
//!
//! Needs `protoc` on the PATH (Debian: `protobuf-compiler`) or named by `PROTOC`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    connectrpc_build::Config::new()
        .files(&["proto/process/process.proto"])
        .includes(&["proto/"])
        .include_file("_connectrpc.rs")
        .compile()?;
    Ok(())
}
