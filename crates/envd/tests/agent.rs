//! envd as a process, over a socket pair that plays the serial port, driven by the host's own
//! client. No VM, no mocks.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests and their helpers"
)]

mod host;

use std::time::{Duration, Instant};

use connectrpc::ErrorCode;
use host::{Agent, LONG, output, sh};
use torpor_guest::{Command, GuestError, ProcessEvent, PtySize, Selector, Signal};

/// Of a command: starting it must fit in as well, on a busy host.
const TIME_LIMIT: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_healthy_agent_answers() {
    let agent = Agent::start();
    let envd = agent.envd().await;
    envd.health().await.unwrap();
    let metrics = envd.metrics().await.unwrap();
    assert!(metrics.cpu_count >= 1);
    assert!(metrics.mem_total > metrics.mem_free);
    assert!(metrics.mem_free > 0 && metrics.disk_total > 0);
}

#[tokio::test]
async fn init_answers_with_what_the_host_wants_to_know() {
    let agent = Agent::start();
    let envd = agent.envd().await;
    let answer = envd.init().await.unwrap();
    assert!(!answer.kernel_release.is_empty());
    assert!(!answer.boot_id.is_empty());
    assert!(answer.clock_step_ms.abs() < 60_000);
    // A developer's clock is not ours to set, and envd says so.
    assert!(!answer.machine_set);
    let huge = torpor_guest::InitRequest {
        unix_time_ns: 1,
        entropy: vec![1; 5000],
    };
    let refused = envd.init_with(&huge).await.unwrap_err();
    assert!(
        matches!(refused, GuestError::Refused { status: 400, .. }),
        "{refused}"
    );
}

#[tokio::test]
async fn a_command_gives_its_output_and_its_code() {
    let agent = Agent::start();
    let envd = agent.envd().await;
    let output = envd
        .run(&sh("echo out; echo err >&2; exit 3"), LONG)
        .await
        .unwrap();
    assert_eq!(output.stdout, b"out\n");
    assert_eq!(output.stderr, b"err\n");
    assert_eq!((output.exit.code, output.exit.exited), (3, true));
    assert_eq!(output.exit.status, "exit status 3");
}

#[tokio::test]
async fn a_process_gets_the_environment_and_directory_that_were_asked_for() {
    let agent = Agent::start();
    let envd = agent.envd().await;
    let command =
        sh("echo $WORD $HOME; pwd; type ls >/dev/null && echo path").env("WORD", "torpor");
    let text = output(&envd, &command.cwd("/usr")).await;
    assert_eq!(text, "torpor /root\n/usr\npath\n");
}

#[tokio::test]
async fn what_cannot_be_started_is_refused_before_any_event() {
    let agent = Agent::start();
    let envd = agent.envd().await;
    for (command, code) in [
        (
            Command::new("no-such-command-here"),
            ErrorCode::InvalidArgument,
        ),
        (
            sh("true").cwd("/no/such/directory"),
            ErrorCode::InvalidArgument,
        ),
        (
            sh("true").user("nobody-of-that-name"),
            ErrorCode::Unauthenticated,
        ),
        (Command::new(""), ErrorCode::InvalidArgument),
    ] {
        let error = envd.start(&command, Some(LONG)).await.unwrap_err();
        assert_eq!(error.code(), Some(code), "{error}");
    }
    // And the agent is none the worse for it.
    assert_eq!(output(&envd, &sh("echo on")).await, "on\n");
}

#[tokio::test]
async fn a_process_runs_as_the_user_that_was_named() {
    let agent = Agent::start();
    let envd = agent.envd().await;
    assert_eq!(
        output(&envd, &sh("id -un; id -Gn").user("daemon")).await,
        "daemon\ndaemon\n"
    );
}

#[tokio::test]
async fn input_reaches_a_process_until_it_is_closed() {
    let agent = Agent::start();
    let envd = agent.envd().await;
    let mut cat = envd
        .start(&Command::new("cat").stdin().tag("the-cat"), Some(LONG))
        .await
        .unwrap();
    let by_tag = Selector::Tag("the-cat".into());
    envd.send_input(&by_tag, b"hello").await.unwrap();
    assert_eq!(
        cat.next().await.unwrap(),
        Some(ProcessEvent::Stdout(b"hello".to_vec()))
    );
    let listed = envd.list().await.unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].pid, listed[0].cmd.as_str()), (cat.pid(), "cat"));
    envd.close_stdin(&by_tag).await.unwrap();
    assert!(cat.output().await.unwrap().exit.success());
}

#[tokio::test]
async fn without_stdin_a_process_reads_the_end_at_once() {
    let agent = Agent::start();
    let envd = agent.envd().await;
    assert_eq!(output(&envd, &sh("cat; echo end")).await, "end\n");
}

#[tokio::test]
async fn a_terminal_is_a_terminal_and_changes_its_size() {
    let agent = Agent::start();
    let envd = agent.envd().await;
    let command = sh("tty >/dev/null && stty size; read line; stty size; echo got $line")
        .pty(PtySize { cols: 80, rows: 24 });
    let mut shell = envd.start(&command, Some(LONG)).await.unwrap();
    let selector = Selector::from(shell.pid());
    let mut text = String::new();
    while !text.contains("24 80") {
        match shell.next().await.unwrap().unwrap() {
            ProcessEvent::Pty(bytes) => text.push_str(&String::from_utf8_lossy(&bytes)),
            other => panic!("{other:?} after {text:?}"),
        }
    }
    envd.update(
        &selector,
        PtySize {
            cols: 132,
            rows: 50,
        },
    )
    .await
    .unwrap();
    envd.send_pty(&selector, b"torpor\n").await.unwrap();
    let output = shell.output().await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("50 132"), "{text:?}");
    assert!(text.contains("got torpor"), "{text:?}");
    assert!(output.exit.success());
}

#[tokio::test]
async fn a_timeout_kills_the_process_with_all_that_it_started() {
    let agent = Agent::start();
    let envd = agent.envd().await;
    // timeout(1) moves its child into a group of its own: still the same session.
    let command = sh("timeout 300 sleep 298 & echo started; sleep 299");
    let mut process = envd.start(&command, Some(TIME_LIMIT)).await.unwrap();
    let pid = process.pid();
    assert_eq!(
        process.next().await.unwrap(),
        Some(ProcessEvent::Stdout(b"started\n".to_vec()))
    );
    let error = process.next().await.unwrap_err();
    assert!(error.is_timeout(), "{error}");
    host::eventually("the session is empty", || {
        host::session_members(pid).is_empty()
    })
    .await;
    // Whoever asks later learns how it ended.
    let late = envd
        .connect(&Selector::from(pid))
        .await
        .unwrap()
        .output()
        .await
        .unwrap();
    assert_eq!((late.exit.code, late.exit.exited), (-1, false));
    assert_eq!(late.exit.status, "signal: killed");
}

#[tokio::test]
async fn the_timeout_comes_even_if_nobody_watches_any_more() {
    let agent = Agent::start();
    let envd = agent.envd().await;
    let process = envd
        .start(&sh("sleep 300"), Some(TIME_LIMIT))
        .await
        .unwrap();
    let pid = process.pid();
    drop(process);
    host::eventually("the process is killed", || !host::alive(pid)).await;
}

#[tokio::test]
async fn closing_the_stream_leaves_the_process_alone() {
    let agent = Agent::start();
    let envd = agent.envd().await;
    let process = envd
        .start(&sh("read line; echo got $line").stdin(), Some(LONG))
        .await
        .unwrap();
    let selector = Selector::from(process.pid());
    drop(process);
    let again = envd.connect(&selector).await.unwrap();
    envd.send_input(&selector, b"it\n").await.unwrap();
    assert_eq!(again.output().await.unwrap().stdout, b"got it\n");
}

#[tokio::test]
async fn everybody_who_watches_sees_all_from_his_attach_on() {
    let agent = Agent::start();
    let envd = agent.envd().await;
    let command = Command::new("cat").stdin();
    let mut first = envd.start(&command, Some(LONG)).await.unwrap();
    let selector = Selector::from(first.pid());
    envd.send_input(&selector, b"one").await.unwrap();
    assert_eq!(
        first.next().await.unwrap(),
        Some(ProcessEvent::Stdout(b"one".to_vec()))
    );
    let second = envd.connect(&selector).await.unwrap();
    envd.send_input(&selector, b"two").await.unwrap();
    envd.close_stdin(&selector).await.unwrap();
    assert_eq!(first.output().await.unwrap().stdout, b"two");
    assert_eq!(second.output().await.unwrap().stdout, b"two");
}

#[tokio::test]
async fn a_signal_ends_a_process_and_an_unknown_process_is_not_found() {
    let agent = Agent::start();
    let envd = agent.envd().await;
    for (signal, status) in [
        (Signal::Term, "signal: terminated"),
        (Signal::Kill, "signal: killed"),
    ] {
        let process = envd
            .start(&Command::new("sleep").arg("300"), Some(LONG))
            .await
            .unwrap();
        envd.send_signal(&Selector::from(process.pid()), signal)
            .await
            .unwrap();
        let exit = process.output().await.unwrap().exit;
        assert_eq!((exit.code, exit.status.as_str()), (-1, status));
    }
    let error = envd
        .send_signal(&Selector::Pid(1), Signal::Kill)
        .await
        .unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::NotFound));
    let error = envd
        .connect(&Selector::Tag("nobody".into()))
        .await
        .unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::NotFound));
}

#[tokio::test]
async fn the_end_does_not_wait_for_a_daemon_that_holds_the_output_open() {
    let agent = Agent::start();
    let envd = agent.envd().await;
    let began = Instant::now();
    let text = output(&envd, &sh("(sleep 60; echo late) & echo $!")).await;
    assert!(began.elapsed() < Duration::from_secs(30));
    let daemon: u32 = text.trim().parse().unwrap();
    assert!(host::alive(daemon), "the daemon must not die of it");
    host::kill(daemon);
}

#[tokio::test]
async fn all_of_a_long_output_arrives_in_order() {
    let agent = Agent::start();
    let envd = agent.envd().await;
    let text = output(&envd, &sh("seq 1 200000")).await;
    let expected: String = (1..=200_000).map(|n| format!("{n}\n")).collect();
    assert!(
        text == expected,
        "{} bytes instead of {}",
        text.len(),
        expected.len()
    );
}

#[tokio::test]
async fn many_commands_at_once_all_end() {
    let agent = Agent::start();
    let envd = agent.envd().await;
    let runs: Vec<_> = (0..40)
        .map(|n| {
            let envd = envd.clone();
            tokio::spawn(async move { output(&envd, &sh(&format!("echo {n}"))).await })
        })
        .collect();
    for (n, run) in runs.into_iter().enumerate() {
        assert_eq!(run.await.unwrap(), format!("{n}\n"));
    }
    assert_eq!(envd.list().await.unwrap(), []);
}

#[tokio::test]
async fn any_tcp_port_of_the_guest_can_be_reached_and_a_closed_one_says_so() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let agent = Agent::start();
    let channel = agent.channel().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let service = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut question = Vec::new();
        stream.read_to_end(&mut question).await.unwrap();
        question.reverse();
        stream.write_all(&question).await.unwrap();
    });
    let mut stream = channel.open(port).await.unwrap();
    stream.write_all(b"torpor").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, "roprot");
    service.await.unwrap();
    let refused = channel.open(port).await.unwrap_err().to_string();
    assert!(refused.contains("refused"), "{refused}");
}

#[tokio::test]
async fn too_many_streams_are_an_error_and_not_the_end_of_the_session() {
    let agent = Agent::start();
    let channel = agent.channel().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut open = Vec::new();
    let refused = loop {
        match channel.open(port).await {
            Ok(stream) => open.push(stream),
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, GuestError::Mux(_)), "{refused}");
    assert_eq!(open.len(), envd_api::mux::STREAMS_MAX);
    drop(open);
    let envd = torpor_guest::Envd::new(channel);
    host::eventually_ok(|| envd.health()).await;
}

#[tokio::test]
async fn a_quiet_process_is_waited_for_and_a_guest_that_stands_still_is_not() {
    use nix::sys::signal::{Signal as HostSignal, kill};
    let agent = Agent::start();
    let envd = agent.envd().await.with_keepalive(Duration::from_secs(4));
    // Longer than the twelve seconds of silence that end a stream: the keepalives fill them.
    let quiet = envd.run(&sh("sleep 16; echo done"), LONG).await;
    assert_eq!(quiet.unwrap().stdout, b"done\n");

    let envd = envd.with_keepalive(Duration::from_secs(1));
    let mut process = envd.start(&sh("sleep 600"), None).await.unwrap();
    let pid = nix::unistd::Pid::from_raw(agent.child.id().try_into().unwrap());
    kill(pid, HostSignal::SIGSTOP).unwrap();
    let error = tokio::time::timeout(LONG, process.next())
        .await
        .expect("the stream waits for ever")
        .unwrap_err();
    assert!(
        matches!(error, GuestError::Silent { waited, .. } if waited == Duration::from_secs(3)),
        "{error}"
    );
    kill(pid, HostSignal::SIGCONT).unwrap();
}

#[tokio::test]
async fn terminal_input_is_held_back_until_the_program_reads_it() {
    let agent = Agent::start();
    let envd = agent.envd().await;
    // Raw, so that the kernel keeps what it has no room for waiting instead of dropping it.
    let line = "stty raw -echo; echo ready; sleep 2; head -c 50000 | sha256sum";
    let size = PtySize { cols: 80, rows: 24 };
    let mut reader = envd.start(&sh(line).pty(size), None).await.unwrap();
    let first = reader.next().await.unwrap();
    assert!(matches!(first, Some(ProcessEvent::Pty(ref bytes)) if bytes.starts_with(b"ready")));
    let typed: Vec<u8> = (0..50_000_u32)
        .map(|n| b'a' + u8::try_from(n % 23).unwrap())
        .collect();
    let process = Selector::Pid(reader.pid());
    for piece in typed.chunks(4096) {
        envd.send_pty(&process, piece).await.unwrap();
    }
    let sum = output(
        &envd,
        &sh("i=0; s=abcdefghijklmnopqrstuvw; while [ $i -lt 2174 ]; do printf $s; i=$((i+1)); done | head -c 50000 | sha256sum"),
    )
    .await;
    let arrived = reader.output().await.unwrap();
    assert_eq!(String::from_utf8_lossy(&arrived.stdout).trim(), sum.trim());
}
