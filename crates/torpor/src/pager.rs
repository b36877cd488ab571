//! `torpor pager`: a page-fault handler for anybody's VMM that speaks Firecracker's handshake.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::process::{Resource, getrlimit, setrlimit};
use torpor_build::Storage;
use torpor_pager::server::{Server, ServerConfig, ServerReport, StopHandle};
use torpor_pager::{FileSource, PageRun, PageSource};
use torpor_sandbox::ImageSource;

use crate::cli::PagerArgs;
use crate::context::{Context, blocking};
use crate::error::{CliError, named_file};
use crate::output::{mib, write_whole};

pub(crate) async fn run(context: &Context, args: PagerArgs) -> Result<(), CliError> {
    named_file("memory file", args.memfile.as_deref())?;
    let storage = match &args.build {
        Some(_) => Some(context.open_storage().await?),
        None => None,
    };
    // Each VMM takes four descriptors (eight must be free when it comes); the usual limit would do
    // for some 250.
    raise_descriptor_limit();
    let (socket, report) = (Socket::bind(&args.socket)?, args.report.clone());
    let server = blocking(move || server(storage.as_ref(), &args, &socket).map(|s| (s, socket)));
    let (server, socket) = server.await?;
    let output = context.output;
    output.note(&format!("listening on {}", socket.path.display()));
    // Dropped on every way out, an interrupt among them: the VMMs are then killed, and told of.
    let _stop = StopOnDrop(server.stop_handle());
    let served = blocking(move || {
        let write = |done: &ServerReport| {
            if let Some(path) = &report
                && let Err(error) = write_report(path, done)
            {
                tracing::error!(path = %path.display(), %error, "the report was not written");
            }
        };
        let served = server.run(&mut |done| write(done));
        drop(socket);
        let served = served.map_err(CliError::system("serve page faults"))?;
        write(&served);
        Ok(served)
    });
    let served = served.await?;
    let printed = output.result(&served, text);
    printed.map_err(CliError::system("print the report"))
}

/// As many descriptors as the host lets us have. Best effort.
fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::debug!(%error, "the limit of open files stays");
    }
}

struct StopOnDrop(StopHandle);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// A listening socket, whose file goes with it.
struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    fn bind(path: &Path) -> Result<Self, CliError> {
        let listener = UnixListener::bind(path).map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => CliError::Usage(format!(
                "{} exists: another pager may be listening there; if none is, remove it",
                path.display()
            )),
            _ => CliError::Write {
                path: path.to_owned(),
                source,
            },
        })?;
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the socket stays");
        }
    }
}

fn server(
    storage: Option<&Storage>,
    args: &PagerArgs,
    socket: &Socket,
) -> Result<Server, CliError> {
    let (source, len_pages, prefetch) = source(storage, args)?;
    let config = ServerConfig {
        source,
        len_pages,
        prefetch,
        connections: args.connections,
    };
    let listener = socket.listener.try_clone();
    listener
        .and_then(|listener| Server::new(listener, config))
        .map_err(CliError::system("serve page faults"))
}

type Content = (Arc<dyn PageSource>, u64, Vec<PageRun>);

/// What is served, its length in pages, and what to bring in ahead.
fn source(storage: Option<&Storage>, args: &PagerArgs) -> Result<Content, CliError> {
    if let (Some(storage), Some(name)) = (storage, &args.build) {
        let build = storage.open_build(&storage.resolve(name)?)?;
        let image = build.memory()?;
        let len_pages = image.len_pages();
        let recorded = build.recorded_working_set();
        let recorded = recorded.unwrap_or_else(|| build.manifest().info.working_set.clone());
        let runs = recorded.iter();
        let prefetch = runs.map(|run| PageRun::new(run.first_page, run.pages));
        return Ok((
            Arc::new(ImageSource(Arc::new(image))),
            len_pages,
            prefetch.collect(),
        ));
    }
    let Some(path) = &args.memfile else {
        let missing = "give --build or --memfile";
        return Err(CliError::Usage(missing.to_owned()));
    };
    let file = File::open(path).and_then(FileSource::new);
    let file = file.map_err(CliError::system("open the memory file"))?;
    let len_pages = file.len_pages();
    Ok((Arc::new(file), len_pages, Vec::new()))
}

fn write_report(path: &Path, report: &ServerReport) -> io::Result<()> {
    write_whole(path, &serde_json::to_vec_pretty(report)?)
}

fn text(report: &ServerReport) -> String {
    let all = &report.figures;
    format!(
        "VMMs served    {} ({} given up, {} refused)\n\
         page faults    {} (p50 {} us, p99 {} us, max {} us)\n\
         pages          {} copied, {} zeroed; {} of them ahead of their faults\n\
         discards       {} ({} pages)\n\
         rate           {}/s for each VMM, from its handshake to its last page",
        report.vmms_served,
        report.vmms_failed,
        report.refused,
        all.faults,
        all.p50_us,
        all.p99_us,
        all.max_us,
        all.pages_copied,
        all.pages_zeroed,
        all.pages_prefetched,
        all.removes,
        all.pages_removed,
        mib(all.bytes_per_s),
    )
}
