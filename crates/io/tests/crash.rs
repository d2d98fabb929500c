//! What stays on disk when a writer is killed, or the disk is full.
//!
//! Both need a second process: the test starts its own program again, to run one of the ignored
//! tests below, which do nothing unless they are told a folder.
#![cfg(unix)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use mica_io::atomic::{self, Appender, AtomicDir, remove_leftovers};
use mica_io::safetensors::{SafeTensors, Writer};
use mica_io::{DType, ErrorKind};
use mica_testkit::Rng;

const FOLDER: &str = "MICA_IO_CRASH_TEST_FOLDER";

fn start(child: &str, folder: &Path) -> Child {
    Command::new(env::current_exe().unwrap())
        .args([child, "--exact", "--ignored", "--nocapture"])
        .env(FOLDER, folder)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

fn folder_of_child() -> Option<PathBuf> {
    env::var_os(FOLDER).map(PathBuf::from)
}

/// Version `n` of the content: `n` says how long it is and what it holds.
fn content(n: u64) -> Vec<u8> {
    let mut bytes = n.to_le_bytes().to_vec();
    bytes.resize(8 + 1000 + (n as usize % 7) * 60_000, n as u8);
    bytes
}

fn version(bytes: &[u8]) -> u64 {
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert!(bytes == content(n), "version {n} is not whole");
    n
}

#[test]
#[ignore = "runs inside killed_writers_leave_whole_versions"]
fn writes_until_killed() {
    let Some(folder) = folder_of_child() else { return };
    let mut log = Appender::open(folder.join("log")).unwrap();
    for n in log.len() / 8.. {
        atomic::write(folder.join("file"), content(n)).unwrap();
        let step = AtomicDir::create(folder.join("folder")).unwrap();
        for name in ["a", "b"] {
            fs::write(step.path().join(name), content(n)).unwrap();
        }
        step.commit().unwrap();
        log.append(&format!("{n:07}")).unwrap();
    }
}

#[test]
fn killed_writers_leave_whole_versions() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let mut rng = Rng::new(1);
    let mut last = 0;
    for round in 0..12 {
        let mut child = start("writes_until_killed", folder.path());
        // Wait until this child has written, then a random while longer.
        let log_len = || fs::metadata(at("log")).map_or(0, |m| m.len());
        let (before, patience) = (log_len(), Instant::now());
        while log_len() <= before && patience.elapsed() < Duration::from_secs(60) {
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(Duration::from_micros(rng.range(0..20_000) as u64));
        child.kill().unwrap();
        child.wait().unwrap();

        let file = version(&fs::read(at("file")).unwrap());
        let a = version(&fs::read(at("folder/a")).unwrap());
        let b = version(&fs::read(at("folder/b")).unwrap());
        assert_eq!(a, b, "round {round}: the folder mixes versions");
        assert_eq!(fs::read_dir(at("folder")).unwrap().count(), 2, "round {round}");
        assert!(file == a || file == a + 1, "round {round}: file {file}, folder {a}");
        let log = Appender::open(at("log")).unwrap();
        assert_eq!(log.len() % 8, 0, "round {round}: the log ends in a torn line");
        assert!(log.len() / 8 == a || log.len() / 8 == a + 1, "round {round}: log {}", log.len() / 8);
        assert!(a >= last, "round {round}");
        last = a;
    }
    let lines = fs::read_to_string(at("log")).unwrap();
    for (i, line) in lines.lines().enumerate() {
        assert_eq!(line, format!("{i:07}"));
    }
    remove_leftovers(folder.path(), Duration::ZERO).unwrap();
    let mut names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["file", "folder", "log"]);
}

#[test]
#[ignore = "runs inside a_full_disk_leaves_the_old_files"]
fn writes_past_the_limit() {
    let Some(folder) = folder_of_child() else { return };
    // No file may grow past 64 KiB: what a full disk or a quota looks like, without being root.
    let limit = libc::rlimit { rlim_cur: 64 << 10, rlim_max: 64 << 10 };
    // SAFETY: `limit` is a valid rlimit for the duration of the call; ignoring a signal installs
    // no handler.
    let set = unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        libc::setrlimit(libc::RLIMIT_FSIZE, &limit)
    };
    assert_eq!(set, 0);

    let large = vec![1; 1 << 20];
    let error = atomic::write(folder.join("file"), &large).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DiskFull, "{error}");

    let mut writer = Writer::new();
    writer.tensor("small", DType::U8, &[100], &large[..100]);
    writer.tensor("large", DType::U8, &[1 << 20], &large);
    let error = writer.write(folder.join("f.safetensors")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DiskFull, "{error}");

    let mut log = Appender::open(folder.join("log")).unwrap();
    let line = "x".repeat(40 << 10);
    log.append(&line).unwrap();
    let error = log.append(&line).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DiskFull, "{error}");
    log.append("still whole").unwrap();
}

#[test]
fn a_full_disk_leaves_the_old_files() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("file"), "old").unwrap();
    let mut writer = Writer::new();
    writer.tensor("old", DType::U8, &[1], &[7]);
    writer.write(at("f.safetensors")).unwrap();
    fs::write(at("log"), "first\n").unwrap();

    let status = start("writes_past_the_limit", folder.path()).wait().unwrap();
    assert!(status.success());

    assert_eq!(fs::read(at("file")).unwrap(), b"old");
    assert_eq!(SafeTensors::open(at("f.safetensors")).unwrap().read("old").unwrap(), [7]);
    let log = fs::read_to_string(at("log")).unwrap();
    assert_eq!(log, format!("first\n{}\nstill whole\n", "x".repeat(40 << 10)));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3, "temporaries are removed");
}
