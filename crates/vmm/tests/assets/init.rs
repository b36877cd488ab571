//! The whole user space of a test guest: pid 1, compiled by the tests with `rustc`, static.
//!
//! It loads the modules that are beside it, then answers one line with one line on the port
//! `torpor.agent`, or, where the machine has a vsock, to whoever connects to port 1024 there. It
//! never speaks first.

use std::collections::hash_map::DefaultHasher;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::hash::Hasher;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

unsafe extern "C" {
    fn mount(src: *const i8, target: *const i8, kind: *const i8, flags: u64, data: *const i8) -> i32;
    fn syscall(number: i64, ...) -> i64;
    fn ioctl(fd: i32, request: u64, ...) -> i32;
    fn socket(domain: i32, kind: i32, protocol: i32) -> i32;
    fn bind(fd: i32, address: *const u32, len: u32) -> i32;
    fn listen(fd: i32, backlog: i32) -> i32;
    fn accept(fd: i32, address: *mut u32, len: *mut u32) -> i32;
}

const SYS_FINIT_MODULE: i64 = 313;
const BLKDISCARD: u64 = 0x1277;
const BLKROGET: u64 = 0x125e;

static COUNTER: AtomicU64 = AtomicU64::new(0);

fn main() {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        fs::create_dir_all(target).unwrap();
        let (kind, target) = (CString::new(kind).unwrap(), CString::new(target).unwrap());
        unsafe { mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
    }
    let mut modules: Vec<_> = fs::read_dir("/modules").unwrap().map(|e| e.unwrap().path()).collect();
    modules.sort();
    for module in modules {
        let file = File::open(&module).unwrap();
        let loaded = unsafe { syscall(SYS_FINIT_MODULE, file.as_raw_fd(), c"".as_ptr(), 0) };
        if loaded != 0 {
            println!("{}: {}", module.display(), std::io::Error::last_os_error());
        }
    }
    std::thread::spawn(|| loop {
        COUNTER.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(5));
    });
    println!("test guest is up");
    serve();
}

fn serve() {
    let mut kept = Vec::new();
    loop {
        if let Some(path) = agent_port() {
            let port = OpenOptions::new().read(true).write(true).open(path).unwrap();
            converse(port, &mut kept, true);
        }
        if let Some(listener) = vsock_listener() {
            loop {
                let fd = unsafe { accept(listener, std::ptr::null_mut(), std::ptr::null_mut()) };
                if fd >= 0 {
                    let mut host = unsafe { File::from_raw_fd(fd) };
                    // Greets, as envd does.
                    if host.write_all(&[0]).is_ok() {
                        converse(host, &mut kept, false);
                    }
                }
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Answers until the other side is gone; for ever if it may come back. `poll` on a port without
/// reader would do; for a test guest sleeping is enough.
fn converse(port: File, kept: &mut Vec<u8>, stays: bool) {
    let mut answers = port.try_clone().unwrap();
    let mut lines = BufReader::new(port);
    let mut line = String::new();
    loop {
        line.clear();
        match lines.read_line(&mut line) {
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Ok(0) | Err(_) if !stays => return,
            Ok(0) | Err(_) => std::thread::sleep(Duration::from_millis(5)),
            Ok(_) => {
                let words: Vec<&str> = line.split_whitespace().collect();
                let answer = answer(&words, kept);
                let written = answers.write_all(format!("{answer}\n").as_bytes());
                if written.is_err() && !stays {
                    return;
                }
                written.unwrap();
            }
        }
    }
}

/// Port 1024, any address (linux/vm_sockets.h).
fn vsock_listener() -> Option<i32> {
    let fd = unsafe { socket(40, 1, 0) };
    let address = [40, 1024, u32::MAX, 0];
    let bound = fd >= 0 && unsafe { bind(fd, address.as_ptr(), 16) } == 0;
    (bound && unsafe { listen(fd, 4) } == 0).then_some(fd)
}

fn agent_port() -> Option<String> {
    fs::read_dir("/sys/class/virtio-ports").ok()?.find_map(|entry| {
        let dir = entry.ok()?.path();
        let name = fs::read_to_string(dir.join("name")).ok()?;
        (name.trim() == "torpor.agent")
            .then(|| format!("/dev/{}", dir.file_name().unwrap().to_str().unwrap()))
    })
}

fn answer(words: &[&str], kept: &mut Vec<u8>) -> String {
    match words {
        ["count"] => COUNTER.load(Ordering::Relaxed).to_string(),
        ["read", path] => match fs::read_to_string(path) {
            Ok(text) => text.trim().replace('\n', " "),
            Err(e) => e.to_string(),
        },
        ["list", path] => {
            let mut names: Vec<_> = fs::read_dir(path)
                .map(|dir| dir.map(|e| e.unwrap().file_name().into_string().unwrap()).collect())
                .unwrap_or_default();
            names.sort();
            names.join(" ")
        }
        ["put", path, text] => match fs::write(path, text) {
            Ok(()) => "ok".into(),
            Err(e) => e.to_string(),
        },
        ["readonly", disk] => {
            let mut flag = 0_i32;
            let disk = File::open(disk).unwrap();
            unsafe { ioctl(disk.as_raw_fd(), BLKROGET, &mut flag) };
            flag.to_string()
        }
        // Random bytes in memory, and what they hash to.
        ["keep", mib] => {
            kept.resize(mib.parse::<usize>().unwrap() << 20, 0);
            File::open("/dev/urandom").unwrap().read_exact(kept).unwrap();
            hash(kept)
        }
        ["kept"] => hash(kept),
        // Memory that is used once and given back to the kernel.
        ["churn", mib] => {
            let mut bytes = vec![1_u8; mib.parse::<usize>().unwrap() << 20];
            for page in bytes.chunks_mut(4096) {
                page[0] = page[1].wrapping_add(1);
            }
            hash(&bytes[..1])
        }
        ["write", disk, offset, len, byte] => {
            let file = match OpenOptions::new().write(true).open(disk) {
                Ok(file) => file,
                Err(e) => return e.to_string(),
            };
            let bytes = vec![byte.parse().unwrap(); len.parse().unwrap()];
            let written = file.write_all_at(&bytes, offset.parse().unwrap());
            match written.and_then(|()| file.sync_all()) {
                Ok(()) => "ok".into(),
                Err(e) => e.to_string(),
            }
        }
        ["discard", disk, offset, len] => {
            let file = OpenOptions::new().write(true).open(disk).unwrap();
            let range: [u64; 2] = [offset.parse().unwrap(), len.parse().unwrap()];
            match unsafe { ioctl(file.as_raw_fd(), BLKDISCARD, &range) } {
                0 => "ok".into(),
                _ => std::io::Error::last_os_error().to_string(),
            }
        }
        ["panic"] => {
            fs::write("/proc/sysrq-trigger", "c").ok();
            "still here".into()
        }
        other => format!("what is {other:?}?"),
    }
}

fn hash(bytes: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    format!("{:x}", hasher.finish())
}
