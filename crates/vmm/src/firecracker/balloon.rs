//! The balloon: what is installed at boot, and what its answers mean.
//!
//! Hinting costs nothing until the host asks for it, so it is armed wherever the VMM knows it;
//! reporting works by itself, so it is the operator's choice. Which of the two a version knows is
//! decided by its number, before anything is sent: an older version refuses the whole request for
//! a field that it does not know.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::firecracker::api::{Api, ApiError};
use crate::version::Version;

/// The first version whose balloon reports and hints.
const FREE_PAGES_SINCE: Version = Version::new(1, 14, 0);

/// What a balloon does about free pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstalledBalloon {
    /// The guest reports free pages by itself.
    pub reporting: bool,
    /// The host can ask for free pages.
    pub hinting: bool,
}

impl InstalledBalloon {
    /// What to install in this version. Asked for independently: hinting is armed wherever it can
    /// be, `reporting` is a choice.
    #[must_use]
    pub fn plan(version: Version, reporting: bool) -> Self {
        let known = knows_free_pages(version);
        Self {
            reporting: reporting && known,
            hinting: known,
        }
    }
}

/// Whether this version's balloon can report and hint free pages.
pub(super) fn knows_free_pages(version: Version) -> bool {
    version >= FREE_PAGES_SINCE
}

/// Installs the balloon, to be called before the machine starts. Returns what it can do.
///
/// # Errors
/// What the API says. A balloon that is refused with a field that its version should know is
/// installed without: a build of Firecracker may lack a feature.
pub async fn install_balloon(
    api: &Api,
    version: Version,
    reporting: bool,
    deadline: Duration,
) -> Result<InstalledBalloon, ApiError> {
    let mut balloon = InstalledBalloon::plan(version, reporting);
    loop {
        match api.put("/balloon", &body_of(balloon), deadline).await {
            Ok(()) => return Ok(balloon),
            Err(error) => match without_refused_field(balloon, &error) {
                Some(less) => balloon = less,
                None => return Err(error),
            },
        }
    }
}

/// Only what is asked for is named, so that a version that knows no field is sent none.
fn body_of(balloon: InstalledBalloon) -> serde_json::Value {
    // Inflated never; if a guest's driver did inflate, it must be able to give way.
    let mut body = json!({ "amount_mib": 0, "deflate_on_oom": true });
    if balloon.reporting {
        body["free_page_reporting"] = true.into();
    }
    if balloon.hinting {
        body["free_page_hinting"] = true.into();
    }
    body
}

/// The balloon without the field that was refused by name; `None` if it was something else.
fn without_refused_field(balloon: InstalledBalloon, error: &ApiError) -> Option<InstalledBalloon> {
    let words = error.fault_message()?;
    // Its name alone would not do: the refusal goes on with the fields that are known.
    let refused = |field: &str| words.contains(&format!("unknown field `{field}`"));
    let less = InstalledBalloon {
        reporting: balloon.reporting && !refused("free_page_reporting"),
        hinting: balloon.hinting && !refused("free_page_hinting"),
    };
    (less != balloon).then_some(less)
}

/// Why hinting was refused: none of these may fail a pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HintingRefusal {
    /// The machine has not been started.
    NotStarted,
    /// There is a balloon, and no driver in the guest that runs it (yet).
    DriverNotActive,
    /// There is no balloon.
    NoBalloon,
    /// There is one, without hinting.
    NotArmed,
    /// This Firecracker does not know the request.
    Unknown,
}

impl HintingRefusal {
    /// Sorts a refusal by its words; `None` for what was none, or is none of these.
    pub(super) fn of(error: &ApiError) -> Option<Self> {
        // Parts of the sentences of BalloonError, BalloonConfigError, VmmActionError and
        // RequestError (Firecracker 1.10 to 1.16).
        const SENTENCES: [(&str, HintingRefusal); 7] = [
            ("not supported before starting", HintingRefusal::NotStarted),
            ("not activated yet", HintingRefusal::DriverNotActive),
            ("evice not found", HintingRefusal::NoBalloon),
            ("No balloon device found", HintingRefusal::NoBalloon),
            ("hinting when not enabled", HintingRefusal::NotArmed),
            // Up to 1.13, of what comes after `balloon/`.
            ("Unrecognized PATCH request path", HintingRefusal::Unknown),
            ("request method and/or path", HintingRefusal::Unknown),
        ];
        let words = error.fault_message()?;
        SENTENCES
            .iter()
            .find(|(part, _)| words.contains(part))
            .map(|(_, refusal)| *refusal)
    }
}

/// `GET /balloon/hinting/status`. Ids of runs are 2 and up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(super) struct HintingStatus {
    /// What the host has asked for last.
    pub(super) host_cmd: u32,
}

/// `host_cmd` once the guest has reported everything and got its pages back.
pub(super) const HOST_CMD_DONE: u32 = 1;
/// `host_cmd` while no run was ever asked for.
pub(super) const HOST_CMD_STOP: u32 = 0;

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(words: &str) -> ApiError {
        ApiError::Refused {
            request: "PATCH /balloon/hinting/start".into(),
            status: 400,
            fault_message: words.into(),
        }
    }

    #[test]
    fn hinting_is_armed_wherever_it_is_known_and_reporting_where_it_is_wanted() {
        let old = InstalledBalloon::plan(Version::new(1, 13, 9), true);
        assert_eq!((old.reporting, old.hinting), (false, false));
        let new = InstalledBalloon::plan(FREE_PAGES_SINCE, false);
        assert_eq!((new.reporting, new.hinting), (false, true));
        let both = InstalledBalloon::plan(Version::new(2, 0, 0), true);
        assert_eq!((both.reporting, both.hinting), (true, true));
    }

    #[test]
    fn a_version_that_knows_neither_field_is_sent_neither() {
        let neither = InstalledBalloon {
            reporting: false,
            hinting: false,
        };
        assert_eq!(
            body_of(neither),
            json!({ "amount_mib": 0, "deflate_on_oom": true })
        );
    }

    #[test]
    fn every_refusal_of_the_real_thing_is_told_apart() {
        let expected = [
            (
                "The requested operation is not supported before starting the microVM.",
                Some(HintingRefusal::NotStarted),
            ),
            (
                "Balloon: Device not activated yet.",
                Some(HintingRefusal::DriverNotActive),
            ),
            ("Device not found", Some(HintingRefusal::NoBalloon)),
            (
                "Attempting to use hinting when not enabled",
                Some(HintingRefusal::NotArmed),
            ),
            (
                "Unrecognized PATCH request path `hinting`.",
                Some(HintingRefusal::Unknown),
            ),
            (
                "Invalid request method and/or path: PATCH /balloon/hinting/start.",
                Some(HintingRefusal::Unknown),
            ),
            ("something new", None),
        ];
        for (words, refusal) in expected {
            assert_eq!(HintingRefusal::of(&refused(words)), refusal, "{words}");
        }
    }
}
