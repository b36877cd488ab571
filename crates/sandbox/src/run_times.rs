//! Times over several runs: the three numbers that a person compares.

use serde::Serialize;

/// Minimum, median and 95th percentile of a series, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RunTimes {
    /// Shortest.
    pub min_ms: f64,
    /// Median (of an even number: the mean of the middle two).
    pub median_ms: f64,
    /// 95th percentile, by nearest rank.
    pub p95_ms: f64,
}

impl RunTimes {
    /// Of a series in any order; `None` of an empty one.
    #[must_use]
    pub fn of(series_ms: &[f64]) -> Option<Self> {
        let mut sorted = series_ms.to_vec();
        sorted.sort_by(f64::total_cmp);
        let min_ms = *sorted.first()?;
        let middle = sorted.len() / 2;
        let median_ms = if sorted.len().is_multiple_of(2) {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        } else {
            sorted[middle]
        };
        let rank = (sorted.len() * 95).div_ceil(100);
        Some(Self {
            min_ms,
            median_ms,
            p95_ms: sorted[rank - 1],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_in_any_order_gives_min_median_and_p95() {
        let series: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        let times = RunTimes::of(&series).unwrap();
        assert_eq!(
            times,
            RunTimes {
                min_ms: 1.0,
                median_ms: 50.5,
                p95_ms: 95.0
            }
        );
    }

    #[test]
    fn one_run_is_all_three_and_none_is_nothing() {
        let times = RunTimes::of(&[7.0]).unwrap();
        assert_eq!(
            times,
            RunTimes {
                min_ms: 7.0,
                median_ms: 7.0,
                p95_ms: 7.0
            }
        );
        assert_eq!(RunTimes::of(&[]), None);
    }
}
