//! What a new user does: wrong words, odd terminals, closed pipes, no network, no home.

use std::process::Stdio;

use crate::program::{Ran, Room};

#[test]
fn wrong_words_are_answered_with_the_right_ones() {
    let room = Room::new();
    for (name, arguments, words) in [
        ("misspelt command", "genrate --model x", "generate"),
        ("misspelt flag", "generate --modle x", "--model"),
        ("missing value", "generate --model", "--model"),
        ("a word for a number", "generate --model x -p y -n lots", "lots"),
        ("a negative number", "generate --model x -p y -n -3", "-3"),
        ("two prompts", "generate --model x -p y --prompt-tokens 1", "cannot be used with"),
        ("no threads", "--threads 0 generate --model x -p y", "0"),
        ("an unknown shell", "completions tcsh99", "tcsh99"),
        ("a misspelt key", "train --config @c.yaml", "learning_rate"),
        ("a temperature below zero", "generate --model @llama --prompt-tokens 1 --temp=-1", "temperature"),
        ("a share above one", "generate --model @llama --prompt-tokens 1 --top-p 2 --temp 1", "top"),
        ("a dropout of one", "train --model @llama --data @d.jsonl --output @o --lora-dropout 1", "dropout"),
        (
            "batches that do not divide",
            "train --model @llama --data @d.jsonl --output @o --micro-batch-size 3",
            "divide",
        ),
        (
            "an unknown layer",
            "train --model @llama --data @d.jsonl --output @o --lora-keys magic_proj",
            "magic_proj",
        ),
        ("groups of 48", "convert --model @llama --output @o -q --q-group-size 48", "48"),
        ("bits of a mode", "convert --model @llama --output @o -q --q-mode mxfp8 --q-bits 4", "expected 8"),
        (
            "groups of a mode",
            "convert --model @llama --output @o -q --q-mode nvfp4 --q-group-size 32",
            "expected 16",
        ),
        ("no such mode", "convert --model @llama --output @o -q --q-mode fp3", "nvfp4"),
    ] {
        std::fs::write(room.path("c.yaml"), "learnin_rate: 1").unwrap();
        room.data("d.jsonl", 4);
        room.model("llama", "llama");
        room.run(arguments).failed(name, 2).says(name, &[words]);
        assert!(!room.path("o").exists(), "{name}");
    }
    for arguments in ["--help", "--version", "train --help", "generate -h"] {
        let ran = room.run(arguments);
        ran.succeeded(arguments);
        assert!(!ran.out.is_empty(), "{arguments}");
    }
}

#[test]
fn a_name_that_is_not_in_the_cache_says_how_to_get_it() {
    let room = Room::new();
    for (name, variables) in [
        ("an empty cache", vec![("HF_HOME", Some("nowhere"))]),
        (
            "no home",
            vec![("HOME", None), ("HF_HOME", None), ("XDG_CACHE_HOME", None), ("HF_HUB_CACHE", None)],
        ),
    ] {
        let mut command = room.command("generate --model org/some-model -p a");
        for (variable, value) in variables {
            match value {
                Some(value) => command.env(variable, room.path(value)),
                None => command.env_remove(variable),
            };
        }
        Ran::of(&command.output().unwrap()).failed(name, 3).says(name, &["org/some-model", "hf download"]);
    }
}

#[test]
fn narrow_terminals_and_no_home_change_nothing() {
    let room = Room::new();
    room.data("d.jsonl", 8);
    room.model("llama", "llama");
    for (name, variables) in [
        ("narrow", vec![("COLUMNS", "30")]),
        ("tiny", vec![("COLUMNS", "1"), ("LINES", "1")]),
        ("no colour", vec![("NO_COLOR", "1"), ("TERM", "dumb")]),
    ] {
        for arguments in [
            "train --help",
            "generate --model @llama --prompt-tokens 1,2 -n 2 --json",
            "train --model @llama --data @d.jsonl --output @o --overwrite --steps 2 --max-seq-length 32",
        ] {
            let mut command = room.command(arguments);
            command.env_remove("HOME").envs(variables.iter().copied());
            let ran = Ran::of(&command.output().unwrap());
            ran.succeeded(name);
            assert!(
                !ran.out.contains('\u{1b}') && !ran.err.contains('\u{1b}'),
                "{name}: {arguments}: {}",
                ran.err
            );
        }
    }
}

#[cfg(unix)]
#[test]
fn a_reader_that_leaves_is_no_failure_of_the_program() {
    use std::os::unix::process::ExitStatusExt;
    let room = Room::new();
    room.model("llama", "llama");
    for arguments in
        ["train --help", "completions bash", "generate --model @llama --prompt-tokens 1,2 -n 200"]
    {
        let mut command = room.command(arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let ended = output.status.success() || output.status.signal() == Some(libc::SIGPIPE);
        assert!(ended, "{arguments}: {:?}", output.status);
        assert!(output.stderr.is_empty(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn results_that_cannot_be_written_are_a_failure_of_the_disk() {
    let room = Room::new();
    room.model("llama", "llama");
    for arguments in [
        "completions bash",
        "generate --model @llama --prompt-tokens 1,2 -n 2",
        "generate --model @llama --prompt-tokens 1,2 -n 2 --json",
        "bench --train --model @llama --seq 8 --steps 1",
        "convert --model @llama --output @out --json",
    ] {
        let mut command = room.command(arguments);
        command.stdout(std::fs::File::options().write(true).open("/dev/full").unwrap());
        Ran::of(&command.output().unwrap()).failed(arguments, 6);
    }
}

#[cfg(unix)]
#[test]
fn closed_input_is_an_empty_one() {
    use std::os::unix::process::CommandExt;
    let room = Room::new();
    room.model("llama-4bit", "llama");
    // The tokenizer adds a mark of the beginning, so that there is something to read.
    for (arguments, code) in [("chat --model @llama", 0), ("generate --model @llama --raw -n 1 -p -", 0)] {
        let mut command = room.command(arguments);
        // SAFETY: close(2) may be called between fork and exec; the descriptor is the child's.
        unsafe {
            command.pre_exec(|| {
                libc::close(0);
                Ok(())
            });
        }
        let ran = Ran::of(&command.output().unwrap());
        assert_eq!(ran.code, Some(code), "{arguments}: {}", ran.err);
    }
}

#[cfg(unix)]
#[test]
fn an_interrupted_conversion_leaves_nothing() {
    // A pipe as a weight file is no regular file, so slowness cannot be had that way; the program is stopped as
    // soon as its temporary folder is there.
    let room = Room::new();
    room.model("llama", "llama");
    let before = room.names();
    for _ in 0..20 {
        let mut command = room.command("convert --model @llama --output @out --dtype bfloat16");
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        while child.try_wait().unwrap().is_none() && room.names() == before {
            std::thread::yield_now();
        }
        // SAFETY: the child was not waited for unless it has ended, which the call then says.
        unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
        let code = child.wait().unwrap().code();
        assert!(matches!(code, Some(0 | 130)), "{code:?}");
        if code == Some(0) {
            std::fs::remove_dir_all(room.path("out")).unwrap();
        }
        assert_eq!(room.names(), before);
    }
}
