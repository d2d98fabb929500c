//! Running the program, and the folders that it is given.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use mica_testkit::fixture;
use serde_json::Value;
use tempfile::TempDir;

/// What a run of the program left.
pub struct Ran {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Ran {
    pub fn of(output: &Output) -> Ran {
        Ran {
            code: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// It failed with this code and said so in an orderly way.
    pub fn failed(&self, name: &str, code: i32) -> &Ran {
        assert_eq!(self.code, Some(code), "{name}: {}{}", self.out, self.err);
        assert!(
            self.err.lines().any(|line| line.starts_with("mica: ") || line.starts_with("error: ")),
            "{name}: {}",
            self.err
        );
        for word in ["panicked", "RUST_BACKTRACE", "internal error"] {
            assert!(!self.err.contains(word), "{name}: {}", self.err);
        }
        self
    }

    pub fn succeeded(&self, name: &str) -> &Ran {
        assert_eq!(self.code, Some(0), "{name}: {}{}", self.out, self.err);
        self
    }

    pub fn says(&self, name: &str, words: &[&str]) {
        for word in words {
            assert!(self.err.contains(word), "{name}: {word:?} is not in: {}", self.err);
        }
    }
}

/// A folder for one test.
pub struct Room {
    pub folder: TempDir,
}

impl Room {
    pub fn new() -> Room {
        Room { folder: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// A copy of a model of the fixtures, as `name`.
    pub fn model(&self, fixture_name: &str, name: &str) -> PathBuf {
        let target = self.path(name);
        std::fs::create_dir_all(&target).unwrap();
        for entry in std::fs::read_dir(fixture(format!("models/{fixture_name}"))).unwrap() {
            let entry = entry.unwrap();
            if !["golden.safetensors", "config.other.json"].iter().any(|left| entry.file_name() == *left) {
                std::fs::copy(entry.path(), target.join(entry.file_name())).unwrap();
            }
        }
        target
    }

    /// So many lines of text data of different lengths, as `name`.
    pub fn data(&self, name: &str, lines: usize) -> String {
        let line = |i: usize| {
            let text = format!("the number {i} comes before {}", i + 1) + &" and so on".repeat(i % 4);
            serde_json::json!({"text": text}).to_string() + "\n"
        };
        std::fs::write(self.path(name), (0..lines).map(line).collect::<String>()).unwrap();
        self.text(name)
    }

    /// Names in the folder, sorted.
    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// The program with arguments separated by blanks; `@name` is a path in this folder.
    pub fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mica"));
        for argument in arguments.split(' ').filter(|argument| !argument.is_empty()) {
            match argument.strip_prefix('@') {
                Some(name) => command.arg(self.path(name)),
                None => command.arg(argument),
            };
        }
        command.current_dir(self.folder.path()).env_remove("RUST_BACKTRACE").stdin(Stdio::null());
        command
    }

    pub fn run(&self, arguments: &str) -> Ran {
        Ran::of(&self.command(arguments).output().unwrap())
    }

    /// Runs with these lines as input.
    pub fn run_with_input(&self, arguments: &str, input: &str) -> Ran {
        use std::io::Write;
        let mut command = self.command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // The program may end without reading all of it.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        Ran::of(&child.wait_with_output().unwrap())
    }
}

/// Changes `config.json` (or another JSON file) of a model.
pub fn edit(model: &Path, file: &str, change: impl FnOnce(&mut Value)) {
    let path = model.join(file);
    let mut value: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(&path, value.to_string()).unwrap();
}

/// Changes header and data of `model.safetensors`.
pub fn edit_weights(model: &Path, change: impl FnOnce(&mut Value, &mut Vec<u8>)) {
    let path = model.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let mut data = bytes[8 + length..].to_vec();
    change(&mut header, &mut data);
    let header = header.to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(&data);
    std::fs::write(&path, bytes).unwrap();
}
