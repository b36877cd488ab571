//! Pieces of work, done by as many cores as help.

use std::num::NonZero;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::Builder;

/// Most threads for one call: hashing on four of them outruns what can be read or written.
const THREADS_MAX: usize = 4;

/// How many threads to use on this machine. Asks the system, which takes tens of microseconds:
/// once per long work, not per piece.
pub(crate) fn useful_threads() -> usize {
    std::thread::available_parallelism()
        .map_or(1, NonZero::get)
        .min(THREADS_MAX)
}

/// Gives what `work` gives for 0 to `count`, in order. The caller's thread works too, and does it
/// all where no thread can be had.
pub(crate) fn in_parallel<T: Send>(
    threads: usize,
    count: usize,
    work: impl Fn(usize) -> T + Sync,
) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let take_turns = || {
        let mut done = Vec::new();
        loop {
            let piece = next.fetch_add(1, Ordering::Relaxed);
            if piece >= count {
                return done;
            }
            done.push((piece, work(piece)));
        }
    };
    let mut done = std::thread::scope(|scope| {
        let helpers: Vec<_> = (1..threads.min(count))
            .map_while(|_| {
                let name = "torpor-hash".to_owned();
                Builder::new()
                    .name(name)
                    .spawn_scoped(scope, take_turns)
                    .ok()
            })
            .collect();
        let mut done = take_turns();
        for helper in helpers {
            done.extend(helper.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        done
    });
    done.sort_unstable_by_key(|(piece, _)| *piece);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order_whoever_did_the_work() {
        for threads in [0, 1, 2, 9] {
            for count in [0, 1, 2, 100] {
                let squares = in_parallel(threads, count, |n| n * n);
                assert!(squares.into_iter().eq((0..count).map(|n| n * n)));
            }
        }
    }
}
