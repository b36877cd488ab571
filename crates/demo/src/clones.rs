//! One build resumed twice: both are whole, and each goes its own way.

use anyhow::{Context as _, Result};
use serde::Serialize;
use torpor_build::BuildId;
use torpor_sandbox::Sandbox;
use torpor_sandbox::host::Host;
use torpor_sandbox::resume::{ResumeOptions, ResumeReport, resume};
use torpor_workload::Check;

use crate::guest_work::{self, Verification};

/// One of the two.
#[derive(Debug, Clone, Serialize)]
pub struct Clone {
    /// What was found in it.
    pub verification: Verification,
    /// How its resume went.
    pub resume: ResumeReport,
    /// The files of both that it sees: its own alone, if all is well.
    pub files_seen: Vec<String>,
}

/// Both.
#[derive(Debug, ::std::clone::Clone, Serialize)]
pub struct Clones {
    /// In no order.
    pub clones: [Clone; 2],
    /// Their random numbers differ.
    pub random_differs: bool,
    /// Neither sees the other's file.
    pub files_differ: bool,
    /// Both are whole and they diverge.
    pub verified: bool,
}

/// Resumes `build` twice at once and looks at both.
///
/// # Errors
/// A guest does not answer. What is not verified is no error, but in the report.
pub async fn resume_twice(host: &Host, build: &BuildId, before: &Check) -> Result<Clones> {
    let options = ResumeOptions::default();
    let (one, two) = tokio::try_join!(
        Box::pin(resume(host, build, &options)),
        Box::pin(resume(host, build, &options)),
    )
    .context("the build cannot be resumed twice")?;
    // Both write before either looks.
    write_own_file(&one.0, "one").await?;
    write_own_file(&two.0, "two").await?;
    let clones: [Clone; 2] = tokio::try_join!(look(one, before), look(two, before))?.into();
    let [one, two] = &clones;
    let random_differs = one.verification.random != two.verification.random;
    let files_differ = one.files_seen == ["one"] && two.files_seen == ["two"];
    let whole = one.verification.verified && two.verification.verified;
    Ok(Clones {
        random_differs,
        files_differ,
        verified: whole && random_differs && files_differ,
        clones,
    })
}

async fn write_own_file(sandbox: &Sandbox, name: &str) -> Result<()> {
    let line = format!("mkdir -p /root/clones && echo {name} > /root/clones/{name} && sync");
    guest_work::shell(sandbox.envd(), &line).await.map(drop)
}

async fn look((sandbox, resume): (Sandbox, ResumeReport), before: &Check) -> Result<Clone> {
    let verification = guest_work::verify(sandbox.envd(), before).await?;
    let listed = guest_work::shell(sandbox.envd(), "ls /root/clones").await?;
    sandbox.end().await;
    let files_seen = listed.lines().map(str::to_owned).collect();
    Ok(Clone {
        verification,
        resume,
        files_seen,
    })
}
