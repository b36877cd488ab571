//! `torpor create-build`: a template from a boot, or a layer on top of a build.

use serde::Serialize;
use torpor_build::{BuildId, Error as BuildError, Name};
use torpor_sandbox::Sandbox;
use torpor_sandbox::boot::{BootRequest, boot};
use torpor_sandbox::host::Host;
use torpor_sandbox::pause::Paused;
use torpor_sandbox::pause::report::PauseReport;
use torpor_sandbox::resume::{ResumeOptions, resume};

use crate::cli::CreateBuildArgs;
use crate::context::{Context, blocking, resolve};
use crate::error::{CliError, named_file};
use crate::guest_command::{Stdout, must_succeed, until_ready};
use crate::{pausing, report};

#[derive(Debug, Serialize)]
struct Created {
    build: BuildId,
    template: Name,
    parent: Option<BuildId>,
    /// What the template's name meant before; that build stays.
    replaced: Option<BuildId>,
    pause: PauseReport,
}

pub(crate) async fn run(context: &Context, args: CreateBuildArgs) -> Result<(), CliError> {
    let name = args.template.clone();
    if name.as_str().parse::<BuildId>().is_ok() {
        return Err(BuildError::NameIsAnId { name }.into());
    }
    named_file("root file system", args.rootfs.as_deref())?;
    let host = context.open_host(&args.run).await?;
    let sandbox = Box::pin(start(context, &host, &args)).await?;
    if let Some(line) = &args.setup_cmd {
        must_succeed(&sandbox, "--setup-cmd", line, Stdout::ToStderr).await?;
    }
    if let Some(line) = &args.ready_cmd {
        until_ready(&sandbox, line).await?;
    }
    let parent = sandbox.parent_id();
    let flags = pausing::flags(&host, &sandbox, Some(&name), &args.run).await;
    let build = context.new_build_id();
    let paused =
        pausing::into_build(context, &host, sandbox, build, Some(name.clone()), flags).await?;
    let replaced = give_name(context, &host, &name, &paused).await?;
    let created = Created {
        build,
        template: name,
        parent,
        replaced,
        pause: paused.report,
    };
    let printed = context.output.result(&created, text);
    printed.map_err(CliError::system("print the result"))
}

async fn start(
    context: &Context,
    host: &Host,
    args: &CreateBuildArgs,
) -> Result<Sandbox, CliError> {
    let progress = context.output.progress();
    if let Some(from) = &args.from_build {
        let parent = resolve(host, from).await?;
        let options = ResumeOptions {
            progress,
            ..ResumeOptions::default()
        };
        return Ok(resume(host, &parent, &options).await?.0);
    }
    let request = BootRequest {
        memory_bytes: args.memory,
        disk_bytes: args.disk,
        vcpus: args.vcpu,
        network: args.network,
        kernel: args.kernel.clone(),
        kernel_args: args.kernel_args.clone(),
        rootfs: args.rootfs.clone(),
        template: Some(args.template.clone()),
        progress,
    };
    Ok(boot(host, request).await?)
}

/// Lets the template's name mean the new build, which is announced by that: one without a name is
/// deleted when the command ends.
async fn give_name(
    context: &Context,
    host: &Host,
    name: &Name,
    paused: &Paused,
) -> Result<Option<BuildId>, CliError> {
    let (storage, name, id) = (host.storage().clone(), name.clone(), paused.build.id());
    let replaced = blocking(move || {
        // A name that was damaged or meant nothing is simply given anew.
        let replaced = storage.resolve(name.as_str()).ok();
        match storage.set_template(&name, &id) {
            Ok(()) => Ok(replaced),
            Err(source) => Err(CliError::NotNamed {
                name,
                source: Box::new(source),
            }),
        }
    })
    .await?;
    context.announce(&id);
    Ok(replaced)
}

fn text(created: &Created) -> String {
    let mut text = format!("template {} is build {}\n", created.template, created.build);
    if let Some(parent) = &created.parent {
        text += &format!("on top of build {parent}\n");
    }
    if let Some(replaced) = &created.replaced {
        text += &format!("before it was build {replaced}, which stays\n");
    }
    text + "\n" + &report::pause_text(&created.pause)
}
